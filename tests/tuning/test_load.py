from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from marwright.tuning.load import find_end, run_job

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def load(server: Server, *, connections: int = 3, statuses: tuple[int, ...] = (200,)) -> Any:
    """Run a job of half a second against a server."""

    async def run() -> Any:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        requests = [
            {"content_type": "text/plain", "status": status, "body": base64.b64encode(b"hi")}
            for status in statuses
        ]
        job = {
            "host": "127.0.0.1",
            "port": port,
            "path": "/predictions/m",
            "token": "secret",
            "requests": requests,
            "connections": connections,
            "warm_up_seconds": 0.1,
            "seconds": 0.4,
        }
        figures = await run_job(job)
        listening.close()
        return figures

    return asyncio.run(run())


def serve(
    respond: Callable[[int], bytes | None], *, seconds: float = 0.01
) -> tuple[Server, list[bytes]]:
    """Return a server that answers the numbers of a connection's requests, and what it was sent."""
    received: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                received.append(head + await reader.readexactly(2))
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            await asyncio.sleep(seconds)
            if (said := respond(number)) is None:
                break
            number += 1
            writer.write(said)
        writer.close()

    return handle, received


def test_each_connection_asks_again_once_it_is_answered() -> None:
    server, received = serve(lambda number: answer(b"ok"))
    figures = load(server)
    assert figures["errors"] == 0
    assert 10 <= figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    # Three at a time, each at least 10 ms, in the 0.4 s that count.
    assert 3 <= figures["requests"] <= 123
    assert figures["throughput"] == pytest.approx(figures["requests"] / 0.4, abs=3 / 0.4 + 0.01)
    assert len(received) > figures["requests"]  # the warm-up does not count
    assert b"authorization: bearer secret" in received[0].lower()
    assert received[0].endswith(b"\r\n\r\nhi")


def test_an_answer_that_comes_after_the_end_counts_as_slow_not_as_throughput() -> None:
    server, _ = serve(lambda number: answer(b"ok"), seconds=0.3)
    figures = load(server, connections=1)  # sent at 0, at 0.3 and not answered before 0.6
    assert (figures["requests"], figures["throughput"]) == (1, 2.5)
    assert figures["p50_ms"] >= 300


def test_another_status_than_the_samples_is_an_error() -> None:
    server, _ = serve(lambda number: answer(b"full", 503))
    figures = load(server, connections=1)
    assert figures["requests"] == 0
    assert figures["errors"] > 0
    assert figures["failure"] == "an answer has status 503 instead of 200"


def test_a_connection_that_breaks_is_an_error() -> None:
    server, _ = serve(lambda number: answer(b"ok") if number < 2 else None)
    figures = load(server, connections=1)
    assert figures["errors"] == 1
    assert figures["failure"].startswith("the server closed a connection")


def test_answers_are_read_in_any_number_of_pieces() -> None:
    whole = answer(b"0123456789")
    assert [find_end(bytearray(whole[:n])) for n in range(len(whole))] == [None] * len(whole)
    assert find_end(bytearray(whole)) == len(whole)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    assert find_end(bytearray(chunked[:-1])) is None
    assert find_end(bytearray(chunked)) == len(chunked)


@pytest.mark.parametrize("text", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_what_is_no_answer_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"SSH|how long"):
        find_end(bytearray(text))
