"""A closed loop of requests: so many connections, each of which asks again once it is answered.

Run as a program of its own, without the rest of marwright: jobs come as lines of JSON on standard
input, one line of figures answers each. A process of its own, and bare sockets under asyncio, so
that what measures takes as little as may be from what is measured on the same cores.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

CONNECT_SECONDS = 30.0
LAST_ANSWERS = 30.0
"""Seconds that answers may take once the load has ended; later ones are errors."""


@dataclass
class Tally:
    """What was answered between the end of the warm-up and the end of the load.

    Throughput is of the answers that came in that time. Latencies are of the requests that were
    sent in it, however late they were answered: else the slowest would be the ones left out.
    """

    begins_at: float
    ends_at: float
    answered: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds."""
    errors: int = 0
    failure: str = ""
    """The first error in words."""

    def count(self, sent_at: float, status: int, expected: int) -> None:
        """Count one answer."""
        now = time.perf_counter()
        if status != expected:
            self.fail(f"an answer has status {status} instead of {expected}")
            return
        self.answered += self.begins_at <= now <= self.ends_at
        if self.begins_at <= sent_at < self.ends_at:
            self.latencies.append(now - sent_at)

    def fail(self, text: str) -> None:
        """Count an error."""
        self.errors += 1
        self.failure = self.failure or text


class Connection(asyncio.Protocol):
    """One connection: sends the requests in turn, each after the answer to the one before."""

    def __init__(
        self, requests: list[tuple[bytes, int]], first: int, tally: Tally, done: asyncio.Event
    ) -> None:
        self._requests = requests
        self._number = first
        self._tally = tally
        self._received = bytearray()
        self.done = done

    def connection_made(self, transport: Any) -> None:
        """Send the first request."""
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take what has come; once it is a whole answer, count it and ask again."""
        self._received += data
        try:
            length = find_end(self._received)
        except ValueError as exc:
            self._end(f"an answer cannot be read: {exc}")
            return
        if length is None:
            return
        status = int(self._received[9:12])
        expected = self._requests[self._number % len(self._requests)][1]
        self._tally.count(self._sent_at, status, expected)
        del self._received[:length]
        self._number += 1
        if time.perf_counter() >= self._tally.ends_at:
            self._end("")
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Count a connection that the server ended."""
        if not self.done.is_set():
            self._end("the server closed a connection" + (f": {error}" if error else ""))

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._requests[self._number % len(self._requests)][0])

    def _end(self, failure: str) -> None:
        if failure:
            self._tally.fail(failure)
        self.done.set()
        self._transport.close()


def find_end(received: bytearray) -> int | None:
    """Return how long the first answer in a buffer is; None while it is not whole.

    Raises:
        ValueError: it is no answer of HTTP/1.1.
    """
    if len(received) >= 8 and not received.startswith(b"HTTP/1.1"):
        raise ValueError(bytes(received[:20]))
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return None
    fields = bytes(received[:head]).lower()
    if b"transfer-encoding: chunked" in fields:
        end = received.find(b"0\r\n\r\n", head)
        return None if end < 0 or not received.endswith(b"0\r\n\r\n") else len(received)
    start = fields.find(b"\r\ncontent-length:")
    if start < 0:
        raise ValueError("it does not say how long it is")
    length = int(fields[start + len(b"\r\ncontent-length:") :].split(b"\r\n", 1)[0])
    end = head + 4 + length
    return end if len(received) >= end else None


async def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Load a server as a job says and return the figures."""
    requests = [(make_request(job, item), int(item["status"])) for item in job["requests"]]
    begins_at = time.perf_counter() + job["warm_up_seconds"]
    tally = Tally(begins_at, begins_at + job["seconds"])
    loop = asyncio.get_running_loop()
    address = job["host"], job["port"]
    connections = []
    for number in range(job["connections"]):
        connection = Connection(requests, number, tally, asyncio.Event())
        opening = loop.create_connection(functools.partial(_get, connection), *address)
        try:
            await asyncio.wait_for(opening, CONNECT_SECONDS)
        except (OSError, asyncio.TimeoutError) as exc:
            tally.fail(f"no connection: {exc}")
            continue
        connections.append(connection)
    remaining = max(0.0, tally.ends_at - time.perf_counter())
    waits = [asyncio.ensure_future(connection.done.wait()) for connection in connections]
    if waits:
        _, late = await asyncio.wait(waits, timeout=remaining + LAST_ANSWERS)
        for wait in late:
            tally.fail("an answer did not come")
            wait.cancel()
    return summarise(tally, job)


def _get(connection: Connection) -> Connection:
    return connection


def make_request(job: dict[str, Any], item: dict[str, Any]) -> bytes:
    """Return the bytes of one request."""
    body = base64.b64decode(item["body"])
    lines = [
        f"POST {job['path']} HTTP/1.1",
        f"Host: {job['host']}:{job['port']}",
        f"Content-Type: {item['content_type']}",
        f"Content-Length: {len(body)}",
    ]
    if job["token"]:
        lines.append(f"Authorization: Bearer {job['token']}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def summarise(tally: Tally, job: dict[str, Any]) -> dict[str, Any]:
    """Return throughput and latencies; of few answers p99 is the slowest."""
    ordered = sorted(tally.latencies)

    def percentile(share: float) -> float:
        """Return milliseconds."""
        if not ordered:
            return 0.0
        return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {
        "connections": job["connections"],
        "throughput": round(tally.answered / job["seconds"], 2),
        "p50_ms": percentile(0.50),
        "p95_ms": percentile(0.95),
        "p99_ms": percentile(0.99),
        "requests": len(ordered),
        "errors": tally.errors,
        "failure": tally.failure,
    }


def main() -> None:
    """Run jobs until standard input ends."""
    for line in sys.stdin:
        figures = asyncio.run(run_job(json.loads(line)))
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
