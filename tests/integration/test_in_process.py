"""The model in this process answers what a booted TorchServe answers, byte for byte."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from marwright.archive import Run
from marwright.archive.worker import Answer, Model, Part, Request
from marwright.client.tokens import TokenFile
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

# What it does is said by a header, so that one worker serves every case.
ZOO = """
import base64, json, sys, torch
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

class Zoo:
    def initialize(self, context):
        self.calls = 0

    def handle(self, data, context):
        self.calls += 1
        self.data, self.context = data, context
        header = context.get_request_header
        return getattr(self, header(0, "do"))(json.loads(header(0, "with") or "null"))

    def show_row(self, _):
        def show(value):
            return value.hex() if isinstance(value, bytearray) else value
        return [{key: [type(value).__name__, show(value)] for key, value in self.data[0].items()}]

    def show_headers(self, names):
        return [[self.context.get_request_header(0, name) for name in names]]

    def show_context(self, _):
        import os
        context, system = self.context, dict(self.context.system_properties)
        here = os.path.samefile(os.getcwd(), system.pop("model_dir"))
        return [[here, system, context.model_name, context.manifest, context.model_yaml_config]]

    def count_calls(self, _): return [self.calls]
    def value(self, value): return [value]
    def many(self, count): return [bytes(count)]
    def values(self, values): return values
    def as_tuple(self, values): return tuple(values)
    def raw(self, text): return [bytearray(text, "latin-1")]
    def tensor(self, values): return [torch.tensor(values)]
    def a_set(self, _): return [{1, 2}]
    def a_loop(self, _):
        loop = {}
        loop["loop"] = loop
        return [loop]

    def header(self, pair):
        self.context.set_response_header(0, *pair)
        return ["x"]

    def content_type(self, value):
        self.context.set_response_content_type(0, value)
        return ["x"]

    def status(self, pair):
        self.context.set_response_status(*pair, 0)
        return ["x"]

    def refuse(self, pair): raise PredictionException(*pair)
    def fail(self, text): raise ValueError(text)
    def fill_memory(self, _): raise MemoryError("all of it")
    def fill_gpu(self, _): raise RuntimeError("CUDA out of memory")
    def leave(self, status): sys.exit(status)

    def stream(self, words):
        self.context.set_response_content_type(0, "text/plain")
        for word in words[:-1]:
            send_intermediate_predict_response(
                [word], self.context.request_ids, "Intermediate", 200, self.context)
        return words[-1:]
"""
FUNCTION = """
def handle(data, context):
    if data is None:
        return None
    return [{"module": __name__, "rows": len(data)}]

def other(data, context):
    return None if data is None else ["the other one"]
"""

Ask = Callable[[str, Request], Answer]


@pytest.fixture(scope="module")
def ask(server: TorchServe) -> Iterator[Ask]:
    """Return a function that sends a request to the booted server."""
    key_file = server.endpoint.key_file
    assert key_file is not None
    tokens = TokenFile(key_file)
    with requests.Session() as session:
        session.trust_env = False

        def send(model: str, request: Request) -> Answer:
            root = "explanations" if request.is_explanation else "predictions"
            kind = {"Content-Type": request.content_type} if request.content_type else {}
            bearer = {"Authorization": f"Bearer {tokens.read('inference')}"}
            response = session.post(
                f"{server.endpoint.inference_url}/{root}/{model}",
                headers={**request.headers, **kind, **bearer},
                data=_read(request.body) if not request.parts else None,
                files=[_encode(part) for part in request.parts] or None,
                timeout=60,
            )
            headers = {name.lower(): value for name, value in response.headers.items()}
            headers.pop("x-request-id", None)
            headers.pop("retry-after", None)  # the door's, not TorchServe's
            return Answer(
                status=response.status_code,
                phrase=response.raw.reason or "",
                content_type=headers.get("content-type", ""),
                headers=headers,
                body=response.content,
            )

        yield send


def _read(value: Path | bytes | str) -> bytes:
    assert not isinstance(value, Path)
    return value.encode() if isinstance(value, str) else value


def _encode(part: Part) -> tuple[str, tuple[str | None, bytes, str]]:
    filename = None if part.content_type is None else "file"
    return part.name, (filename, _read(part.value), part.content_type or "")


@pytest.fixture(scope="module")
def pack(server: TorchServe, store: Path) -> Iterator[Callable[[str, str, str], Path]]:
    """Return a function that writes an archive of one source file and registers it."""
    names = []

    def write(name: str, handler: str, source: str) -> Path:
        path = store / f"{name}.mar"
        manifest = {"runtime": "python", "model": {"modelName": name, "handler": handler}}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(handler.split(":")[0], source)
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        register(server.client, path)
        names.append(name)
        return path

    yield write
    for name in names:
        server.client.models.unregister(name, "1.0")
        (store / f"{name}.mar").unlink()


@pytest.fixture(scope="module")
def zoo(pack: Callable[[str, str, str], Path]) -> Iterator[Model]:
    """The zoo, registered at the server and loaded here."""
    with Model(pack("zoo", "zoo.py", ZOO)) as model:
        yield model


def do(method: str, argument: object = None, **options: object) -> Request:
    """Return a request that calls a method of the zoo."""
    headers = {"do": method, "with": json.dumps(argument)}
    return Request(headers=headers, **options)  # type: ignore[arg-type]  # dataclass fields


ANSWERS = {
    "text": do("value", "héllo"),
    "nothing": do("value", ""),
    "dict": do("value", {"a": [1, 2.5, None], "ü": True}),
    "list": do("value", [1, {"x": [2]}]),
    "number": do("value", 3.14),
    "null": do("value", None),
    "bytes": do("raw", "\x00\xff\x80"),
    "tensor": do("tensor", [[1.0, 2.0], [3.0, 4.0]]),
    "header": do("header", ["X-Made-By", "zoo"]),
    "header that the frontend overrides": do("header", ["Cache-Control", "max-age=5"]),
    "header beyond ASCII": do("header", ["X-Name", "üł"]),
    "header with a folded line": do("header", ["X-Name", "a\r\n b"]),
    "content type": do("content_type", "image/png"),
    "content type as a header": do("header", ["Content-Type", "image/gif"]),
    "empty content type": do("content_type", ""),
    "status": do("status", [418, "I am a teapot"]),
    "status without a phrase": do("status", [404, ""]),
    "status without a body": do("status", [204, "No Content"]),
    "status 205": do("status", [205, "Reset Content"]),
    "status 304": do("status", [304, "Not Modified"]),
    "stream": do("stream", ["one ", "two ", "three"]),
    "exception": do("fail", "no luck"),
    "refusal": do("refuse", ["not today", 429]),
    "refusal with odd letters": do("refuse", ['<ü> & "x"\n\u2028', 500]),
    "refusal with an unknown status": do("refuse", ["m", 444]),
    "refusal with a renamed status": do("refuse", ["m", 422]),
    "refusal with 413": do("refuse", ["too much", 413]),
    "refusal with 200": do("refuse", ["fine", 200]),
    "memory": do("fill_memory"),
    "GPU memory": do("fill_gpu"),
    "too few": do("values", []),
    "too many": do("values", ["a", "b"]),
    "text instead of a list": do("values", "a"),
    "tuple": do("as_tuple", ["a"]),
    "null instead of a list": do("values", None),
    "set": do("a_set"),
    "context": do("show_context"),
}
PNG = b"\x89PNG\r\n\x1a\n\x00&a=b%zz=\xff"
FORM = "application/x-www-form-urlencoded"
INPUTS = {
    "raw": do("show_row", body=PNG),
    "picture": do("show_row", body=PNG, content_type="image/png"),
    "empty": do("show_row"),
    "JSON": do("show_row", body=b'{"a": 1}', content_type="application/json"),
    "JSON with a charset": do("show_row", body=b"[1]", content_type="application/json; charset=u"),
    "JSON in capitals": do("show_row", body=b"[1]", content_type="Application/JSON"),
    "JSON that is none": do("show_row", body=b'{"a": ', content_type="application/json"),
    "text": do("show_row", body="hé".encode(), content_type="text/plain"),
    "text that is no UTF-8": do("show_row", body=b"h\xe9", content_type="text/plain"),
    "form": do("show_row", body=b"a=1&b=x%20y+z&a=2&c=&d&e", content_type=FORM),
    "form beyond ASCII": do("show_row", body=b"%C3%A9=%ff&\xff=\xff", content_type=FORM),
    "form with lines": do("show_row", body=b" a =1\r\nb=2", content_type=FORM),
    "form with a broken line": do("show_row", body=b"a=1\rb", content_type=FORM),
    "form with a broken name": do("show_row", body=b"x%zz=1", content_type=FORM),
    "form with a broken value": do("show_row", body=b"a=12%4", content_type=FORM),
    "form without a name": do("show_row", body=b"a=1&=2", content_type=FORM),
    "form that is a picture": do("show_row", body=PNG, content_type=FORM),
    "form that is JSON": do("show_row", body=b'{"data": "abc"}', content_type=FORM),
    "parts": do(
        "show_row",
        parts=(
            Part("data", PNG, "image/png"),
            Part("note", "hé"),
            Part("json", b'{"a": 1}', "application/json; charset=utf-8"),
            Part("text", b"h", "text/plain"),
            Part("note", "again"),
        ),
    ),
    "headers": do(
        "show_headers",
        ["body", "Content-Type", "Content-Length", "X-Own", "x-own", "explain", "url_path"],
        body=b"abc",
        content_type="a/b; c=d",
    ),
    "headers of parts": do(
        "show_headers",
        ["a", "b", "c"],
        parts=(Part("a", b"1", "image/png; x=y"), Part("b", b"2"), Part("c", b"3", "a/b")),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_kind_of_answer_is_the_servers(zoo: Model, ask: Ask, name: str) -> None:
    assert zoo.predict([ANSWERS[name]]) == [ask("zoo", ANSWERS[name])]


@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_input_reaches_the_handler_alike(zoo: Model, ask: Ask, name: str) -> None:
    assert zoo.predict([INPUTS[name]]) == [ask("zoo", INPUTS[name])]


@pytest.mark.parametrize("size", [6_553_500, 6_553_501])
def test_a_request_may_be_as_large_as_at_the_server(zoo: Model, ask: Ask, size: int) -> None:
    request = do("value", "x", body=bytes(size))
    assert zoo.predict([request]) == [ask("zoo", request)]


def test_query_parameters_do_not_reach_a_handler(ask: Ask, zoo: Model, server: TorchServe) -> None:
    request = do("show_row", body=b"x")
    assert ask("zoo?a=1&body=2", request) == zoo.predict([request])[0]


DEATHS = {
    "SystemExit": do("leave", 3),
    "a circle in JSON": do("a_loop"),
    "a header's value that is no text": do("header", ["X", 5]),
    "a header with a line feed": do("header", ["X", "a\nb"]),
    "more than max_response_size": do("many", 6_553_501),
}
FIRST, *OTHERS = DEATHS


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_what_kills_a_worker_is_answered_alike(zoo: Model, ask: Ask, name: str) -> None:
    assert zoo.predict([DEATHS[name]]) == [ask("zoo", DEATHS[name])]
    # A new worker counts anew.
    again = do("count_calls")
    assert zoo.predict([again]) == [ask("zoo", again)]


@pytest.mark.parametrize("handler", ["tell.py", "tell.py:other"])
def test_functions_are_entry_points(
    pack: Callable[[str, str, str], Path], ask: Ask, handler: str
) -> None:
    name = handler.replace(":", "-").replace(".", "-")
    with Model(pack(name, handler, FUNCTION)) as model:
        assert model.predict([b"x"]) == [ask(name, Request(b"x"))]


@pytest.fixture(scope="module")
def cnn(store: Path, server: TorchServe) -> Iterator[Model]:
    with Model(store / "cnn.mar") as model:
        yield model


def test_every_sample_is_answered_byte_for_byte(cnn: Model, ask: Ask, run: Run) -> None:
    for sample in run.samples:
        assert cnn.predict([sample.path]) == [ask("cnn", Request(sample.path.read_bytes()))]


def test_explanations_are_byte_for_byte_a_servers(cnn: Model, ask: Ask, scan: bytes) -> None:
    text = base64.b64encode(scan).decode()
    for method in ("saliency", "nonsense"):
        body = json.dumps({"data": text, "method": method})
        request = Request(body, content_type="application/json", is_explanation=True)
        (answer,) = cnn.predict([request])
        assert answer == ask("cnn", request)
        assert answer.status == (200 if method == "saliency" else 422)


def test_broken_inputs_are_answered_byte_for_byte(
    cnn: Model, ask: Ask, scan: bytes, encode: Callable[..., bytes]
) -> None:
    text = base64.b64encode(scan).decode()
    inputs = [
        Request(b""),
        Request(scan[:-40]),
        Request(b"this is no picture", content_type="image/png"),
        Request(encode((20_000, 20_000), mode="1")),
        Request(json.dumps({"data": text}), content_type="application/json"),
        Request(json.dumps({"data": "%%%"}), content_type="application/json"),
        Request(json.dumps({"picture": text}), content_type="application/json"),
        Request(json.dumps([text]), content_type="application/json"),
        Request(text, content_type="text/plain"),
        Request(parts=(Part("data", scan, "image/png"),)),
        Request(parts=(Part("one", scan), Part("two", scan))),
    ]
    for item in inputs:
        assert cnn.predict([item]) == [ask("cnn", item)]


def test_a_batch_is_answered_as_one_after_the_other(cnn: Model, ask: Ask, run: Run) -> None:
    paths = [sample.path for sample in run.samples][:4]
    together = cnn.predict([paths[0], b"no picture", *paths[1:]])
    assert together[1] == ask("cnn", Request(b"no picture"))
    for answer, path in zip([together[0], *together[2:]], paths, strict=True):
        assert answer.json() == pytest.approx(cnn.predict([path])[0].json(), abs=1e-5)
