"""One request over HTTP: tokens added, foreign exceptions translated, safe retries only."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import requests
import urllib3

from marwright.client.tokens import Purpose, TokenFile
from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    InputRejectedError,
    MarwrightError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
)

__all__ = ["Transport"]

_log = logging.getLogger(__name__)

RETRY_PAUSES = (0.05, 0.2, 0.5)
"""Seconds before the second, third and fourth try."""

# TorchServe's exception names (org.pytorch.serve.archive, .http, .util) in the body's "type".
_ERRORS: dict[str, tuple[type[AnswerError], str]] = {
    "InvalidKeyException": (TokenRejectedError, "pass the server's key file with --key-file"),
    "ModelNotFoundException": (ModelNotFoundError, "see what is there: marwright models list"),
    "ModelVersionNotFoundException": (
        ModelNotFoundError,
        "see which versions there are: marwright models show NAME",
    ),
    "ConflictStatusException": (ConflictError, "unregister it first, or register another version"),
    "ServiceUnavailableException": (
        OverloadedError,
        "wait until a worker is READY, or add workers: marwright models scale",
    ),
    "InvalidModelVersionException": (ConflictError, "make another version the default first"),
    "MethodNotAllowedException": (ConflictError, "start the server with enable_model_api=true"),
}


class Transport:
    """Sends requests to one API of a server; the session is injected and not owned."""

    def __init__(
        self,
        session: requests.Session,
        url: str,
        *,
        purpose: Purpose,
        tokens: TokenFile | None,
        timeout: float,
        renew_url: str | None = None,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._purpose = purpose
        self._tokens = tokens
        self._timeout = timeout
        """Seconds for each try: connecting, and each wait for bytes."""
        self._renew_url = (renew_url or url).rstrip("/")

    def send(
        self,
        method: str,
        path: str,
        *,
        retry: bool,
        params: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **body: Any,
    ) -> requests.Response:
        """Send one request and return its successful answer.

        `retry` says whether it is safe to send it twice: reading, and predictions (a handler has
        no memory of requests). Then lost connections and full queues are tried again.

        Raises:
            ClientError: the member of the family that fits; see marwright.errors.
        """
        pauses = list(RETRY_PAUSES) if retry else []
        renewed = False
        while True:
            try:
                return self._send_once(method, path, params, timeout, body)
            except TokenRejectedError:
                # A rejected request had no effect, so sending it again is safe for all of them.
                if renewed or not self._renew():
                    raise
                renewed = True
            except (ConnectionFailedError, OverloadedError) as exc:
                if not pauses:
                    raise
                pause = pauses.pop(0)
                _log.debug("%s %s: %s; trying again in %.2f s", method, path, exc, pause)
                time.sleep(pause)

    def _send_once(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        timeout: float | None,
        body: Mapping[str, Any],
    ) -> requests.Response:
        if not self._url:
            raise UsageError(
                f"the server's {self._purpose} address is not known",
                remedy=f"pass --{self._purpose}-url http://HOST:PORT",
            )
        url = self._url + path
        options = dict(body)
        headers = dict(options.pop("headers", None) or {})
        if self._tokens is not None:
            headers["Authorization"] = f"Bearer {self._tokens.read(self._purpose)}"
        limit = self._timeout if timeout is None else timeout
        response = _request(
            self._session, method, url, limit, params=params, headers=headers, **options
        )
        if response.status_code >= 400:
            raise _translate(response, f"{method} {path}")
        return response

    def _renew(self) -> bool:
        """Ask the server for a fresh token; return whether it gave one into the key file."""
        if self._tokens is None:
            return False
        try:
            _request(
                self._session,
                "GET",
                f"{self._renew_url}/token",
                self._timeout,
                params={"type": self._purpose},
                headers={"Authorization": f"Bearer {self._tokens.read('API')}"},
            ).raise_for_status()
        except (MarwrightError, requests.HTTPError):
            return False
        return True


def _request(
    session: requests.Session, method: str, url: str, timeout: float, **options: Any
) -> requests.Response:
    """Send with requests, and raise our errors for its own."""
    try:
        # stream=False: an injected session may ask otherwise, and a body that is read later would
        # raise where nothing is translated.
        return session.request(method, url, timeout=timeout, stream=False, **options)
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as exc:
        # requests' own are OSErrors; it lets through some of urllib3's, ValueErrors of odd hosts,
        # and an OSError where a certificate file is missing.
        if _is_timeout(exc):
            raise RequestTimeoutError(
                f"no answer from {url}",
                expected=f"one within {timeout:g} s",
                found="silence",
                remedy="raise --timeout, or look at the server's log",
            ) from exc
        if isinstance(exc, requests.exceptions.ChunkedEncodingError):
            raise ConnectionFailedError(
                f"the answer from {url} broke off",
                remedy="look whether the server still runs, and at its log",
            ) from exc
        if isinstance(exc, requests.ConnectionError):
            raise ConnectionFailedError(
                f"no server answers at {url}",
                remedy="start one with marwright serve, or check the address",
            ) from exc
        raise ClientError(
            f"cannot send the request to {url}",
            found=str(exc),
            remedy="check the address, such as http://127.0.0.1:8080",
        ) from exc


def _is_timeout(exc: Exception) -> bool:
    """Tell a timeout; requests calls one in the middle of a body a ConnectionError."""
    cause = exc.args[0] if exc.args else None
    return isinstance(exc, requests.Timeout) or isinstance(
        cause, urllib3.exceptions.ReadTimeoutError
    )


def _translate(response: requests.Response, request: str) -> AnswerError:
    """Return the error that fits TorchServe's or a handler's answer."""
    status, body = response.status_code, response.content
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    if "type" in problem and "message" in problem and "code" in problem:
        # The first sentence: some go on about features that were not asked for.
        message = " ".join(str(problem["message"]).split()).split(". ")[0]
        kind, remedy = _ERRORS.get(str(problem["type"]), (AnswerError, ""))
        return kind(f"{message} ({status})", status=status, body=body, remedy=remedy)
    text = str(problem.get("detail") or body[:200].decode("utf-8", "replace") or response.reason)
    if status in {429, 503}:
        return OverloadedError(f"{request} answered {status}: {text}", status=status, body=body)
    kind = InputRejectedError if 400 <= status < 500 else AnswerError
    remedy = "send less, or raise max_request_size or the handler's limits" if status == 413 else ""
    return kind(f"{request} answered {status}: {text}", status=status, body=body, remedy=remedy)
