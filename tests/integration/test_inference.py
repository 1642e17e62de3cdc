from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from marwright.archive import Run
from marwright.errors import InputRejectedError, ModelNotFoundError
from marwright.server import TorchServe


def test_every_sample_is_answered_as_recorded(server: TorchServe, run: Run) -> None:
    for sample in run.samples:
        top = server.client.predict("cnn", sample.path).json()
        label, probability = next(iter(top.items()))
        assert label == sample.prediction
        assert probability == pytest.approx(sample.probability, abs=1e-4)


def test_body_multipart_and_json_give_one_answer(server: TorchServe, scan: bytes) -> None:
    client = server.client
    as_json = {"data": base64.b64encode(scan).decode()}
    body = client.predict("cnn", scan)
    assert client.predict_parts("cnn", {"data": scan}).json() == body.json()
    assert client.predict("cnn", as_json).json() == body.json()
    assert body.content_type == "application/json"
    assert body.request_id


def test_32_at_once_are_each_answered_as_alone(server: TorchServe, run: Run) -> None:
    paths = [sample.path for sample in run.samples] * 4
    alone = {path: server.client.predict("cnn", path).json() for path in set(paths)}
    with ThreadPoolExecutor(32) as pool:
        together = list(
            pool.map(lambda path: server.client.predict("cnn", path).json(), paths[:32])
        )
    for path, answer in zip(paths[:32], together, strict=True):
        assert answer == pytest.approx(alone[path], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("empty", 400),
        ("truncated", 400),
        ("text", 415),
        ("huge", 413),
        ("no base64", 400),
        ("no data", 400),
    ],
)
def test_a_bad_input_gets_its_own_status_and_a_reason(
    server: TorchServe, encode: Callable[..., bytes], name: str, status: int
) -> None:
    inputs: dict[str, bytes | dict[str, str]] = {
        "empty": b"",
        "truncated": encode((64, 64))[:-40],
        "text": b"this is no picture",
        "huge": encode((20_000, 20_000), mode="1"),
        "no base64": {"data": "%%%"},
        "no data": {"picture": "x"},
    }
    with pytest.raises(InputRejectedError) as caught:
        server.client.predict("cnn", inputs[name])
    assert caught.value.status == status
    assert "expected" in str(caught.value)


def test_neighbours_of_a_bad_input_are_answered_as_without_it(
    server: TorchServe, scan: bytes
) -> None:
    alone = server.client.predict("cnn", scan).json()

    def send(body: bytes) -> object:
        try:
            return server.client.predict("cnn", body).json()
        except InputRejectedError as exc:
            return exc.status

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, [scan, b"no picture"] * 16))
    assert answers[1::2] == [415] * 16
    for answer in answers[0::2]:
        assert answer == pytest.approx(alone, abs=1e-5)


def test_an_unknown_model_and_version_are_named(server: TorchServe, scan: bytes) -> None:
    with pytest.raises(ModelNotFoundError, match="nobody"):
        server.client.predict("nobody", scan)
    with pytest.raises(ModelNotFoundError, match=r"9\.9"):
        server.client.predict("cnn", scan, version="9.9")


def test_the_server_is_healthy(server: TorchServe) -> None:
    assert server.client.health().healthy
