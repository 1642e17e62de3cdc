"""What every request passes first: host, origin, size, session; and what every answer carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marwright.monitor.page.access import Access, find_host_problem, find_names, is_own_origin

__all__ = ["Barrier", "SECURITY_HEADERS", "TooLargeError"]

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
FORM_BYTES = 1 << 16
"""Of a form without a file; of one with a file it comes on top."""

Refuse = Callable[[Scope, int, str], ASGIApp]
"""Makes the answer to a request that is refused."""


class Barrier:
    """Refuses what nobody may ask, before anything of it is read."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        served: str,
        cookie: str,
        file_bytes: Callable[[], int],
        refuse: Refuse,
    ) -> None:
        self._app = app
        self._access = access
        self._served = served
        self._names = find_names(served)
        """Found once: a name server may take its time, and requests wait in the event loop."""
        self._cookie = cookie
        self._file_bytes = file_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["session"] = ""
        limit = FORM_BYTES
        status, why = await self._judge(scope, headers)
        if not status:  # nobody else has files read for it
            limit = await self._find_limit(scope)
            status, why = _judge_length(headers, limit)
        app = self._refuse(scope, status, why) if status else self._app
        await app(scope, _count(receive, limit), _add_headers(send, scope["path"]))

    async def _find_limit(self, scope: Scope) -> int:
        uploads = scope["method"] == "POST" and scope["path"] == "/try"
        return FORM_BYTES + (await run_in_threadpool(self._file_bytes) if uploads else 0)

    async def _judge(self, scope: Scope, headers: Headers) -> tuple[int, str]:
        """Return the status and the reason to refuse a request with; 0 to let it through."""
        if problem := find_host_problem(headers.get("host", ""), self._served, self._names):
            return 421, f"The Host of this request cannot be meant: {problem}."
        if scope["method"] not in {"GET", "HEAD"} and not is_own_origin(headers):
            return 403, "Another site's page has sent this; nothing was done."
        if _is_open(scope["path"]):
            return 0, ""
        session = _read_cookie(headers, self._cookie)
        if session and self._access.is_session(session):
            scope["state"]["session"] = session
            return 0, ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return 401, ""
        if self._access.is_token(token.strip()):
            return 0, ""
        is_waited = await self._access.pause()
        return (401, "That is not the token.") if is_waited else (429, "Too many wrong tokens.")


def _judge_length(headers: Headers, limit: int) -> tuple[int, str]:
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:18]) > limit:
        return 413, f"This is more than {limit:,} bytes; see limits.request_bytes."
    return 0, ""


def _is_open(path: str) -> bool:
    """Whether a path needs no token: the page to sign in at, its style and its script."""
    return path == "/login" or path.startswith("/static/")


def _read_cookie(headers: Headers, name: str) -> str:
    """Return a cookie of a request; "" where there is none."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


class TooLargeError(Exception):
    """A body went on beyond what it may have."""


def _count(receive: Receive, limit: int) -> Receive:
    """Return a `receive` that ends a body which is longer than it may be."""
    total = 0

    async def receive_counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise TooLargeError
        return message

    return receive_counted


def _add_headers(send: Send, path: str) -> Send:
    """Return a `send` that adds the headers of each answer."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _list_headers(path):
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _list_headers(path: str) -> Iterable[tuple[str, str]]:
    yield from SECURITY_HEADERS.items()
    if not path.startswith("/static/"):
        yield "Cache-Control", "no-store"
