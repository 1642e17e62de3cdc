"""Sending with aiohttp: one request, one answer, and our errors for the library's own."""

from __future__ import annotations

import asyncio
import functools
import io
import ssl
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from marwright.client.calls import Pause, Request, Response, Steps
from marwright.client.exchange import Exchanges
from marwright.client.faults import (
    answer_broke_off,
    cannot_send,
    no_server,
    not_trusted,
    too_late,
)
from marwright.client.loops import drive_async
from marwright.errors import ClientError, UsageError

__all__ = ["AsyncTransport"]

Result = TypeVar("Result")

LARGE_BODY_BYTES = 1 << 20
"""Above this aiohttp wants a stream: it writes bytes in one go, and nothing else runs meanwhile."""


class AsyncTransport:
    """Takes exchanges to their end; a session is made at the first, or injected and not owned."""

    def __init__(
        self, exchanges: Exchanges, session: aiohttp.ClientSession | None, connections: int
    ) -> None:
        self._exchanges = exchanges
        self._session = session
        self._owns_session = session is None
        self._connections = connections
        self._closed = False

    async def run(self, steps: Steps[Result]) -> Result:
        """Do what the steps say, and return their result."""
        session = self._open_session()

        async def take(step: Request | Pause) -> Any:
            if isinstance(step, Pause):
                return await asyncio.sleep(step.seconds)
            return await _send(session, step)

        return await drive_async(self._exchanges.run(steps), take)

    async def close(self) -> None:
        """Close the connections, unless the session was injected."""
        self._closed = True
        if self._owns_session and self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        """Return the session; it belongs to the loop that runs now, and so cannot be made before.

        Raises:
            UsageError: the client was closed.
        """
        if self._closed or (self._session is not None and self._session.closed):
            raise UsageError("the client is closed", remedy="make another one")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._make_ssl()),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
            )
            # aiohttp sends a PUT or DELETE again where a kept connection has ended meanwhile;
            # what is safe to send twice is known here alone.
            self._session._retry_connection = False
        return self._session

    def _make_ssl(self) -> ssl.SSLContext | bool:
        certificate = self._exchanges.endpoint.certificate
        if certificate is None:
            return True
        try:
            return ssl.create_default_context(cafile=str(certificate))
        except (OSError, ValueError) as exc:
            raise ClientError(
                f"cannot use the certificate {certificate}",
                found=str(exc),
                remedy="check that it is a PEM file that you may read",
            ) from exc


async def _send(session: aiohttp.ClientSession, request: Request) -> Response:
    """Send one request and return its answer.

    Raises:
        ClientError: the member of the family that fits; see marwright.errors.
    """
    large = len(request.body) > LARGE_BODY_BYTES
    try:
        # Redirects are not followed: TorchServe sends none, and our headers are for this server
        # alone.
        async with session.request(
            request.method,
            _parse_url(request.url),
            data=io.BytesIO(request.body) if large else request.body or None,
            headers=request.headers,
            timeout=aiohttp.ClientTimeout(total=request.timeout),
            allow_redirects=False,
        ) as answer:
            body = await answer.read()
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as exc:
        raise _translate(exc, request) from exc
    return Response(answer.status, answer.reason or "", answer.headers, body)


@functools.lru_cache(maxsize=256)
def _parse_url(url: str) -> URL:
    """Return an address as aiohttp takes it, its quoting left as it is."""
    return URL(url, encoded=True)


def _translate(exc: BaseException, request: Request) -> ClientError:
    """Return our error for one of the library's."""
    if isinstance(exc, (asyncio.TimeoutError, TimeoutError)):
        return too_late(request)
    if isinstance(exc, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return not_trusted(request, exc)
    if isinstance(exc, (aiohttp.ClientPayloadError, aiohttp.ClientResponseError)):
        return answer_broke_off(request)
    if isinstance(exc, aiohttp.ClientConnectionError):
        return no_server(request)
    return cannot_send(request, exc)
