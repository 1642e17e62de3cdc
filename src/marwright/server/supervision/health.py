"""The supervisor's own HTTP endpoints: /live, /ready, /started, /status, /metrics, on loopback.

They answer at once, from what the supervisor last saw, and need no token. Whoever sends the key of
the supervisor's record (registry.py) is told paths and workers' tracebacks by /status, and may ask
for more, by POST where something changes. The others' bodies are those of
draft-inadarei-api-health-check-06: {"status": "pass" or "fail", "output": why}.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

from marwright.errors import MarwrightError, PortTakenError
from marwright.server.metrics.exposition import OPENMETRICS, TEXT, Exposition
from marwright.server.ports import HOST
from marwright.server.registry import KEY_HEADER
from marwright.server.sections import PortSettings
from marwright.server.supervision.status import Status

__all__ = ["Health", "open_health"]

_log = logging.getLogger(__name__)

MEDIA_TYPE = "application/health+json"
REQUEST_BYTES = 1 << 20
REQUEST_SECONDS = 5.0
"""How long a connection may be silent."""


class Health:
    """Serves what `read` returns, from a thread of its own; use it in a `with` block.

    `port` 0 is a free one; `url` says which. `scrape` returns what stands at /metrics. Who sends
    `key` is told all of /status; nobody where it is "". `answers` are further paths for them: what
    a POST's JSON says, None for a GET, is given to the function, and what it returns is sent; a
    MarwrightError is sent as a problem.
    """

    def __init__(
        self,
        read: Callable[[], Status],
        *,
        port: int,
        key: str = "",
        scrape: Callable[[], Exposition] = Exposition,
        answers: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        try:
            self._server = _Server((HOST, port), _Handler)
        except OSError as exc:
            raise PortTakenError(
                f"port {port} (health) is taken",
                remedy="stop what listens there, or choose another: ports.health in deploy.yaml",
            ) from exc
        self._server.read = read
        self._server.key = key.encode()
        self._server.scrape = scrape
        self._server.answers = answers or {}
        self.url = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="health", daemon=True
        )

    def __enter__(self) -> Health:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    read: Callable[[], Status]
    key: bytes
    scrape: Callable[[], Exposition]
    answers: Mapping[str, Callable[[Any], Any]]


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer with the status code and the reasons."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer with the status code alone."""
        self._answer(with_body=False)

    def do_POST(self) -> None:
        """Do what is asked, for who has the key."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= REQUEST_BYTES:
            self.close_connection = True
            self._send(413, "application/json", {"error": "too large"}, True)
            return
        text = self.rfile.read(length)
        answer = self.server.answers.get(self.path)
        if answer is None or not self._has_key():
            self._send(404, "application/json", {"error": "no such path"}, True)
            return
        try:
            asked = json.loads(text)
        except ValueError:
            self._send(400, "application/json", {"error": "no JSON"}, True)
            return
        self._tell(answer, asked)

    def _tell(self, answer: Callable[[Any], Any], asked: Any) -> None:
        """Send what a function returns, or its error in the form of RFC 9457."""
        try:
            self._send(200, "application/json", answer(asked), True)
        except MarwrightError as exc:
            problem = {**exc.to_json(), "type": "about:blank", "status": 409}
            self._send(409, "application/problem+json", problem, True)

    def _answer(self, *, with_body: bool) -> None:
        status = self.server.read()
        path = self.path.partition("?")[0].rstrip("/")
        if path == "/status":
            body: dict[str, Any] = status.to_json() if self._has_key() else status.to_public_json()
            self._send(200, "application/json", body, with_body)
            return
        if path == "/metrics":
            self._send_metrics(with_body)
            return
        if path in self.server.answers and self._has_key():
            self._tell(self.server.answers[path], None)
            return
        reasons = _list_reasons(status, path)
        if reasons is None:
            body = {"error": "no such path", "paths": sorted([*_REASONS, "/metrics", "/status"])}
            self._send(404, "application/json", body, with_body)
        elif reasons:
            body = {"status": "fail", "output": "; ".join(reasons), "notes": reasons}
            self._send(503, MEDIA_TYPE, body, with_body)
        else:
            self._send(200, MEDIA_TYPE, {"status": "pass"}, with_body)

    def _send_metrics(self, with_body: bool) -> None:
        try:
            exposition = self.server.scrape()
        except MarwrightError as exc:  # it has not begun yet
            self._send(503, "application/problem+json", {**exc.to_json(), "status": 503}, with_body)
            return
        openmetrics = "application/openmetrics-text" in self.headers.get("Accept", "")
        content = exposition.render(openmetrics=openmetrics)
        self._write(200, OPENMETRICS if openmetrics else TEXT, content, with_body)

    def _has_key(self) -> bool:
        sent = self.headers.get(KEY_HEADER, "").encode("utf-8", "replace")
        return bool(self.server.key) and hmac.compare_digest(sent, self.server.key)

    def _send(self, code: int, kind: str, body: Any, with_body: bool) -> None:
        self._write(code, kind, json.dumps(body).encode(), with_body)

    def _write(self, code: int, kind: str, content: bytes, with_body: bool) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def version_string(self) -> str:
        """Name no versions."""
        return "marwright"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: who asks every second is not worth a line."""


def _list_reasons(status: Status, path: str) -> list[str] | None:
    """Return why a question's answer is no; None where there is no such question."""
    return _REASONS[path](status) if path in _REASONS else None


_REASONS: dict[str, Callable[[Status], list[str]]] = {
    "/live": lambda status: status.not_live,
    "/ready": lambda status: status.not_ready,
    "/started": lambda status: (
        [] if status.started else [*status.not_ready, "it was not ready yet"]
    ),
}


def open_health(
    read: Callable[[], Status],
    ports: PortSettings | Literal["free"],
    *,
    last: int = 0,
    **options: Any,
) -> Health:
    """Return the endpoints at the configured port; at `last`, if they may be anywhere.

    `options` are those of Health. A port that nobody has chosen, since it is the default, gives way
    to a free one.

    Raises:
        PortTakenError: somebody else listens at the chosen port.
    """
    try:
        return Health(read, port=last if ports == "free" else ports.health, **options)
    except PortTakenError:
        if ports != "free" and "health" in ports.model_fields_set:
            raise
    health = Health(read, port=0, **options)
    if ports != "free":
        _log.warning("port %d is taken; the health endpoints are at %s", ports.health, health.url)
    return health
