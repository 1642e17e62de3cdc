"""The gRPC clients where things go wrong that no real server can be made to do at will."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint
from marwright.client.grpc_async_client import AsyncGrpcClient
from marwright.client.grpc_client import GrpcClient
from marwright.client.grpc_errors import raise_problem, translate_status
from marwright.client.grpc_protocol import read_protocol
from marwright.client.retries import Retries
from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    StorageError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)
from marwright.server.certificate import make_certificate

NAME = "org.pytorch.serve.http.InternalServerException"
FULL = (
    "INTERNAL",
    'Model "cnn" has no worker to serve inference request. Please use\nInternalServerException.()',
)
LOST = ("INTERNAL", f"Worker died.\n{NAME}")
AWAY = ("UNAVAILABLE", "Connection reset by peer")


@pytest.mark.parametrize(("trouble", "tries"), [(FULL, 3), (AWAY, 3), (LOST, 2)])
def test_a_prediction_is_sent_again_so_often(
    ask: Callable[..., Any], fake: Any, trouble: tuple[str, str], tries: int
) -> None:
    fake.replies = [*[trouble] * (tries - 1), b"done"]
    assert ask("predict", "cnn", b"1").body == b"done"
    fake.replies = [trouble]
    with pytest.raises(ClientError):
        ask("predict", "cnn", b"1")
    assert len(fake.asked) == 2 * tries


def test_a_server_that_a_supervisor_keeps_is_waited_for(
    ask: Callable[..., Any], fake: Any, endpoint: Endpoint
) -> None:
    kept = dataclasses.replace(endpoint, health_url="http://127.0.0.1:9")
    fake.replies = [*[AWAY] * 10, b"done"]
    assert ask("predict", "cnn", b"1", point=kept).body == b"done"
    assert len(fake.asked) == 11
    fake.replies = [AWAY]
    impatient = Retries(tries=3, first=0.001, longest=0.001, away=0)
    with pytest.raises(ConnectionFailedError, match="started again, or has gone"):
        ask("predict", "cnn", b"1", point=kept, retries=impatient)
    assert len(fake.asked) == 14


def test_a_change_is_sent_once(ask: Callable[..., Any], fake: Any) -> None:
    fake.replies = [AWAY]
    for method, arguments in (("register", ["a.mar"]), ("unregister", ["cnn", "1.0"])):
        with pytest.raises(ConnectionFailedError):
            ask(f"models.{method}", *arguments)
    assert fake.asked == ["RegisterModel", "UnregisterModel"]


def test_a_handlers_503_is_sent_again(ask: Callable[..., Any], fake: Any) -> None:
    fake.replies = [b'{"title":"Busy","status":503,"detail":"later"}', b"done"]
    assert ask("predict", "cnn", b"1").body == b"done"


def test_a_stream_is_sent_again_only_before_its_first_part(
    ask: Callable[..., Any], fake: Any
) -> None:
    fake.replies = [FULL, b"one", b"two", b"end"]
    assert [answer.body for answer in ask("predict_stream", "cnn", b"1")] == [b"one", b"two"]
    fake.replies = [b"one", AWAY, b"two"]
    fake.asked.clear()
    with pytest.raises(ConnectionFailedError):
        ask("predict_stream", "cnn", b"1")
    assert len(fake.asked) == 2


def test_the_deadline_covers_all_tries(ask: Callable[..., Any], fake: Any) -> None:
    fake.replies = [FULL]
    patient = Retries(tries=1000, first=0.05, longest=0.05)
    started = time.monotonic()
    with pytest.raises((OverloadedError, RequestTimeoutError)):
        ask("predict", "cnn", b"1", retries=patient, timeout=1.0)
    assert time.monotonic() - started < 5
    assert len(fake.asked) > 3


def test_a_deadline_that_the_server_sees_first_is_a_timeout() -> None:
    text = "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"
    for code, kind in (("DEADLINE_EXCEEDED", RequestTimeoutError), ("CANCELLED", AnswerError)):
        assert isinstance(translate_status(code, text, method="Ping", address="h:1"), kind)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("UNKNOWN", ""),
        ("UNAVAILABLE", "Socket closed (Stream 3 in unexpected state HALF_CLOSED_LOCAL)"),
    ],
)
def test_a_model_without_sequences_is_told(code: str, text: str) -> None:
    error = translate_status(code, text, method="StreamPredictions2", address="h:1")
    assert "configured for sequences" in str(error)
    # Whoever else had a call on that connection has lost it, and no more.
    if text:
        other = translate_status(code, text, method="Predictions", address="h:1")
        assert isinstance(other, ConnectionFailedError)


async def pause_between(inputs: list[bytes]) -> AsyncIterator[bytes]:
    """Yield inputs so late that the client knows before the second what became of the first."""
    for data in inputs:
        yield data
        await asyncio.sleep(0.3)


@pytest.mark.parametrize(
    ("end", "kind", "text"),
    [
        (("INTERNAL", "Worker died."), WorkerLostError, "Worker died"),
        (None, ClientError, "sequence of cnn ended before"),
    ],
)
def test_a_sequence_that_the_server_ends_says_why(
    endpoint: Endpoint, fake: Any, end: Any, kind: type[ClientError], text: str
) -> None:
    """Nothing can be written any more, which must not hide the status."""
    fake.replies = [b"one", end]

    async def ask() -> None:
        async with AsyncGrpcClient(endpoint) as client:
            async for _ in client.predict_sequence("cnn", pause_between([b"1", b"2"])):
                pass

    with pytest.raises(kind, match=text):
        asyncio.run(ask())
    fake.replies = [b"one", end]
    with GrpcClient(endpoint) as client, pytest.raises(kind, match=text):
        list(client.predict_sequence("cnn", [b"1", b"2"]))


def test_no_time_is_a_timeout(ask: Callable[..., Any]) -> None:
    with pytest.raises(RequestTimeoutError):
        ask("predict", "cnn", b"1", timeout=0.0)


def test_nobody_at_the_address_is_told(ask: Callable[..., Any], endpoint: Endpoint) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # taken, and nobody listens
        nowhere = dataclasses.replace(
            endpoint, grpc_inference=f"127.0.0.1:{sock.getsockname()[1]}", grpc_management=""
        )
        with pytest.raises(ConnectionFailedError, match="no gRPC server answers at 127"):
            ask("health", point=nowhere)
        with pytest.raises(UsageError, match="gRPC management address is not known"):
            ask("models.list", point=nowhere)


def test_a_certificate_that_is_missing_is_told(
    ask: Callable[..., Any], endpoint: Endpoint, tmp_path: Path
) -> None:
    point = dataclasses.replace(endpoint, certificate=tmp_path / "none.pem")
    with pytest.raises(StorageError):
        ask("health", point=point)


def test_input_that_cannot_be_sent_is_told(ask: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        ask("predict", "cnn", tmp_path / "none.png")
    with pytest.raises(UsageError):
        ask("predict_stream", "cnn", {"a": float("nan")})


@pytest.mark.parametrize(
    ("code", "details", "kind", "status"),
    [
        ("PERMISSION_DENIED", "Token Authorization failed. Token", TokenRejectedError, 400),
        ("CANCELLED", "Token Authorization failed. Token", TokenRejectedError, 400),
        ("PERMISSION_DENIED", "Model API disabled\na.b.ModelException", ConflictError, 405),
        ("INTERNAL", "Model not found: x\na.b.ModelNotFoundException", ModelNotFoundError, 404),
        ("INTERNAL", "No\na.b.ModelVersionNotFoundException", ModelNotFoundError, 404),
        ("INTERNAL", f"Worker scaled down.\n{NAME}", WorkerLostError, 500),
        ("INTERNAL", "Strange", AnswerError, 500),
        ("INVALID_ARGUMENT", "No\na.b.BadRequestException", InputRejectedError, 400),
        ("INVALID_ARGUMENT", "No\na.b.InvalidModelException", AnswerError, 400),
        ("RESOURCE_EXHAUSTED", f"Full\n{NAME}", OverloadedError, 429),
        ("UNAVAILABLE", f"Prediction failed\n{NAME}", AnswerError, 503),
        ("UNKNOWN", "", AnswerError, 500),
        ("UNIMPLEMENTED", "Method not found", AnswerError, 501),
    ],
)
def test_a_status_becomes_this_error(
    code: str, details: str, kind: type[AnswerError], status: int
) -> None:
    error = translate_status(code, details, method="Ping", address="h:1")
    assert type(error) is kind
    assert isinstance(error, AnswerError)
    assert error.status == status
    assert "Exception" not in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b'{"title":"A film","status":"released","detail":"x"}',
        b'{"title":"A","status":200,"detail":"x"}',
        b'{"title":"A","status":404,"detail":"x","more":1}',
        b'{"title":"A","status":404}',
        b'{"title":',
        b"bytes",
    ],
)
def test_answers_that_look_like_problems_are_answers(body: bytes) -> None:
    raise_problem(body)


def test_a_jar_is_read_from_where_it_is_said(ask: Callable[..., Any], tmp_path: Path) -> None:
    jar = tmp_path / "model-server.jar"
    with pytest.raises(ClientError, match="no gRPC protocol can be read"):
        ask("health", jar=jar)
    with zipfile.ZipFile(jar, "w") as archive:
        for name in ("proto/inference.proto", "proto/management.proto", "google/rpc/status.proto"):
            archive.writestr(name, "nonsense")
    with pytest.raises(ClientError, match="cannot be compiled"):
        ask("health", jar=jar)


def test_without_torchserve_the_remedy_is_said(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="jar=PATH"):
        GrpcClient(endpoint)


@pytest.mark.parametrize("package", ["grpc", "grpc_tools"])
def test_a_missing_package_is_told(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from marwright.client import grpc_protocol

    grpc_protocol._compile.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match=r"pip install 'marwright\[grpc\]'"):
        GrpcClient(endpoint)


def test_the_protocol_is_compiled_once() -> None:
    assert read_protocol() is read_protocol()
    with pytest.raises(UsageError, match="no gRPC method Explain"):
        read_protocol().find("Explain")


def test_tls_is_spoken_where_there_is_a_certificate(
    ask: Callable[..., Any], endpoint: Endpoint, make_fake: Callable[..., Any], tmp_path: Path
) -> None:
    files = make_certificate(tmp_path)
    fake = make_fake(files)
    point = dataclasses.replace(
        endpoint, grpc_inference=fake.address, certificate=files.certificate
    )
    assert ask("predict", "cnn", b"1", point=point).body == b"ok"
    for stranger in (endpoint, Endpoint("https://h", "")):
        distrustful = dataclasses.replace(stranger, grpc_inference=fake.address)
        with pytest.raises(ConnectionFailedError):
            ask("predict", "cnn", b"1", point=distrustful)
