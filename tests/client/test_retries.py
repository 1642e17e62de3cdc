from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from marwright.client import Client, Endpoint, Retries
from marwright.client.retries import Attempts
from marwright.errors import (
    AnswerError,
    ClientError,
    ConnectionFailedError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)


def test_pauses_double_up_to_the_longest_and_chance_is_a_share_of_them() -> None:
    retries = Retries(first=0.1, longest=0.5)
    assert [retries.pause(n, chance=1.0) for n in (1, 2, 3, 4, 5000)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert retries.pause(2, chance=0.25) == 0.05
    assert retries.pause(1, chance=0.5, asked=3.0) == 3.05


def choose(error: ClientError, attempts: Attempts, **options: Any) -> float | None:
    """Return the pause of retries without chance, for a server that a supervisor keeps."""
    options = {"safe": True, "now": 0.0, "supervised": True, **options}
    retries = Retries(tries=2, first=0.1, longest=2.0, away=5.0)
    return retries.choose_pause(error, attempts, random=lambda: 1.0, **options)


NOBODY = ConnectionFailedError("refused")
NO_TOKEN = TokenRejectedError("no file", status=0)


def test_a_server_that_comes_back_is_waited_for_from_the_first_miss_on() -> None:
    attempts = Attempts()
    errors = [NOBODY, NO_TOKEN, NOBODY, NOBODY, NOBODY]
    moments = [100.0, 100.1, 103.0, 104.9, 105.0]
    pauses = [choose(e, attempts, now=t) for e, t in zip(errors, moments, strict=True)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, None]


def test_the_tries_while_a_server_was_away_count_for_no_others() -> None:
    attempts = Attempts()
    full = OverloadedError("full", status=503)
    assert [choose(NOBODY, attempts, now=float(t)) is not None for t in range(4)] == [True] * 4
    assert choose(full, attempts, now=50.0) == 0.1
    assert choose(NOBODY, attempts, now=100.0) == 0.1  # it is away again
    assert choose(full, attempts, now=101.0) is None


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (NOBODY, {"supervised": False}),
        (NO_TOKEN, {"supervised": False}),
        (OverloadedError("full", status=503), {}),
    ],
)
def test_what_does_not_come_back_is_tried_as_often_as_was_said(
    error: ClientError, options: dict[str, Any]
) -> None:
    attempts = Attempts()
    assert [choose(error, attempts, **options) for _ in range(2)] == [0.1, None]


@pytest.mark.parametrize(
    ("error", "options"),
    [(NOBODY, {"safe": False}), (TokenRejectedError("wrong", status=401), {})],
)
def test_nothing_else_is_sent_again_while_a_server_is_away(
    error: ClientError, options: dict[str, Any]
) -> None:
    assert choose(error, Attempts(), **options) is None


@pytest.mark.parametrize(
    "values", [{"tries": 0}, {"first": -1.0}, {"after_loss": -1}, {"away": -1.0}]
)
def test_retries_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Retries(**values)


def test_the_random_source_is_asked_before_each_pause(
    service: Any, endpoint: Endpoint, connect: Callable[..., Any], reply: Any
) -> None:
    asked: list[float] = []

    def count() -> float:
        asked.append(0.0)
        return 0.0

    client = connect(endpoint, retries=Retries(tries=3, first=60.0, longest=60.0), random=count)
    service.answer(reply(503))
    with pytest.raises(OverloadedError):
        client.predict("cnn", b"")
    assert (len(service.asked), len(asked)) == (3, 2)


def test_retry_after_is_waited_for(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply(429, headers={"Retry-After": "1"}), reply(body=b"7"))
    started = time.monotonic()
    assert client.predict("cnn", b"").body == b"7"
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("text", ["", "soon", "-1", "٣", "Fri, 27 Nov 2026 19:33:55 GMT", "9" * 40])
def test_a_retry_after_that_is_no_number_of_seconds_is_passed_over(
    service: Any, client: Client, reply: Any, text: str
) -> None:
    headers = {"Retry-After": text} if text.isascii() else {}
    service.answer(reply(503, headers=headers), reply(body=b"7"))
    assert client.predict("cnn", b"").body == b"7"


def test_a_pause_that_would_outlast_the_deadline_is_not_begun(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply(503, b"full", headers={"Retry-After": "60"}))
    started = time.monotonic()
    with pytest.raises(OverloadedError, match="full"):
        client.predict("cnn", b"", timeout=10)
    assert time.monotonic() - started < 5
    assert len(service.asked) == 1


def test_the_deadline_is_of_all_tries_together(
    service: Any, endpoint: Endpoint, connect: Callable[..., Any], reply: Any
) -> None:
    client = connect(endpoint, retries=Retries(tries=1000, first=0.0))
    service.answer(reply(503, delay=0.2))
    started = time.monotonic()
    with pytest.raises((OverloadedError, RequestTimeoutError)):
        client.predict("cnn", b"", timeout=0.7)
    assert time.monotonic() - started < 5
    assert 2 <= len(service.asked) <= 5


def test_no_time_at_all_is_a_timeout_and_sends_nothing(service: Any, client: Client) -> None:
    with pytest.raises(RequestTimeoutError, match="within 0 s"):
        client.predict("cnn", b"", timeout=0)
    assert service.asked == []


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "Worker died."), (507, "Worker died."), (500, "Worker scaled down.")],
)
def test_a_prediction_whose_worker_was_lost_is_sent_again(
    service: Any, client: Client, problem: Any, reply: Any, status: int, message: str
) -> None:
    service.answer(problem(status, "InternalServerException", message), reply(body=b"7"))
    assert client.predict("cnn", b"scan").body == b"7"
    assert [asked.body for asked in service.asked] == [b"scan"] * 2


def test_an_input_that_kills_workers_kills_only_a_few(
    service: Any, endpoint: Endpoint, connect: Callable[..., Any], problem: Any
) -> None:
    client = connect(endpoint, retries=Retries(tries=10, first=0.0, after_loss=1))
    service.answer(problem(500, "InternalServerException", "Worker died."))
    with pytest.raises(WorkerLostError, match=r"Worker died\. \(500\)"):
        client.predict("cnn", b"")
    assert len(service.asked) == 2


def test_another_internal_error_is_no_lost_worker(
    service: Any, client: Client, problem: Any
) -> None:
    service.answer(problem(500, "InternalServerException", "Worker died. Or so it seems"))
    with pytest.raises(AnswerError) as caught:
        client.predict("cnn", b"")
    assert type(caught.value) is AnswerError
    assert len(service.asked) == 1


def test_a_change_whose_worker_was_lost_is_not_sent_again(
    service: Any, client: Client, problem: Any
) -> None:
    service.answer(problem(500, "InternalServerException", "Worker died."))
    with pytest.raises(WorkerLostError):
        client.models.register("cnn.mar")
    assert len(service.asked) == 1


@pytest.fixture
def speaker() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Return a function that starts a server of one connection, and returns its address."""
    threads: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def start(speak: Callable[[socket.socket], None]) -> str:
        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                with contextlib.suppress(OSError):  # the client has had enough
                    speak(peer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def test_a_body_that_trickles_ends_at_the_deadline(
    speaker: Any, connect: Callable[..., Any]
) -> None:
    def trickle(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n")
        for _ in range(200):
            peer.sendall(b"x")
            time.sleep(0.1)

    url = speaker(trickle)
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError, match=r"within 0\.5 s"):
        connect(Endpoint(url, url), retries=Retries(tries=1)).predict("cnn", b"", timeout=0.5)
    assert time.monotonic() - started < 10


def test_an_answer_in_chunks_is_whole(speaker: Any, connect: Callable[..., Any]) -> None:
    def speak(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        time.sleep(0.1)
        peer.sendall(b"6\r\n world\r\n0\r\n\r\n")

    url = speaker(speak)
    assert connect(Endpoint(url, url)).predict("cnn", b"").body == b"hello world"


def test_chunks_that_end_early_are_no_answer(speaker: Any, connect: Callable[..., Any]) -> None:
    url = speaker(
        lambda peer: peer.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        )
    )
    with pytest.raises(ConnectionFailedError, match="broke off"):
        connect(Endpoint(url, url), retries=Retries(tries=1)).predict("cnn", b"")


def test_a_redirect_is_not_followed_and_an_error(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply(302, headers={"Location": "http://127.0.0.1:9/"}))
    with pytest.raises(AnswerError, match="302"):
        client.models.list()
    assert len(service.asked) == 1
