"""Clients in crowds, slow ones, and ones that hang up."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.server

Serve = Callable[..., Any]
Begin = Callable[..., Any]
Record = Callable[..., None]

CROWD = 500
HANGING_UP = 1000


def make_request(served: Any, body: bytes) -> tuple[tuple[str, int], bytes]:
    """Return where to connect to, and the bytes of one prediction."""
    endpoint = served.endpoint
    address = urlsplit(endpoint.inference_url)
    token = json.loads(endpoint.key_file.read_text("utf-8"))["inference"]["key"]
    head = (
        f"POST /predictions/cnn HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (str(address.hostname), int(address.port or 0)), head.encode() + body


def test_of_a_crowd_each_gets_an_answer_or_is_told_when_to_come_back(
    serve: Serve, load: Begin, record: Record, scan: bytes
) -> None:
    served = serve(limits={"queue": 50, "connections": 400})
    traffic = load(served)
    address, request = make_request(served, scan)

    async def ask() -> tuple[int, bool]:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request)
            await writer.drain()
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).lower()
        finally:
            writer.close()
        return int(head.split()[1]), b"retry-after: 1" in head

    async def ask_all() -> list[tuple[int, bool] | BaseException]:
        return await asyncio.gather(*(ask() for _ in range(CROWD)), return_exceptions=True)

    answers = asyncio.run(ask_all())
    reports = traffic.finish()
    broken = [answer for answer in answers if isinstance(answer, BaseException)]
    whole = [answer for answer in answers if not isinstance(answer, BaseException)]
    counts = Counter(status for status, _ in whole)
    record("500 connections at once", reports, crowd={str(key): n for key, n in counts.items()})
    assert not broken
    assert set(counts) == {200, 503}
    assert all(told for status, told in whole if status == 503)
    assert reports["client"]["lost"] == reports["plain"]["lost"] == 0


def test_a_client_that_sends_a_byte_a_second_is_sent_away(
    serve: Serve, load: Begin, record: Record, scan: bytes
) -> None:
    served = serve(limits={"request_seconds": 3})
    traffic = load(served)
    address, request = make_request(served, scan)
    began = time.monotonic()
    with socket.create_connection(address, timeout=30) as slow:
        answer = b""
        for byte in request[:20]:
            try:
                slow.sendall(bytes([byte]))
            except OSError:
                break
            slow.settimeout(1)
            try:
                answer = slow.recv(4096)
                break
            except TimeoutError:
                continue
    took = time.monotonic() - began
    reports = traffic.finish()
    record("a client that sends one byte a second", reports, sent_away_after=round(took, 1))
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert reports["client"]["lost"] == reports["plain"]["lost"] == 0


@pytest.mark.slow
def test_clients_that_hang_up_harm_nobody(
    serve: Serve, load: Begin, record: Record, scan: bytes
) -> None:
    served = serve()
    workers = [item.pid for item in served.client().models.describe("cnn").workers]
    traffic = load(served)
    address, request = make_request(served, scan)
    for number in range(HANGING_UP):
        with socket.create_connection(address, timeout=30) as client:
            # Half of them in the middle of the body, half while the worker computes.
            client.sendall(request if number % 2 else request[:-20])
            # An abrupt end: the kernel sends a reset, not the end of the stream.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reports = traffic.finish()
    record("1,000 clients that hang up in the middle of a request", reports)
    assert reports["client"]["lost"] == reports["plain"]["lost"] == 0
    assert [item.pid for item in served.client().models.describe("cnn").workers] == workers
