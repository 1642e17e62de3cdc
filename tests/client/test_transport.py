from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import requests
import urllib3

from marwright.client import Client, Endpoint, Retries
from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
)

UNREACHABLE = "http://127.0.0.1:9"


class RaisingAdapter(requests.adapters.BaseAdapter):
    """Raises instead of sending."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.tries = 0

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        self.tries += 1
        raise self.error

    def close(self) -> None:
        pass


@pytest.fixture
def raising(quick: Retries) -> Iterator[Callable[[Exception], tuple[Client, RaisingAdapter]]]:
    session = requests.Session()

    def make(error: Exception) -> tuple[Client, RaisingAdapter]:
        adapter = RaisingAdapter(error)
        session.mount("http://", adapter)
        return Client(Endpoint(UNREACHABLE, UNREACHABLE), session=session, retries=quick), adapter

    yield make
    session.close()


def list_exceptions(module: Any, base: type[Exception]) -> list[type[Exception]]:
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, base) and not issubclass(kind, Warning)]


def make_exception(kind: type[Exception]) -> Exception:
    """Make one, whatever its constructor takes and its text is made of."""
    nothing = {"__init__": lambda _: None, "__str__": lambda _: "it did not work"}
    error: Exception = type(kind.__name__, (kind,), nothing)()
    return error


@pytest.mark.parametrize(
    ("status", "kind", "expected", "remedy"),
    [
        (400, "InvalidKeyException", TokenRejectedError, "--key-file"),
        (404, "ModelNotFoundException", ModelNotFoundError, "models list"),
        (404, "ModelVersionNotFoundException", ModelNotFoundError, "models show"),
        (409, "ConflictStatusException", ConflictError, "unregister"),
        (403, "InvalidModelVersionException", ConflictError, "default"),
        (405, "MethodNotAllowedException", ConflictError, "enable_model_api"),
        (503, "ServiceUnavailableException", OverloadedError, "scale"),
        (400, "BadRequestException", AnswerError, ""),
        (400, "DownloadArchiveException", AnswerError, ""),
        (400, "InvalidModelException", AnswerError, ""),
        (404, "ResourceNotFoundException", AnswerError, ""),
        (408, "RequestTimeoutException", AnswerError, ""),
        (500, "InternalServerException", AnswerError, ""),
        (503, "InternalServerException", AnswerError, ""),
        (507, "OutOfMemoryError", AnswerError, ""),
    ],
)
def test_each_of_torchserves_errors_becomes_its_member_of_the_family(
    service: Any,
    client: Client,
    problem: Any,
    status: int,
    kind: str,
    expected: type[AnswerError],
    remedy: str,
) -> None:
    service.answer(problem(status, kind, "so\n  it is"))
    with pytest.raises(AnswerError, match="so it is") as caught:
        client.models.describe("cnn")
    assert type(caught.value) is expected
    assert caught.value.status == status
    assert kind.encode() in caught.value.body
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "body", "expected", "text"),
    [
        (400, b'{"detail": "not an image"}', InputRejectedError, "not an image"),
        (415, b"no thanks", InputRejectedError, "no thanks"),
        (400, b"", InputRejectedError, "Bad Request"),
        (404, b"<html>", InputRejectedError, "<html>"),
        (400, b'["a", "list"]', InputRejectedError, "list"),
        (422, b"\xff\xfe", InputRejectedError, "\ufffd"),
        (429, b"slowly", OverloadedError, "slowly"),
        (503, b"full", OverloadedError, "full"),
        (500, b"[" * 100_000, AnswerError, "[["),
        (502, b"bad gateway", AnswerError, "bad gateway"),
    ],
)
def test_a_handlers_own_refusal_says_what_it_said(
    service: Any,
    client: Client,
    reply: Any,
    status: int,
    body: bytes,
    expected: type[AnswerError],
    text: str,
) -> None:
    service.answer(reply(status, body))
    with pytest.raises(AnswerError) as caught:
        client.predict("cnn", b"")
    assert type(caught.value) is expected
    assert text in str(caught.value)
    assert (caught.value.status, caught.value.body) == (status, body)


def test_refused_connections_are_connection_failed() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it meanwhile
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        refused = pytest.raises(ConnectionFailedError, match="marwright serve")
        with Client(Endpoint(url, url)) as client, refused as caught:
            client.health()
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value.__cause__, requests.ConnectionError)


def test_silence_is_a_timeout_and_is_not_tried_again(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply(delay=0.6))
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError, match=r"one within 0.2 s") as caught:
        client.predict("cnn", b"", timeout=0.2)
    assert time.monotonic() - started < 0.6
    assert isinstance(caught.value, TimeoutError)
    assert len(service.asked) == 1


def test_silence_in_the_middle_of_a_body_is_a_timeout_too(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply(body=b"half", promised_bytes=8, stall=0.6))
    with pytest.raises(RequestTimeoutError):
        client.predict("cnn", b"", timeout=0.2)
    assert len(service.asked) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_server_that_hangs_up_in_mid_answer_is_connection_failed(
    service: Any, endpoint: Endpoint, reply: Any, quick: Retries, streaming: bool
) -> None:
    service.answer(reply(body=b"half", promised_bytes=8))
    with requests.Session() as session:
        session.stream = streaming
        with pytest.raises(ConnectionFailedError, match="broke off"):
            Client(endpoint, session=session, retries=quick).predict("cnn", b"")
    assert len(service.asked) == 4


def test_an_answer_that_is_not_http_is_connection_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def babble() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        with Client(Endpoint(url, url), timeout=5) as client, pytest.raises(ConnectionFailedError):
            client.health()
        thread.join()


def test_a_body_that_cannot_be_decompressed_is_a_client_error(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply(body=b"plain", headers={"Content-Encoding": "gzip"}))
    with pytest.raises(ClientError):
        client.predict("cnn", b"")


@pytest.mark.parametrize(
    "kind",
    [
        *list_exceptions(requests.exceptions, requests.RequestException),
        *list_exceptions(urllib3.exceptions, urllib3.exceptions.HTTPError),
    ],
    ids=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
def test_no_exception_of_the_http_library_leaves_the_client(
    raising: Any, kind: type[Exception]
) -> None:
    client, _ = raising(make_exception(kind))
    with pytest.raises(ClientError) as caught:
        client.models.list()
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "error",
    [OSError("no such CA bundle"), UnicodeError("label too long"), ValueError("odd host")],
)
def test_no_builtin_exception_of_sending_leaves_the_client(raising: Any, error: Exception) -> None:
    client, _ = raising(error)
    with pytest.raises(ClientError):
        client.models.list()


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://a..b",
        "http://" + "ü" * 70,
    ],
)
def test_an_address_that_is_none_is_a_client_error_with_a_remedy(url: str) -> None:
    with Client(Endpoint(url, url)) as client, pytest.raises(ClientError) as caught:
        client.models.list()
    assert caught.value.remedy


def test_an_address_that_is_not_given_is_named() -> None:
    with (
        Client(Endpoint("http://127.0.0.1:9", "")) as client,
        pytest.raises(UsageError, match="pass --management-url"),
    ):
        client.models.list()


CALLS: dict[str, Callable[[Client], object]] = {
    "describe": lambda client: client.models.describe("cnn"),
    "list": lambda client: client.models.list(),
    "predict": lambda client: client.predict("cnn", b"1"),
    "predict_parts": lambda client: client.predict_parts("cnn", {"data": b"1"}),
    "scale": lambda client: client.models.scale("cnn", 1),
    "register": lambda client: client.models.register("cnn.mar"),
    "unregister": lambda client: client.models.unregister("cnn", "1.0"),
}


@pytest.mark.parametrize(
    ("call", "tries"),
    [
        ("describe", 4),
        ("list", 4),
        ("predict", 4),
        ("predict_parts", 4),
        ("scale", 4),
        ("register", 1),
        ("unregister", 1),
    ],
)
def test_only_what_is_safe_twice_is_sent_again(
    service: Any, client: Client, reply: Any, problem: Any, call: str, tries: int
) -> None:
    service.answer(problem(503, "ServiceUnavailableException"))
    with pytest.raises(OverloadedError):
        CALLS[call](client)
    assert len(service.asked) == tries
    service.answer(reply(hang_up=True))
    with pytest.raises(ConnectionFailedError):
        CALLS[call](client)
    assert len(service.asked) == 2 * tries


@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_other_errors_are_not_tried_again(
    service: Any, client: Client, reply: Any, status: int
) -> None:
    service.answer(reply(status))
    with pytest.raises(AnswerError):
        client.predict("cnn", b"")
    assert len(service.asked) == 1


def test_a_lost_connection_and_a_full_queue_pass_unnoticed(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply(hang_up=True), reply(503), reply(429), reply(body=b"7"))
    assert client.predict("cnn", b"scan").body == b"7"
    assert [asked.body for asked in service.asked] == [b"scan"] * 4
