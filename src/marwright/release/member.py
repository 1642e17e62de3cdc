"""One server of a fleet, as who leads a release reaches it: over its gateway's /control."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from marwright.archive.signature import signature_path
from marwright.errors import (
    ConnectionFailedError,
    MarwrightError,
    ReleaseError,
    TokenRejectedError,
)
from marwright.server.sections import ServerSettings
from marwright.storage import translate_os_errors

__all__ = ["Member"]

CONNECT_SECONDS = 3.0
CHECK_SECONDS = 180.0
"""An archive is checked there, samples and all."""
UPLOAD_SECONDS = 600.0
SHOWN = 200
_AWAY = (502, 503, 504)
"""What a gateway answers whose site is away: it may come back."""


class Member:
    """Talks to one server, until `close`. One thread at a time.

    `patience`: seconds that a word may take, well below the lease of the others that wait for it.
    """

    def __init__(self, settings: ServerSettings, *, patience: float) -> None:
        self._patience = patience
        self.name = urlsplit(settings.url).netloc
        self._url = settings.url.rstrip("/")
        self._token_file = settings.token
        with translate_os_errors(f"read {settings.token}"):
            token = settings.token.read_text("utf-8").strip()
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy shall see the token
        self._session.headers["Authorization"] = f"Bearer {token}"
        if settings.authority is not None:
            self._session.verify = str(settings.authority)
        self.heard = time.monotonic()
        """When it answered last."""

    def close(self) -> None:
        """End its connections."""
        self._session.close()

    def upload(self, path: Path, digest: str) -> None:
        """Put an archive there, and its signature if it has one."""
        for source in (path, signature_path(path)):
            if not source.exists():
                continue
            with translate_os_errors(f"read {source}"), source.open("rb") as stream:
                target = f"archives/{digest}/{source.name}"
                self._ask("PUT", target, seconds=UPLOAD_SECONDS, data=stream)

    def check(self, asked: Mapping[str, Any]) -> Any:
        """Return the candidate that the archive would be there; raises ReleaseError."""
        return self._ask("POST", "check", seconds=CHECK_SECONDS, json=asked)

    def begin(self, asked: Mapping[str, Any]) -> Any:
        """Have it released there, step by step, as far as its words let it."""
        return self._ask("POST", "begin", json=asked)

    def say(self, asked: Mapping[str, Any]) -> Any:
        """Say a word, and return how the release stands there."""
        return self._ask("POST", "say", json=asked)

    def _ask(self, method: str, path: str, *, seconds: float | None = None, **body: Any) -> Any:
        """Return what it answers.

        Raises:
            ConnectionFailedError: it cannot be reached, or is not what it is said to be; or its
                gateway answers alone.
            TokenRejectedError: the token is wrong.
            ReleaseError: it refuses, and says why.
        """
        try:
            response = self._session.request(
                method,
                f"{self._url}/control/{path}",
                timeout=(min(CONNECT_SECONDS, self._patience), seconds or self._patience),
                allow_redirects=False,
                **body,
            )
        except requests.RequestException as exc:
            raise ConnectionFailedError(
                f"{self.name} cannot be reached", found=_name_cause(exc)
            ) from exc
        if response.status_code in _AWAY:
            raise ConnectionFailedError(
                f"{self.name} cannot be reached", found=f"its gateway says {response.status_code}"
            )
        self.heard = time.monotonic()
        if response.ok:
            return response.json() if response.content else None
        raise self._explain(response)

    def _explain(self, response: requests.Response) -> MarwrightError:
        """Return why it does not do what was asked."""
        status = response.status_code
        if status == requests.codes.unauthorized:
            return TokenRejectedError(
                f"{self.name} does not take the token of {self._token_file}", status=status
            )
        if status == requests.codes.not_found:
            return ReleaseError(
                f"{self.name} takes no releases from elsewhere",
                remedy="name a file of tokens in its deploy.yaml: gateway.control",
            )
        try:
            return ReleaseError.from_json(response.json())
        except (ValueError, KeyError, TypeError):
            return ReleaseError(
                f"{self.name} answered {status}", found=response.text[:SHOWN].strip()
            )


def _name_cause(error: requests.RequestException) -> str:
    """Return the innermost reason: requests wraps it in names of its own."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) and (
        isinstance(inner, BaseException)
    ):
        cause = inner
    return str(cause) or type(cause).__name__
