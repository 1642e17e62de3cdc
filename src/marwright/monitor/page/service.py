"""The page's own HTTP server, in a thread of its process."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from types import TracebackType

import uvicorn

from marwright.errors import PortTakenError, ServerError
from marwright.monitor.page.access import Access, is_loopback
from marwright.monitor.page.app import build_app
from marwright.monitor.page.sources import Sources
from marwright.monitor.page.stream import Broadcast
from marwright.monitor.page.views import Views

__all__ = ["Service", "warn_of_host"]

START_SECONDS = 20.0
END_SECONDS = 3
"""How long answers may take that are on their way when it ends."""
VIEWERS = 200
"""Most who watch at a time."""
OTHERS = 64
"""Connections besides."""


class Service:
    """Serves the page of one server; use it in a `with` block.

    `port` 0 is a free one; `url` says which. `viewers` may watch at a time.

    Raises:
        PortTakenError: somebody else listens there, or no such address is ours.
    """

    def __init__(
        self, sources: Sources, token: str, *, host: str, port: int, viewers: int = VIEWERS
    ) -> None:
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}/"
        self.access = Access(token)
        views = Views(sources)
        self._broadcast = Broadcast(views.wait, views.draw, views.notice, most=viewers)
        # Cookies are shared by all ports of a host.
        options = {"served": host.lower(), "cookie": f"marwright-{self.port}"}
        config = uvicorn.Config(
            build_app(sources, self.access, self._broadcast, views, **options),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            proxy_headers=False,
            limit_concurrency=viewers + OTHERS,
            timeout_graceful_shutdown=END_SECONDS,
        )
        # Its errors are ours, which the app logs, and viewers that were dropped.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    def make_address(self) -> str:
        """Return an address that signs in once.

        What signs in stands behind the #, which no browser sends: neither to a log, nor to the
        next page as a referrer.
        """
        return f"{self.url}login#{self.access.make_ticket()}"

    def __enter__(self) -> Service:
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._socket.close()
                raise ServerError("the page could not be started")
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._broadcast.close()
        self._server.should_exit = True
        self._thread.join(END_SECONDS + 5)
        self._socket.close()

    def wait(self) -> None:
        """Return once it has ended by itself, or somebody interrupts this thread."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(socket.socket(family))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
        except OSError as exc:
            raise PortTakenError(
                f"the page cannot listen at {host}:{port}",
                found=exc.strerror or str(exc),
                remedy="choose another: --port, or --port 0 for a free one",
            ) from exc
        stack.pop_all()
    listening.set_inheritable(False)
    return listening


def warn_of_host(host: str) -> str:
    """Return what to say where others than this machine can reach the page; "" where none can."""
    if is_loopback(host):
        return ""
    return (
        f"{host} is no loopback address: the page is plain HTTP, and whoever hears it can read its"
        " token and take releases back; better reach it through ssh -L"
    )
