from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint
from marwright.errors import ClientError, ConnectionFailedError, InputRejectedError
from marwright.server.certificate import Certificate, make_certificate

pytest.importorskip("cryptography")


@pytest.fixture
def files(tmp_path: Path) -> Certificate:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    return make_certificate(tmp_path)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "Healthy"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url(files: Certificate) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_endpoints_certificate_is_trusted(
    url: str, files: Certificate, connect: Callable[..., Any]
) -> None:
    assert connect(Endpoint(url, url, certificate=files.certificate)).health().healthy


def test_who_speaks_without_tls_is_told_to_use_it(
    service: Any, client: Any, reply: Callable[..., Any]
) -> None:
    service.answer(reply(403, b"HTTPS is not what this handler refuses"))
    with pytest.raises(InputRejectedError):
        client.predict("cnn", b"")
    said = {"status": "This TorchServe instance only accepts HTTPS requests"}  # as 0.12 answers
    service.answer(reply(403, json.dumps(said).encode()))
    with pytest.raises(ConnectionFailedError, match="https://"):
        client.predict("cnn", b"")


def test_a_certificate_that_nobody_vouches_for_is_an_error_that_is_not_tried_again(
    url: str, connect: Callable[..., Any]
) -> None:
    with pytest.raises(ClientError, match="no certificate that is trusted") as caught:
        connect(Endpoint(url, url)).models.list()
    assert not isinstance(caught.value, ConnectionFailedError)
    assert "endpoint" in caught.value.remedy
