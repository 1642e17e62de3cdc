"""One bad request in a batch of a real TorchServe, and whatever bytes a client may send.

1,000 requests of random bytes by default. More of them:

    MARWRIGHT_FUZZ=20000 .venv/bin/python -m pytest tests/integration/test_poison.py -k whatever
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from marwright.client.tokens import TokenFile
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

CASES = int(os.environ.get("MARWRIGHT_FUZZ", "1000"))
BATCH = 8
JSON, PNG, NPY = "application/json", "image/png", "application/x-npy"


class Affine(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1e6).any()):
            raise RuntimeError("too hot")
        return x * 2 + 1


class Colour(torch.nn.Module):
    """Tells red, green and blue images apart."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=[2, 3]) * 4


class Bounded(torch.nn.Module):
    """Has an answer for every number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


# Ours, but each answer says which place its request had in its batch.
PLACED = """
from {module} import {kind}

class Placed({kind}):
    def answer(self, incoming):
        responses = super().answer(incoming)
        for place, response in enumerate(responses):
            response.headers["x-place"] = f"{{place}} of {{len(responses)}}"
        return responses
"""
TENSOR = {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32"}], "max_elements": 10_000}
IMAGE = {"image_size": [8, 8], "max_pixels": 1_000_000}
SCHEMA = {"type": ["object", "array"], "properties": {"top": {"type": "integer"}}}


@pytest.fixture(scope="module")
def batches(
    pack_own: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    """A server whose workers wait for 8 requests, and that lets 50 MB through to them."""
    store = tmp_path_factory.mktemp("store")
    waiting = {"batchSize": BATCH, "maxBatchDelay": 5000}
    pack_own(
        "affine",
        "placed_tensor.py",
        Affine(),
        source=PLACED.format(module="tensor", kind="TensorHandler"),
        out=store,
        settings={**waiting, "handler": TENSOR},
        input={"schema": SCHEMA},
    )
    pack_own(
        "colour",
        "placed_image.py",
        Colour(),
        source=PLACED.format(module="image_classifier", kind="ImageClassifier"),
        out=store,
        settings={**waiting, "handler": IMAGE},
        labels=["red", "green", "blue"],
    )
    names = ["affine.mar", "colour.mar"]
    large = {"max_request_size": "60000000"}
    with TorchServe(store, models=names, eager_batches=False, properties=large) as server:
        yield server


class Sent(NamedTuple):
    """A request's body and headers."""

    body: bytes
    kind: str = JSON
    accept: str = "*/*"


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes
    place: str


class Lane:
    """Connections of their own for each place of a batch."""

    def __init__(self, server: TorchServe, count: int = BATCH) -> None:
        assert server.endpoint.key_file is not None
        self._address = urlsplit(server.endpoint.inference_url).netloc
        self._tokens = TokenFile(server.endpoint.key_file)
        self._connections = [http.client.HTTPConnection(self._address) for _ in range(count)]

    def ask(self, path: str, requests: list[Sent], *, pause: float = 0.004) -> list[Answer]:
        """Send requests one after the other, none waiting for an answer; return the answers."""
        pairs = list(zip(self._connections, requests, strict=False))
        for connection, sent in pairs:
            headers = {
                "Authorization": f"Bearer {self._tokens.read('inference')}",
                "Content-Type": sent.kind,
                "Accept": sent.accept,
            }
            connection.request("POST", path, sent.body, headers)
            # So that they queue up in this order; the frontend copies 50 MB for a while.
            time.sleep(pause + len(sent.body) * 5e-9 if pause else 0)
        return [self._receive(connection) for connection, _ in pairs]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    @staticmethod
    def _receive(connection: http.client.HTTPConnection) -> Answer:
        response = connection.getresponse()
        body = response.read()
        header = response.getheader
        return Answer(response.status, header("Content-Type") or "", body, header("x-place") or "")


def find_workers(server: TorchServe, *models: str) -> list[int]:
    """Return the process ids of models' workers, all of them READY."""
    described = [server.client.models.describe(model) for model in models]
    assert all(version.ready for version in described)
    return [worker.pid for version in described for worker in version.workers]


@pytest.fixture(scope="module")
def lane(batches: TorchServe) -> Iterator[Lane]:
    lane = Lane(batches)
    workers = find_workers(batches, "affine", "colour")
    yield lane
    lane.close()
    assert find_workers(batches, "affine", "colour") == workers


def encode_image(colour: tuple[int, int, int], kind: str = "PNG", size: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, format=kind)
    return buffer.getvalue()


def claim_png(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum32 = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum32)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def write_npy(values: Any, dtype: str = "float32") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype), allow_pickle=True)
    return buffer.getvalue()


def write_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def make_v2(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], **changes}
    return write_json({"inputs": [tensor]})


DEEP = b"[" * 100_000 + b"]" * 100_000
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
BIG = bytes(50_000_000)


def encode_noise(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format=kind)
    return buffer.getvalue()


# Model, request, and the status that it alone must get.
BAD: dict[str, tuple[str, Sent, int]] = {
    "empty": ("colour", Sent(b"", PNG), 400),
    "truncated PNG": ("colour", Sent(encode_noise("PNG")[:-2000], PNG), 400),
    "truncated JPEG": ("colour", Sent(encode_noise("JPEG")[:-1000], "image/jpeg"), 400),
    "damaged PNG": ("colour", Sent(encode_noise("PNG").replace(b"IDAT", b"IDxT"), PNG), 400),
    "bomb": ("colour", Sent(claim_png(16_000, 16_000), PNG), 413),
    "50 MB": ("colour", Sent(BIG, PNG), 413),
    "text": ("colour", Sent(b"this is text, whatever its type says", PNG), 415),
    "a format of others": ("colour", Sent(encode_image((1, 2, 3), "TIFF"), "image/tiff"), 415),
    "no base64": ("colour", Sent(b'{"data": "%%%"}'), 400),
    "no JSON": ("colour", Sent(b'{"data": "aGVsbG8='), 400),
    "invalid UTF-8": ("colour", Sent(b'{"data": "\xff\xfe"}'), 400),
    "many items": ("colour", Sent(write_json({"instances": [""] * 65})), 413),
    "deep JSON": ("affine", Sent(DEEP), 400),
    "NaN in npy": ("affine", Sent(write_npy([1, np.nan]), NPY), 422),
    "NaN in JSON": ("affine", Sent(b"[1, NaN]"), 400),
    "infinity": ("affine", Sent(b"[1, 1e39]"), 422),
    "wrong shape": ("affine", Sent(b"[1, 2, 3]"), 422),
    "wrong type": ("affine", Sent(b'["1", "2"]'), 422),
    "ragged lists": ("affine", Sent(b"[[1, 2], [3]]"), 422),
    "truncated npy": ("affine", Sent(write_npy([1, 2])[:-1], NPY), 400),
    "pickled npy": ("affine", Sent(write_npy([{}, {}], "object"), NPY), 415),
    "many numbers": ("affine", Sent(make_v2(shape=[10**9, 2])), 413),
    "another datatype": ("affine", Sent(make_v2(datatype="FP8")), 422),
    "what the schema forbids": ("affine", Sent(b'{"data": [1, 2], "top": "5"}'), 422),
    "what the model fails for": ("affine", Sent(b"[1, 2e6]"), 500),
}
assert len(BAD) == 25


def make_good(model: str, number: int) -> tuple[Sent, Any]:
    """Return a request, unlike those of other numbers, and what its answer must be."""
    if model == "affine":
        return Sent(write_json([number, -number])), [2 * number + 1, 1 - 2 * number]
    colour = (30 * number, 255 - 30 * number, 100)
    scores = torch.softmax(torch.tensor(colour) / 255 * 4, dim=0).tolist()
    return Sent(encode_image(colour), PNG), dict(zip(["red", "green", "blue"], scores, strict=True))


def check_batch(answers: list[Answer], model: str, bad: dict[int, int]) -> None:
    """Check that all but those at some places are right, and that those got their status."""
    for number, answer in enumerate(answers):
        if number in bad:
            assert (answer.status, answer.kind) == (bad[number], "application/problem+json")
            problem = json.loads(answer.body)
            assert problem["status"] == bad[number]
            assert ("instance" in problem) == (bad[number] >= 500)
        else:
            assert (answer.status, answer.kind) == (200, JSON), answer.body
            assert json.loads(answer.body) == pytest.approx(make_good(model, number)[1], abs=1e-5)


@pytest.mark.parametrize("model", ["affine", "colour"])
def test_a_batch_of_good_requests_that_come_slowly_is_answered_right(
    lane: Lane, model: str
) -> None:
    requests = [make_good(model, number)[0] for number in range(BATCH)]
    answers = lane.ask(f"/predictions/{model}", requests, pause=0.04)
    check_batch(answers, model, {})
    assert [answer.place for answer in answers] == [f"{n} of 8" for n in range(BATCH)]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_at_any_place_of_a_batch_is_the_only_one_refused(
    lane: Lane, name: str
) -> None:
    model, sent, status = BAD[name]
    left = set(range(BATCH))
    for _ in range(3 * BATCH):  # the frontend may turn round two that come together
        place = min(left)
        requests = [make_good(model, number)[0] for number in range(BATCH)]
        requests[place] = sent
        answers = lane.ask(f"/predictions/{model}", requests)
        check_batch(answers, model, {place: status})
        assert {answer.place[1:] for answer in answers} == {" of 8"}
        left.discard(int(answers[place].place[0]))
        if not left:
            return
    raise AssertionError(f"no batch had it at {left}")


def test_eight_bad_requests_in_a_batch_get_their_own_status_each(lane: Lane) -> None:
    bad = [(sent, status) for model, sent, status in BAD.values() if model == "affine"]
    for start in (0, len(bad) - BATCH):
        chosen = bad[start : start + BATCH]
        answers = lane.ask("/predictions/affine", [sent for sent, _ in chosen])
        check_batch(answers, "affine", {n: status for n, (_, status) in enumerate(chosen)})


def test_every_batch_held_eight(batches: TorchServe, lane: Lane, read_counters: Any) -> None:
    lane.ask("/predictions/affine", [make_good("affine", n)[0] for n in range(BATCH)])
    time.sleep(5.5)  # counts are handed over within five seconds
    for model in ("affine", "colour"):
        found = read_counters(batches, model)
        count = found["batch_size_count",]
        assert count > 0
        assert found["batch_size_sum",] == BATCH * count
        assert found["batch_size_bucket", "le=8"] == count
        assert ("batch_size_bucket", "le=4") not in found


@pytest.fixture(scope="module")
def fuzzed(server: TorchServe, pack_own: Callable[..., Path]) -> Iterator[Lane]:
    """Connections to a server with `bounded`, a model of tensors, and `cnn`, one of images."""
    handler = {"inputs": [{"name": "x", "shape": [None], "datatype": "FP32"}]}
    register(server.client, pack_own("bounded", "tensor", Bounded(), settings={"handler": handler}))
    lane = Lane(server, 1)
    workers = find_workers(server, "bounded", "cnn")
    yield lane
    lane.close()
    assert find_workers(server, "bounded", "cnn") == workers
    server.client.models.unregister("bounded", "1.0")
    (server.store / "bounded.mar").unlink()


SEEDS = [
    encode_image((9, 9, 9)),
    encode_noise("JPEG"),
    encode_image((9, 9, 9), "GIF"),
    encode_image((9, 9, 9), "BMP"),
    encode_image((9, 9, 9), "WEBP"),
    write_npy([1, 2]),
    write_npy([[1, 2]], ">f8"),
    write_json([1, 2.5]),
    write_json({"data": base64.b64encode(encode_image((9, 9, 9))).decode()}),
    write_json({"instances": [[1, 2], {"x": [1]}, {"b64": "AAAA"}]}),
    write_json({"inputs": {"x": [[1, 2]]}, "signature_name": "s"}),
    make_v2(),
    make_v2(datatype="INT64", parameters={"binary_data": False}),
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n',
]
PATHS = [
    *("/predictions/bounded", "/predictions/cnn", "/predictions/bounded/1.0"),
    *("/v1/models/bounded:predict", "/v1/models/cnn:predict"),
    *("/v2/models/bounded/infer", "/v2/models/cnn/infer"),
]
KINDS = [
    *("", JSON, "Application/JSON; charset=x", PNG, NPY, "text/plain", "text/html; charset=\xff"),
    *("application/octet-stream", "*/*", "multipart", "a/b;" + "c" * 200),
]
ACCEPTS = ["*/*", "", JSON, NPY, "application/octet-stream", "text/html", "image/*;q=0.1,*/*;q=x"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw a good body with some bytes changed, taken out or put in."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 3) | st.integers(0, len(content)))
        content[at : at + gone] = draw(st.binary(max_size=4))
    return bytes(content)


WORDS = st.sampled_from(["instances", "inputs", "name", "shape", "datatype", "data", "x", "id"])
DATATYPES = st.sampled_from(["FP32", "FP64", "INT8", "UINT64", "BOOL", "BYTES"])
TEXT = st.text(max_size=8) | st.sampled_from(["\ud800", "a\udfff"])  # halves of pairs too
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["FP32", "BYTES", "UINT64", 0, -1, 10**30]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner, max_size=6),
    max_leaves=20,
)
SIZES = st.lists(st.sampled_from([0, 1, 2, -1, True, 2**40, 10**30]) | st.integers(), max_size=4)
TENSOR_BODY = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
SKELETONS: list[Any] = [
    [[1, 2], [3, 4]],
    {"data": [1, 2]},
    {"instances": [[1, 2], {"x": [1]}, {"b64": "AAAA"}]},
    {"inputs": {"x": [[1, 2]]}, "signature_name": "s"},
    {"id": "a", "inputs": [TENSOR_BODY], "parameters": {}},
    {"id": "a", "inputs": [{**TENSOR_BODY, "shape": [0, 2], "data": []}]},
    {"inputs": [{**TENSOR_BODY, "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}]},
]


def list_places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value inside."""
    yield ()
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from ((key, *place) for place in list_places(value[key]))


PLACES = [(body, place) for body in SKELETONS for place in list_places(body)]
EMPTY = st.sampled_from([[0, 2**40], [2**31, 0], [0, 10**30, 2], [0, 2**40, 2**40]])
LIKELY: dict[Any, st.SearchStrategy[Any]] = {
    "shape": SIZES | EMPTY,
    "id": TEXT,
    "datatype": DATATYPES,
}


@st.composite
def changed(draw: st.DrawFn) -> Any:
    """Draw a good body with one value in it replaced, at times by one that is nearly right."""
    body, place = draw(st.sampled_from(PLACES))
    likely = LIKELY.get(place[-1]) if place else None
    new = draw(likely if likely is not None and draw(st.booleans()) else VALUES)

    def replace(value: Any, keys: tuple[Any, ...]) -> Any:
        if not keys:
            return new
        copy = value.copy()
        copy[keys[0]] = replace(value[keys[0]], keys[1:])
        return copy

    return replace(body, place)


@st.composite
def claimed(draw: st.DrawFn) -> bytes:
    """Draw npy whose header says anything."""
    dtype = draw(st.sampled_from(["<f4", ">f8", "|u1", "<f16", "|O", "<c8", "<U4", "|b1", "f"]))
    sizes = "".join(f"{size}, " for size in draw(SIZES))
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': ({sizes}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + draw(st.binary())


JSONS = (VALUES | changed()).map(write_json)
BODIES = st.binary(max_size=400) | damaged() | claimed() | JSONS


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(PATHS),
    sent=st.tuples(BODIES, st.sampled_from(KINDS)) | st.tuples(JSONS, st.just(JSON)),
    accept=st.sampled_from(ACCEPTS),
)
def test_whatever_bytes_come_the_answer_is_right_or_the_clients_fault(
    fuzzed: Lane, path: str, sent: tuple[bytes, str], accept: str
) -> None:
    body, kind = sent
    if kind == "multipart":
        boundary = b"--%s\r\n" % (b"b" * 40)
        part = b'Content-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
        body = boundary + part + body.replace(b"b" * 40, b"") + b"\r\n" + boundary[:-2] + b"--\r\n"
        kind = "multipart/form-data; boundary=" + "b" * 40
    (answer,) = fuzzed.ask(path, [Sent(body, kind, accept)], pause=0)
    assert answer.status < 500, answer
    good = answer.status == 200
    assert (answer.kind == "application/problem+json") == (not good), answer
    if not good or answer.kind == JSON:
        json.loads(answer.body)
