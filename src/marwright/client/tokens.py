"""TorchServe's tokens: read from its key file, renewed before they expire, never shown.

The file is written by org.pytorch.serve.util.TokenAuthorization; docs/token_authorization_api.md
describes `GET /token`.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from marwright.errors import TokenRejectedError

__all__ = ["KeyText", "Purpose", "TokenFile"]

Purpose = Literal["inference", "management", "API"]

RENEW_SECONDS = 60.0
"""A token is renewed this long before it expires, or for the last tenth of its life."""
REST_SECONDS = 30.0
"""After a renewal ahead of time this long none follows, whatever this machine's clock says."""

_claims: set[tuple[Path, str]] = set()
"""Who renews what in this process, whichever client it is of."""
_claiming = threading.Lock()


class WatchedFile(ABC):
    """A small file that is read again only after it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._content: Callable[[], Any] | None = None  # a closure shows nothing in a dump

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def forget(self) -> None:
        """Read it anew the next time; two changes may lie within one tick of its clock."""
        self._stamp = None

    def load(self) -> Any:
        """Return what `parse` made of the file.

        Raises OSError, or what `parse` raises where nothing was read before.
        """
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        content = self._content
        if content is None or stamp != self._stamp:
            text = self.path.read_text(encoding="utf-8")
            try:
                value = self.parse(text, status)
            except (ValueError, KeyError, TypeError):
                # TorchServe writes in place: whoever reads meanwhile finds a half. What it held
                # before is as good as nothing, and better where only the other token is new.
                if content is None or text.endswith("}"):
                    raise
                return content()
            self._content = content = lambda: value
            self._stamp = stamp
        return content()

    @abstractmethod
    def parse(self, text: str, status: os.stat_result) -> Any:
        """Make of the text what is wanted of it; raise ValueError, KeyError or TypeError."""


class TokenFile(WatchedFile):
    """A key_file.json; TorchServe writes it at its start and at each renewal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._renewed_at: dict[str, float] = {}
        """When each token was last renewed ahead of time, by the monotonic clock."""

    def parse(self, text: str, status: os.stat_result) -> dict[str, Any]:
        """Return the entries, each with the moment from which on it is to be renewed."""
        entries = json.loads(text)
        for entry in entries.values():
            expiry = _read_time(entry.get("expiration time"))
            # The file's own time stands for the token's birth: it is that or later, so that a
            # token is thought younger than it is, and a rejected one is renewed in any case.
            life = max(0.0, expiry - status.st_mtime)
            entry["renewal"] = expiry - min(RENEW_SECONDS, life / 10)
        return dict(entries)

    def read(self, purpose: Purpose) -> str:
        """Return the current token for the inference, management or token API.

        Raises:
            TokenRejectedError: the file is missing or broken; a status of 0, since none was sent.
        """
        try:
            return _check_text(self.load()[purpose]["key"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise TokenRejectedError(
                f"cannot read the {purpose} token from {self.path}",
                status=0,
                detail="",
                remedy=_choose_remedy(exc),
            ) from exc

    def is_due(self, purpose: Purpose) -> bool:
        """Tell whether a token should be renewed now, before it expires."""
        try:
            renewal: float = self.load()[purpose]["renewal"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # reading it says why
        if time.time() < renewal:
            return False
        return time.monotonic() >= self._renewed_at.get(purpose, -REST_SECONDS) + REST_SECONDS

    def claim(self, purpose: Purpose) -> bool:
        """Begin to renew a token, unless somebody in this process does so; never waits."""
        with _claiming:
            key = (self.path, purpose)
            if key in _claims:
                return False
            _claims.add(key)
            return True

    def release(self, purpose: Purpose) -> None:
        """End a renewal, whatever came of it."""
        self._renewed_at[purpose] = time.monotonic()
        self.forget()
        with _claiming:
            _claims.discard((self.path, purpose))


class KeyText(WatchedFile):
    """A file of one line that a header carries: the supervisor's key."""

    def parse(self, text: str, status: os.stat_result) -> str:
        """Return the line."""
        return _check_text(text.strip())

    def read(self) -> str:
        """Return the key.

        Raises:
            TokenRejectedError: the file is missing or broken; a status of 0, since none was sent.
        """
        try:
            return str(self.load())
        except (OSError, ValueError) as exc:
            raise TokenRejectedError(
                f"cannot read the supervisor's key from {self.path}",
                status=0,
                remedy=_choose_remedy(exc),
            ) from exc


def _choose_remedy(exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return "the server is starting or has stopped: marwright status"
    return "check that you may read it, and that the server wrote it"


def _check_text(token: Any) -> str:
    """Return a secret; what no header can carry, libraries would quote in their exceptions."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("not a token")
    return str(token)


def _read_time(text: Any) -> float:
    """Return a moment in seconds since 1970; a token that names none that can be read never ends.

    Java writes as many digits as it needs, up to nine: 2026-11-23T23:39:32.045123456Z.
    """
    found = re.fullmatch(r"([\d-]+T[\d:]+)(\.\d+)?Z", text if isinstance(text, str) else "")
    if found is None:
        return float("inf")
    moment = datetime.fromisoformat(found[1]).replace(tzinfo=timezone.utc)
    return moment.timestamp() + float(found[2] or 0)
