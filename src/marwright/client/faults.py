"""What goes wrong between a client and a server, said alike whichever library sends."""

from __future__ import annotations

from marwright.client.calls import Request
from marwright.errors import ClientError, ConnectionFailedError, RequestTimeoutError

__all__ = ["answer_broke_off", "cannot_send", "no_server", "not_trusted", "too_late"]


def too_late(request: Request) -> RequestTimeoutError:
    """Return the error of a request whose time is over."""
    return RequestTimeoutError(
        f"no answer from {_read_address(request)}",
        expected=f"one within {request.limit:g} s",
        found="silence",
        remedy="raise --timeout, or look at the server's log",
    )


def not_trusted(request: Request, exc: BaseException) -> ClientError:
    """Return the error of a server whose certificate nobody vouches for."""
    return ClientError(
        f"{_read_address(request)} has no certificate that is trusted",
        found=str(exc),
        remedy="name its certificate, or the one that signed it, in the endpoint",
    )


def answer_broke_off(request: Request) -> ConnectionFailedError:
    """Return the error of an answer that was not whole, or not HTTP."""
    return ConnectionFailedError(
        f"the answer from {_read_address(request)} broke off",
        remedy="look whether the server still runs, and at its log",
    )


def no_server(request: Request) -> ConnectionFailedError:
    """Return the error of a connection that was refused, or lost before an answer."""
    return ConnectionFailedError(
        f"no server answers at {_read_address(request)}",
        remedy="start one with marwright serve, or check the address",
    )


def cannot_send(request: Request, exc: BaseException) -> ClientError:
    """Return the error of what is no request, or no address."""
    return ClientError(
        f"cannot send the request to {_read_address(request)}",
        found=str(exc),
        remedy="check the address, such as http://127.0.0.1:8080",
    )


def _read_address(request: Request) -> str:
    return request.url.partition("?")[0]
