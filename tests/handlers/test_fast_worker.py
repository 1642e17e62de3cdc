from __future__ import annotations

import json
import logging
import random
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

Import = Callable[[str], Any]

# ts leaves its version file open when imported.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

JSON = "application/json"
Field = tuple[str, bytes, str]
Request = tuple[str, dict[str, str], Sequence[Field]]
"""Id, headers, fields: name, value, content type."""


def encode(batch: Sequence[Request]) -> bytes:
    """Write a batch as the frontend does (org.pytorch.serve.util.codec.ModelRequestEncoder)."""

    def pack(*values: str | bytes) -> bytes:
        encoded = [value.encode() if isinstance(value, str) else value for value in values]
        return b"".join(struct.pack("!i", len(value)) + value for value in encoded)

    end = struct.pack("!i", -1)
    chunks = [b"I"]
    for identity, headers, fields in batch:
        chunks += [pack(identity), *(pack(*pair) for pair in headers.items()), end]
        chunks += [*(pack(name, kind, value) for name, value, kind in fields), end]
    return b"".join([*chunks, end])


class Wire:
    """A connection that gives its bytes in pieces of some sizes, and counts the reads."""

    def __init__(self, content: bytes, sizes: Sequence[int] = (1 << 16,)) -> None:
        self._content = memoryview(content)
        self._sizes = sizes
        self.reads = 0

    def recv(self, most: int) -> bytes:
        most = min(most, self._sizes[self.reads % len(self._sizes)])
        self.reads += 1
        piece, self._content = bytes(self._content[:most]), self._content[most:]
        return piece

    def recv_into(self, view: memoryview) -> int:
        piece = self.recv(len(view))
        view[: len(piece)] = piece
        return len(piece)

    @property
    def left(self) -> int:
        return len(self._content)


def read_as_torchserve(content: bytes) -> list[tuple[str, str, bool, list[Field]]]:
    """Read a batch with TorchServe's own code; values stay bytes."""
    from ts.protocol.otf_message_handler import retrieve_msg

    found = []
    for request in retrieve_msg(Wire(content))[1]:
        headers = {h["name"].decode().lower(): h["value"].decode() for h in request["headers"]}
        fields = [(p["name"], bytes(p["value"]), p["contentType"]) for p in request["parameters"]]
        explain = headers.get("explain") == "True"
        found.append((request["requestId"].decode(), headers.get("accept", ""), explain, fields))
    return found


def read(handlers: Import, wire: Wire) -> list[tuple[str, str, bool, list[Field]]]:
    batch = handlers("fast_worker").BatchReader(wire).read()
    return [
        (i.id, i.accept, i.is_explanation, [(n, bytes(v), kind) for n, v, kind in i.row])
        for i in batch
    ]


PLAIN: Request = ("id-1", {"Accept": "text/html", "Host": "h"}, [("body", b"\x00\xff", "a/b")])
BATCHES: dict[str, Sequence[Request]] = {
    "none": [],
    "one": [PLAIN],
    "eight": [(f"id-{n}", {}, [("body", bytes([n]), "")]) for n in range(8)],
    "no headers, no fields": [("id", {}, [])],
    "empty value": [("id", {"accept": ""}, [("body", b"", "")])],
    "a form": [("id", {}, [("a", b"1", "image/png"), ("b", b"2", ""), ("a", b"3", "")])],
    "beyond ASCII": [("ïd", {"Accept": "ü"}, [("ñ", b"\xff\xff\xff\xff", "é")])],
    "explain": [("id", {"explain": "True"}, [("body", b"1", "")])],
    "a value of ends": [("id", {}, [("body", b"\xff" * 99, "")]), PLAIN],
    "long headers": [("id", {f"h{n}": "v" * 300 for n in range(30)}, [("body", b"1", "")]), PLAIN],
    "header of 255 bytes": [("id", {"h" * 255: "v" * 65535}, [("body", b"1", "")]), PLAIN],
    "a large value": [("id", {}, [("body", random.Random(0).randbytes(700_000), "")]), PLAIN],
    "large values": [(f"{n}", {}, [("body", bytes([n]) * 300_000, "")]) for n in range(4)],
}


@pytest.mark.parametrize("sizes", [(1 << 20,), (1,), (3, 1, 4097), (100_000,)])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_read_as_torchserve_reads_it_however_it_arrives(
    handlers: Import, name: str, sizes: Sequence[int]
) -> None:
    content = encode(BATCHES[name])
    if len(content) > 100_000 and sizes[0] < 10:
        content = encode([PLAIN])  # a byte at a time would take long
    wire = Wire(content, sizes)
    assert read(handlers, wire) == read_as_torchserve(content)
    assert wire.left == 0


@pytest.mark.parametrize("offset", range(-6, 7))
def test_a_value_that_just_fits_the_buffer_or_does_not_is_read(
    handlers: Import, offset: int
) -> None:
    size = handlers("fast_worker").BUFFER_BYTES + offset
    batch = [("id", {}, [("body", bytes(size), "x/y"), ("b", b"2", "")]), PLAIN]
    content = encode(batch)
    assert read(handlers, Wire(content, (65_536, 1, 7))) == read_as_torchserve(content)


TEXT = st.text(max_size=12)
REQUESTS = st.tuples(
    TEXT,
    st.dictionaries(TEXT | st.just("accept"), TEXT, max_size=3),
    st.lists(
        st.tuples(
            TEXT,
            st.binary(max_size=300) | st.integers(0, 400_000).map(bytes),
            st.sampled_from(["", "a/b", "image/png"]),
        ),
        max_size=3,
    ),
)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.lists(REQUESTS, max_size=5),
    sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=5).map(lambda s: [*s, 50_000]),
)
def test_whatever_a_batch_holds_it_is_read_as_torchserve_reads_it(
    handlers: Import, batch: list[Request], sizes: list[int]
) -> None:
    content = encode(batch)
    assert read(handlers, Wire(content, sizes)) == read_as_torchserve(content)


def read_header_ids(handlers: Import, *requests: Request) -> list[str]:
    batch = handlers("fast_worker").BatchReader(Wire(encode(requests))).read()
    return [incoming.header_id for incoming in batch]


def test_the_id_of_a_request_is_read_and_the_other_headers_are_as_they_are(
    handlers: Import,
) -> None:
    headers = {"Accept": "a/b", "X-Request-ID": "f00", "explain": "True"}
    batch = [("id", headers, []), ("id", {"x-request-id": "bar", "accept": "c/d"}, []), PLAIN]
    content = encode(batch)
    assert read_header_ids(handlers, *batch) == ["f00", "bar", ""]
    assert read(handlers, Wire(content)) == read_as_torchserve(content)


def test_requests_that_differ_in_their_id_alone_are_found_in_the_cache(handlers: Import) -> None:
    module = handlers("fast_worker")
    module._read_headers.cache_clear()
    names = {"Host": "localhost", "X-Request-ID": "", "accept": "*/*", "User-Agent": "x"}
    batch: list[Any] = [("id", {**names, "X-Request-ID": f"{n:032x}"}, []) for n in range(50)]
    assert read_header_ids(handlers, *batch) == [f"{n:032x}" for n in range(50)]
    info = module._read_headers.cache_info()
    assert (info.misses, info.hits) == (1, 49)


@pytest.mark.parametrize(
    "header", ["", "a" * 129, "a\nb", "a\0b", "\x7f", "é", "\x1b[31m", "\u2028", " "]
)
def test_an_id_that_cannot_be_kept_is_none(handlers: Import, header: str) -> None:
    assert read_header_ids(handlers, ("id", {"X-Request-ID": header}, [])) == [""]


def test_an_id_of_128_characters_is_kept(handlers: Import) -> None:
    assert read_header_ids(handlers, ("id", {"x-request-id": "~" * 128}, [])) == ["~" * 128]


@pytest.mark.parametrize(
    "value",
    [
        "\0\0\0\x0cx-request-id",
        "\0\0\0\x0cX-Request-ID\0\0\0\3abc",
        "1234\0\0\0\x0cx-request-id\x7fzzz",
        "\0\0\0\0\0\0\0\x0cx-request-id\0\0\0\1a",
    ],
)
def test_a_header_that_looks_like_an_id_inside_is_read_as_torchserve_reads_it(
    handlers: Import, value: str
) -> None:
    for headers in (
        {"h": value, "accept": "a/b"},
        {"accept": "a/b", "x": value},
        {value: "x", "explain": "True"},
        {"X-Request-ID": "real", "h": value},
    ):
        batch = [("id", headers, [("body", b"1", "")])]
        content = encode(batch)
        assert read(handlers, Wire(content)) == read_as_torchserve(content)
        assert read_header_ids(handlers, *batch) in (["real"], [""])


@settings(max_examples=200, deadline=None)
@given(
    headers=st.dictionaries(
        TEXT | st.sampled_from(["accept", "X-Request-ID", "\0\0\0\x0cx-request-id"]),
        TEXT | st.sampled_from(["\0\0\0\x0cx-request-id\0\0\0\1a", "\0\0\0\x0cX-REQUEST-ID"]),
        max_size=4,
    )
)
def test_whatever_headers_hold_they_are_read_as_torchserve_reads_them(
    handlers: Import, headers: dict[str, str]
) -> None:
    content = encode([("id", headers, [])])
    assert read(handlers, Wire(content)) == read_as_torchserve(content)


def test_both_ways_log_a_request_under_the_same_id(
    handlers: Import, start: Callable[..., Any], tmp_path: Path
) -> None:
    handler = start(
        handlers("tensor").TensorHandler,
        Double(),
        inputs=[{"name": "x", "shape": [2], "datatype": "FP32"}],
        prediction_log={"folder": str(tmp_path / "log"), "share": 100},
    )
    content = encode([ask(b"[1, 2]", **{"X-Request-ID": "the-id"}), ask(b"[1, 2]")])
    answer_fast(handlers, handler, content)
    answer_as_torchserve(handler, content)
    handler.prediction_log.close()
    (path,) = (tmp_path / "log/spool").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request"] for line in lines] == ["the-id", "id"] * 2
    assert len({line["digest"] for line in lines}) == 1


def test_a_small_batch_costs_one_read(handlers: Import) -> None:
    wire = Wire(encode(BATCHES["eight"]))
    read(handlers, wire)
    assert wire.reads == 1


def test_one_reader_reads_batch_after_batch(handlers: Import) -> None:
    class Lane(Wire):
        """Like the frontend, which sends the next batch when it has the answer."""

        def __init__(self, batches: list[bytes]) -> None:
            self.batches = batches
            super().__init__(b"")

        def recv(self, most: int) -> bytes:
            if not self.left:
                super().__init__(self.batches.pop(0))
            return super().recv(most)

    names = ["one", "a large value", "none", "eight", "long headers", "one"]
    reader = handlers("fast_worker").BatchReader(Lane([encode(BATCHES[name]) for name in names]))
    kept = [reader.read() for _ in names]
    for batch, name in zip(kept, names, strict=True):
        values = [[value for _, value, _ in incoming.row] for incoming in batch]
        assert values == [[value for _, value, _ in fields] for _, _, fields in BATCHES[name]]


@pytest.mark.parametrize("length", [0, 1, 20, 60])
def test_a_frontend_that_goes_ends_the_worker_in_order(handlers: Import, length: int) -> None:
    reader = handlers("fast_worker").BatchReader(Wire(encode([PLAIN])[:length]))
    with pytest.raises(SystemExit) as caught:
        reader.read()
    assert caught.value.code == 0


def test_what_is_no_batch_is_told(handlers: Import) -> None:
    reader = handlers("fast_worker").BatchReader
    with pytest.raises(ValueError, match="found command 76"):
        reader(Wire(b"L\0\0\0\1m")).read()
    with pytest.raises(ValueError, match="found no end"):
        reader(Wire(b"I\0\0\0\1i" + bytes(200_000))).read()


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def handler(handlers: Import, start: Callable[..., Any]) -> Any:
    inputs = [{"name": "x", "shape": [2], "datatype": "FP32"}]
    return start(handlers("tensor").TensorHandler, Double(), inputs=inputs)


def answer_as_torchserve(handler: Any, content: bytes) -> bytes:
    """Answer a batch by TorchServe's own code around the handler."""
    from ts.context import Context
    from ts.protocol.otf_message_handler import create_predict_response, retrieve_msg
    from ts.service import Service

    context = Context("m", "", {}, 8, None, "0.12.0")
    batch = retrieve_msg(Wire(content))[1]
    context.request_processor, rows, ids = Service.retrieve_data_for_inference(batch)
    context.request_ids = ids
    answers = handler.handle(rows, context)
    return bytes(create_predict_response(answers, ids, "Prediction success", 200, context=context))


def answer_fast(handlers: Import, handler: Any, content: bytes) -> bytes:
    module = handlers("fast_worker")
    batch = module.BatchReader(Wire(content)).read()
    replies: bytes = module.write_replies(batch, handler.answer(batch))
    return replies


def ask(body: bytes, kind: str = JSON, accept: str = "*/*", **headers: str) -> Request:
    named = {"Content-Type": kind, "accept": accept, **headers}
    return ("id", named, [("body", body, kind)])


def form(*fields: Field) -> Request:
    return ("id", {"content-type": "multipart/form-data; boundary=x"}, fields)


ALIKE: dict[str, Request] = {
    "JSON": ask(b"[1, 2]"),
    "JSON with a charset": ask(b"[1, 2]", "application/json; charset=utf-8"),
    "npy asked for": ask(b"[1, 2]", accept="application/x-npy"),
    "raw asked for": ask(b"[1, 2]", accept="application/octet-stream"),
    "nothing of ours asked for": ask(b"[1, 2]", accept="text/html"),
    "instances": ask(b'{"instances": [[1, 2]]}'),
    "v2": ask(b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'),
    "explain": ask(b"[1, 2]", explain="True"),
    "no JSON": ask(b"[1, 2"),
    "no UTF-8": ask(b'["\xff"]'),
    "deep JSON": ask(b"[" * 100_000),
    "empty JSON": ask(b""),
    "empty": ask(b"", ""),
    "no npy": ask(b"abc", "application/octet-stream"),
    "text": ask(b"YWJj", "text/plain"),
    "text beyond ASCII": ask("é".encode(), "text/plain; charset=utf-8"),
    "text that is no UTF-8": ask(b"\xff", "text/plain"),
    "empty text": ask(b"", "text/plain"),
    "another shape": ask(b"[1, 2, 3]"),
    "no fields": ("id", {}, []),
    "a form": form(("a", b"abc", "image/png"), ("b", b"def", "")),
    "JSON in a form": form(("a", b"[1, 2]", JSON), ("b", b"[3, 4]", JSON)),
    "text in a form": form(("a", b"YWJj", "text/plain"), ("b", b"[3, 4]", JSON)),
    "one part of a form": form(("x", b"[1, 2]", JSON)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_short_way_gives_byte_for_byte_what_torchserves_way_gives(
    handlers: Import, handler: Any, name: str
) -> None:
    content = encode([ALIKE[name]])
    assert answer_fast(handlers, handler, content) == answer_as_torchserve(handler, content)


def test_a_batch_of_them_all_is_answered_alike(handlers: Import, handler: Any) -> None:
    batch = [(f"id-{number}", *ALIKE[name][1:]) for number, name in enumerate(ALIKE)]
    content = encode(batch)
    fast = answer_fast(handlers, handler, content)
    assert fast == answer_as_torchserve(handler, content)
    assert fast.count(b"\0\0\0\xc8") >= 5  # 200s


def test_failures_are_answered_alike_but_for_their_ids(
    handlers: Import, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "make_answer", lambda output: {}[output])
    monkeypatch.setattr(handlers("batch_handler").uuid, "uuid4", lambda: "the-id")
    content = encode([ask(b"[1, 2]")])
    fast = answer_fast(handlers, handler, content)
    assert b"urn:uuid:the-id" in fast
    assert fast == answer_as_torchserve(handler, content)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The main module of a worker, and TorchServe's service as it was before."""
    from ts.service import Service

    main = SimpleNamespace(TorchModelServiceWorker=object, retrieve_msg=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(Service, "set_cl_socket", Service.set_cl_socket)
    return main


def serve(handler: Any, entry_point: Any, wire: Wire) -> Any:
    """Return the service of a loaded model whose connection has been set."""
    from ts.service import Service

    service = Service("m", "", None, entry_point, None, 8)
    service.set_cl_socket(wire)
    return service


def test_a_worker_of_the_known_torchserve_takes_the_short_way(
    handlers: Import, handler: Any, worker: SimpleNamespace
) -> None:
    assert handlers("fast_worker").install(handler)
    service = serve(handler, handler.handle, Wire(encode([ask(b"[1, 2]")])))
    command, batch = worker.retrieve_msg(None)
    assert command == b"I"
    assert service.predict(batch).endswith(b"[2.0,4.0]\xff\xff\xff\xff")


def test_an_envelope_keeps_torchserves_way(
    handlers: Import, handler: Any, worker: SimpleNamespace
) -> None:
    assert handlers("fast_worker").install(handler)
    service = serve(handler, lambda data, context: data, Wire(b""))
    assert worker.retrieve_msg is None
    assert service.predict.__func__ is type(service).predict


def test_another_torchserve_keeps_its_way_and_the_log_says_so(
    handlers: Import,
    handler: Any,
    worker: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = handlers("fast_worker")
    monkeypatch.setitem(module.KNOWN, "service", "0" * 64)
    monkeypatch.setitem(module.KNOWN, "absent", "0" * 64)
    assert not module.install(handler)
    serve(handler, handler.handle, Wire(b""))
    assert worker.retrieve_msg is None
    (record,) = caplog.records
    assert record.getMessage() == (
        "fast_worker is off: not TorchServe 0.12.0's own: absent, service"
    )


def test_outside_a_worker_nothing_changes_and_nothing_is_said(
    handlers: Import, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert not handlers("fast_worker").install(handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "settings", "installed"),
    [
        ({}, {}, True),
        ({}, {"fast_worker": False}, False),
        ({"handle": lambda self, data, context: []}, {}, False),
    ],
)
def test_a_handler_asks_for_it_unless_told_not_to_or_with_a_handle_of_its_own(
    handlers: Import,
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    settings: dict[str, Any],
    installed: bool,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(handlers("fast_worker"), "install", asked.append)
    kind = type("Own", (handlers("tensor").TensorHandler,), changes)
    handler = start(kind, Double(), **settings)
    assert asked == ([handler] if installed else [])


def test_the_files_known_are_those_of_the_torchserve_tested(handlers: Import) -> None:
    import ts

    module = handlers("fast_worker")
    assert ts.__version__.startswith("0.12.")
    assert {name: module._digest(name) for name in module.KNOWN} == module.KNOWN


def test_a_reply_to_no_requests_is_a_reply(handlers: Import) -> None:
    from ts.protocol.otf_message_handler import create_predict_response

    expected = create_predict_response([], {}, "Prediction success", 200)
    assert handlers("fast_worker").write_replies([], []) == expected


def test_answers_are_json_of_the_same_numbers(handlers: Import, handler: Any) -> None:
    content = encode([ask(b"[0.1, 1e-7]")])
    body = answer_fast(handlers, handler, content).split(b"application/json")[-1]
    values = json.loads(body[body.index(b"[") : body.index(b"]") + 1])
    assert values == pytest.approx([0.2, 2e-7])
