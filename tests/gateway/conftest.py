"""Stand-in replicas, and a real nginx in front of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until

from marwright.gateway.accesses import Access, AccessLog
from marwright.gateway.configuration import Settings
from marwright.gateway.gateway import Gateway
from marwright.gateway.traffic import Split, Traffic
from marwright.server.certificate import Certificate
from marwright.server.ports import Ports


@pytest.fixture(autouse=True)
def _needs_nginx(nginx: Path) -> None:
    """Skip all of this folder where there is none."""


SPLIT = Split("cnn", "1.0", "2.0")
# A replica in a process of its own, to be killed; it listens where it is told.
REPLICA = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(0.01)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
class Server(ThreadingHTTPServer):
    request_queue_size = 128
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass
class Asked:
    """One request as a replica got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    breaks: bool = False
    """Whether the connection is reset in place of an answer."""


class Replica:
    """What answers in TorchServe's place; `answer` says how, `asked` what it got."""

    Answer = Answer

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.asked: list[Asked] = []
        self.answer: Callable[[Asked], Answer] = lambda asked: Answer(body=asked.body or b"{}")
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = Asked(self.command, self.path, dict(self.headers.items()), body)
                replica.asked.append(asked)
                answer = replica.answer(asked)
                time.sleep(answer.seconds)
                if answer.breaks:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                headers = {"X-Request-ID": "the-replicas-own", **answer.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST = do_PUT = do_HEAD = _answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate, certificate.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture(scope="session")
def ask() -> Callable[..., Response]:
    """Return a function that asks a gateway over a fresh connection; nothing is sent twice."""

    def ask_gateway(
        settings: Settings, path: str, body: bytes | None = None, method: str = "", **headers: str
    ) -> Response:
        connection = http.client.HTTPConnection(settings.host, settings.port, timeout=20)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, body, named)
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read())

    return ask_gateway


@pytest.fixture(scope="session")
def read_accesses() -> Callable[[Gateway, int], list[Access]]:
    """Return a function that reads the first accesses; nginx writes them after the answers."""

    def read(gateway: Gateway, count: int) -> list[Access]:
        found: list[Access] = []
        with AccessLog(gateway.folder) as log:

            def is_there() -> bool:
                found.extend(log.read())
                return len(found) >= count

            wait_until(is_there)
        return found

    return read


@pytest.fixture(scope="session")
def shift() -> Callable[..., Settings]:
    """Return a function that gives settings another split of cnn."""

    def shift_traffic(settings: Settings, **changes: Any) -> Settings:
        return replace(settings, traffic=Traffic((replace(SPLIT, **changes),)))

    return shift_traffic


@pytest.fixture
def make_replica() -> Iterator[Callable[..., Replica]]:
    """Return a function that starts a replica, which is stopped with the test."""
    with contextlib.ExitStack() as stack:

        def make(certificate: Certificate | None = None) -> Replica:
            made = Replica(certificate)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture
def replica(make_replica: Callable[..., Replica]) -> Replica:
    return make_replica()


@pytest.fixture
def settings(replica: Replica) -> Settings:
    """A gateway before one replica, with a candidate that gets nothing yet."""
    return Settings(
        port=Ports.find_free().inference, replicas=(replica.url,), traffic=Traffic((SPLIT,))
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Settings], Gateway]]:
    """Return a function that starts a gateway, which is stopped with the test."""
    with contextlib.ExitStack() as stack:

        def start_gateway(settings: Settings) -> Gateway:
            return stack.enter_context(Gateway.start(tmp_path / "gateway", settings))

        yield start_gateway


@pytest.fixture
def processes() -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Return a function that starts a replica in a process; all are killed with the test."""
    with contextlib.ExitStack() as stack:

        def start_process(port: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-I", "-S", "-c", REPLICA, str(port)]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            return process

        yield start_process
