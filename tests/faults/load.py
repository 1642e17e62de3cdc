"""A steady load from a process of its own: so many requests a second, whatever the server does.

Run as `python load.py ENDPOINT INPUT --model cnn --rate 50 --seconds 10 [--retries]`. Without
--retries plain HTTP requests show what the server loses; with them marwright's AsyncClient shows
what its user sees. Prints a line at the first answer, and what came of all requests as JSON at the
end, also when told to stop (SIGTERM).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from marwright.client import AsyncClient, Endpoint
from marwright.client.retries import Retries
from marwright.errors import AnswerError, MarwrightError, OverloadedError

PATIENCE = 30.0
"""Seconds after which a request without an answer counts as lost."""

RETRIES = Retries(tries=100)
"""As many as fit: a server that was killed takes some seconds to come back."""

Send = Callable[[], Awaitable[str]]
"""Sends one request; returns answered, refused, wrong, or why it is lost."""


async def main() -> None:
    """Send, count, and print the counts."""
    arguments = parse_arguments()
    endpoint = Endpoint.read(arguments.endpoint)
    body = arguments.input.read_bytes()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    make = RetryingSender if arguments.retries else PlainSender
    async with make(endpoint, arguments.model, body) as send:
        report = await run(send, arguments.rate, arguments.seconds, stop)
    sys.stdout.write(json.dumps(report) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--retries", action="store_true")
    return parser.parse_args()


async def run(send: Send, rate: float, seconds: float, stop: asyncio.Event) -> dict[str, Any]:
    """Send at a steady rate until the time is over; an answer that is late delays no request."""
    counts: Counter[str] = Counter()
    answered: list[float] = []
    tasks: set[asyncio.Task[None]] = set()

    async def send_one() -> None:
        outcome = await send()
        counts[outcome] += 1
        if outcome == "answered":
            if not answered:
                sys.stdout.write("answering\n")
                sys.stdout.flush()
            answered.append(time.monotonic())

    began = time.monotonic()
    number = 0
    while not stop.is_set() and number < rate * seconds:
        task = asyncio.create_task(send_one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
        pause = began + number / rate - time.monotonic()
        await asyncio.sleep(max(0.0, pause))
    sending = time.monotonic() - began
    while tasks:
        await asyncio.wait(tasks)
    return summarise(counts, number, sending, sorted(answered))


def summarise(
    counts: Counter[str], sent: int, seconds: float, answered: list[float]
) -> dict[str, Any]:
    gaps = [after - before for before, after in itertools.pairwise(answered)]
    lost = {key: count for key, count in counts.items() if key not in {"answered", "refused"}}
    return {
        "sent": sent,
        "answered": counts["answered"],
        "refused": counts["refused"],
        "lost": sum(lost.values()),
        "why": lost,
        "rate": round(sent / seconds, 1) if seconds else 0.0,
        "longest_silence": round(max(gaps, default=0.0), 2),
    }


class PlainSender:
    """Plain HTTP over kept-alive connections, the token read anew for each request.

    While the server writes its key file anew, or has none, the last token is sent.
    """

    def __init__(self, endpoint: Endpoint, model: str, body: bytes) -> None:
        self._endpoint = endpoint
        self._url = f"{endpoint.inference_url}/predictions/{model}"
        self._body = body
        self._expected: bytes | None = None
        self._token = ""

    async def __aenter__(self) -> Send:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        certificate = self._endpoint.certificate
        context = ssl.create_default_context(cafile=certificate) if certificate else True
        connector = aiohttp.TCPConnector(ssl=context)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self._send

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _send(self) -> str:
        try:
            headers = {"Authorization": f"Bearer {self._read_token()}"}
            async with self._session.post(self._url, data=self._body, headers=headers) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            return type(exc).__name__
        if answer.status in {429, 503}:
            return "refused"
        if answer.status != 200:
            return f"{answer.status} {' '.join(body[:80].decode(errors='replace').split())}"
        self._expected = self._expected or body
        return "answered" if body == self._expected else "another answer"

    def _read_token(self) -> str:
        if self._endpoint.gateway_token is not None:
            return self._endpoint.gateway_token.read_text(encoding="ascii").strip()
        if self._endpoint.key_file is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                text = self._endpoint.key_file.read_text(encoding="utf-8")
                self._token = str(json.loads(text)["inference"]["key"])
        return self._token


class RetryingSender:
    """marwright's own client, which sends again what is safe to send again."""

    def __init__(self, endpoint: Endpoint, model: str, body: bytes) -> None:
        self._endpoint, self._model, self._body = endpoint, model, body
        self._expected: bytes | None = None

    async def __aenter__(self) -> Send:
        self._client = AsyncClient(self._endpoint, timeout=PATIENCE, retries=RETRIES)
        await self._client.__aenter__()
        return self._send

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__(None, None, None)

    async def _send(self) -> str:
        try:
            answer = await self._client.predict(self._model, self._body)
        except OverloadedError:
            return "refused"
        except AnswerError as exc:
            return f"{exc.status} {exc}"[:100]
        except MarwrightError as exc:
            return type(exc).__name__
        self._expected = self._expected or answer.body
        return "answered" if answer.body == self._expected else "another answer"


if __name__ == "__main__":
    asyncio.run(main())
