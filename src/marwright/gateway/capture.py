"""The requests that a gateway copies for shadow tests, caught at a Unix socket."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from marwright.errors import StorageError
from marwright.gateway.configuration import CAPTURE_SOCKET
from marwright.storage import translate_os_errors

__all__ = ["Capture", "Captured"]

SECONDS = 5.0
"""How long a copy may take to arrive."""
MOST_THREADS = 8


@dataclass(frozen=True)
class Captured:
    """One copied request."""

    request: str
    """Its X-Request-ID."""
    method: str
    path: str
    """With its query, as the client sent it."""
    content_type: str
    body: bytes


class Capture:
    """A server at a gateway's capture socket that keeps the latest requests.

    Use it as a context manager. What does not fit is counted in `dropped`, and the gateway's
    clients notice nothing.
    """

    def __init__(
        self, folder: Path, *, most: int = 256, body_bytes: int = 1 << 20, all_bytes: int = 64 << 20
    ) -> None:
        """Keep at most `most` requests of `body_bytes` each and `all_bytes` together."""
        self._path = folder / CAPTURE_SOCKET
        self._most = most
        self.body_bytes = body_bytes
        self._all_bytes = all_bytes
        self._kept: deque[Captured] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def __enter__(self) -> Capture:
        """Listen.

        Raises:
            StorageError: somebody else listens there, or the folder cannot be written.
        """
        with translate_os_errors(f"write {self._path}"):
            _refuse_other(self._path)
            self._path.unlink(missing_ok=True)
            self._server = _Server(self._path, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening; what was kept can still be taken."""
        self._path.unlink(missing_ok=True)
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def take(self) -> list[Captured]:
        """Return what was kept, oldest first, and forget it."""
        with self._lock:
            taken = list(self._kept)
            self._kept.clear()
            self._bytes = 0
        return taken

    def keep(self, captured: Captured) -> None:
        """Keep one more in place of the oldest ones that leave no room for it."""
        with self._lock:
            self._kept.append(captured)
            self._bytes += len(captured.body)
            while len(self._kept) > self._most or self._bytes > self._all_bytes:
                self._bytes -= len(self._kept.popleft().body)
                self.dropped += 1

    def drop(self) -> None:
        """Count a request that is not kept."""
        with self._lock:
            self.dropped += 1


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, path: Path, capture: Capture) -> None:
        self.capture = capture
        self._room = threading.BoundedSemaphore(MOST_THREADS)
        self._path = path
        super().__init__(str(path), _Handler)

    def server_bind(self) -> None:
        """Bind through the folder's descriptor: a Unix socket's path ends after 107 bytes."""
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.socket.bind(f"/proc/self/fd/{descriptor}/{self._path.name}")
        finally:
            os.close(descriptor)
        self._path.chmod(0o600)

    def process_request(self, request: object, client_address: object) -> None:
        if not self._room.acquire(blocking=False):
            self.capture.drop()
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Let be a copy that broke off."""
        self.capture.drop()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SECONDS

    def _receive(self) -> None:
        capture = self.server.capture
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= capture.body_bytes:
            capture.drop()
            self.close_connection = True
            self.send_response_only(413)
            self.end_headers()
            return
        body = self.rfile.read(length)
        if len(body) < length:
            capture.drop()
            return
        capture.keep(
            Captured(
                request=self.headers.get("X-Request-ID", ""),
                method=self.command,
                path=self.headers.get("X-Original-URI", self.path),
                content_type=self.headers.get("Content-Type", ""),
                body=body,
            )
        )
        self.send_response_only(204)
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _receive

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _refuse_other(path: Path) -> None:
    """Raise StorageError where a server listens at a socket; a left one is nobody's."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            other.connect(f"/proc/self/fd/{descriptor}/{path.name}")
        except OSError:
            return
        finally:
            os.close(descriptor)
    raise StorageError(f"{path} is in use", remedy="end the other shadow test first")
