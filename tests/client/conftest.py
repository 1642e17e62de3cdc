"""A small real HTTP server that answers as a test scripts it, and records what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marwright.client import AsyncClient, Client, Endpoint, Retries


@dataclass(frozen=True)
class Reply:
    """One scripted answer."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds of silence before it."""
    promised_bytes: int | None = None
    """The Content-Length to claim, where it is not the body's."""
    stall: float = 0.0
    """Seconds of silence after the body, before the connection ends."""
    hang_up: bool = False
    """Whether to close the connection without a word."""
    act: Callable[[], None] = lambda: None
    """What the server does when it is asked."""


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    """With the query, and quoted as it came."""
    headers: dict[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class Service:
    """The scripted server: answers in order, the last one again and again."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.asked: list[Asked] = []
        self.decide = self._take_next
        """Chooses the reply to a request; a test may put its own in its place."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                asked = Asked(self.command, self.path, dict(self.headers), body)
                service.asked.append(asked)
                reply = service.decide(asked)
                reply.act()
                time.sleep(reply.delay)
                self.close_connection = reply.hang_up or reply.promised_bytes is not None
                if not reply.hang_up:
                    self.say(reply)

            def say(self, reply: Reply) -> None:
                self.send_response(reply.status)
                length = len(reply.body) if reply.promised_bytes is None else reply.promised_bytes
                for key, value in ({"Content-Length": str(length)} | reply.headers).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(reply.body)
                time.sleep(reply.stall)

            do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def _take_next(self, asked: Asked) -> Reply:
        return self.replies.popleft() if len(self.replies) > 1 else self.replies[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def lines(self) -> list[str]:
        return [asked.line for asked in self.asked]

    def answer(self, *replies: Reply | dict[str, Any] | list[Any]) -> None:
        """Say how to answer: a Reply, or what is sent as JSON."""
        self.replies = deque(
            reply if isinstance(reply, Reply) else Reply(body=json.dumps(reply).encode())
            for reply in replies
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture
def endpoint(service: Service) -> Endpoint:
    return Endpoint(service.url, service.url)


class Synchronous:
    """An AsyncClient, or a part of one, each of whose methods is awaited at once."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name == "models":
            return Synchronous(value, self._loop)
        return self._wrap(value) if callable(value) else value

    def _wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            if hasattr(result, "__aiter__"):
                return self._iterate(result)
            return self._loop.run_until_complete(result)

        return call

    def _iterate(self, outcomes: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(outcomes))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(outcomes.aclose())


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a client of each kind; both are called alike."""
    with contextlib.ExitStack() as stack:
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)

        def make(endpoint: Endpoint, **options: Any) -> Any:
            if request.param == "sync":
                return stack.enter_context(Client(endpoint, **options))
            client = Synchronous(AsyncClient(endpoint, **options), loop)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(endpoint: Endpoint, quick: Retries, connect: Callable[..., Any]) -> Any:
    return connect(endpoint, timeout=5, retries=quick)


@pytest.fixture
def quick() -> Retries:
    """As many tries as ever, without waiting long between them."""
    return Retries(first=0.001, longest=0.001)


@pytest.fixture
def problem() -> Callable[..., Reply]:
    """Return a function that makes an error answer as TorchServe writes it."""

    def make(status: int, kind: str, message: str = "so it is") -> Reply:
        text = json.dumps({"code": status, "type": kind, "message": message}, indent=2)
        return Reply(status, text.encode())

    return make


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def described() -> Callable[..., dict[str, Any]]:
    """Return a function that makes one entry of GET /models/{name}/{version}."""

    def make(version: str = "1.0", *, ready: int = 1, workers: int = 1) -> dict[str, Any]:
        return {
            "modelName": "cnn",
            "modelVersion": version,
            "modelUrl": "cnn.mar",
            "runtime": "python",
            "minWorkers": workers,
            "maxWorkers": workers,
            "batchSize": 1,
            "maxBatchDelay": 100,
            "loadedAtStartup": True,
            "workers": [
                {
                    "id": str(9000 + number),
                    "startTime": "2026-11-23T23:39:32.045Z",
                    "status": "READY" if number < ready else "LOADING",
                    "memoryUsage": 4096,
                    "pid": 100 + number,
                    "gpu": False,
                }
                for number in range(workers)
            ],
        }

    return make


@pytest.fixture
def write_keys(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a key file as TorchServe does, and returns its path."""

    def write(*, expires_in: float = 3600.0, **tokens: str) -> Path:
        expiry = datetime.fromtimestamp(time.time() + expires_in, timezone.utc)
        keys = {
            purpose: {"key": token, "expiration time": f"{expiry:%Y-%m-%dT%H:%M:%S.%f}000Z"}
            for purpose, token in tokens.items()
        }
        path = tmp_path / "key_file.json"
        path.write_text(json.dumps(keys), encoding="utf-8")
        return path

    return write
