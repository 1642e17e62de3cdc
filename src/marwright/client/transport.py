"""Sending with requests: one request, one answer, and our errors for the library's own."""

from __future__ import annotations

import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeVar

import requests
import urllib3

from marwright.client.calls import Pause, Request, Response, Steps
from marwright.client.endpoint import Endpoint
from marwright.client.exchange import Exchanges
from marwright.client.faults import (
    answer_broke_off,
    cannot_send,
    no_server,
    not_trusted,
    too_late,
)
from marwright.client.loops import drive
from marwright.errors import ClientError

__all__ = ["make_session", "send", "Transport"]

Result = TypeVar("Result")


class Transport:
    """Takes exchanges to their end; the session is injected and not owned."""

    def __init__(self, exchanges: Exchanges, session: requests.Session) -> None:
        self._exchanges = exchanges
        self.session = session

    def run(self, steps: Steps[Result]) -> Result:
        """Do what the steps say, and return their result."""
        return drive(self._exchanges.run(steps), self._take)

    def _take(self, step: Request | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return send(self.session, step)


def make_session(endpoint: Endpoint, connections: int) -> requests.Session:
    """Return a session for one server that keeps so many connections open."""
    session = requests.Session()
    session.trust_env = False  # no proxy and no .netrc between us and loopback
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=connections)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    if endpoint.certificate is not None:
        session.verify = str(endpoint.certificate)
    return session


def send(session: requests.Session, request: Request) -> Response:
    """Send one request and return its answer.

    Raises:
        ClientError: the member of the family that fits; see marwright.errors.
    """
    ends_at = time.monotonic() + request.timeout
    try:
        # stream=True: the body is read below, against the deadline of the whole call. Redirects
        # are not followed: TorchServe sends none, and our headers are for this server alone.
        with session.request(
            request.method,
            request.url,
            data=request.body or None,
            headers=request.headers,
            timeout=request.timeout,
            stream=True,
            allow_redirects=False,
        ) as answer:
            body = _read_body(answer, request, ends_at)
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as exc:
        # requests' own are OSErrors; it lets through some of urllib3's, ValueErrors of odd hosts,
        # and an OSError where a certificate file is missing.
        if isinstance(exc, ClientError):
            raise
        raise _translate(exc, request) from exc
    return Response(answer.status_code, answer.reason or "", answer.headers, body)


def _read_body(answer: requests.Response, request: Request, ends_at: float) -> bytes:
    """Return the body; each wait for bytes has the connection's timeout, all have the deadline."""
    raw = answer.raw
    # Before 2.1 urllib3 could only wait until as much had come as was asked for.
    read = getattr(raw, "read1", raw.read)
    chunks = []
    while chunk := read(decode_content=True):
        chunks.append(chunk)
        if time.monotonic() > ends_at and raw.length_remaining != 0:
            raise too_late(request)
    if raw.length_remaining:  # read1 does not ask whether that was all
        raise answer_broke_off(request)
    return b"".join(chunks)


def _translate(exc: Exception, request: Request) -> ClientError:
    """Return our error for one of the library's."""
    if _is_timeout(exc):
        return too_late(request)
    if isinstance(exc, (requests.exceptions.SSLError, urllib3.exceptions.SSLError)):
        return not_trusted(request, exc)
    if isinstance(
        exc, (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.ProtocolError)
    ):
        return answer_broke_off(request)
    if isinstance(exc, requests.ConnectionError):
        return no_server(request)
    return cannot_send(request, exc)


def _is_timeout(exc: Exception) -> bool:
    """Tell a timeout; requests calls one in the middle of a body a ConnectionError."""
    cause = exc.args[0] if exc.args else None
    kinds = (requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)
    return isinstance(exc, kinds) or isinstance(cause, urllib3.exceptions.ReadTimeoutError)
