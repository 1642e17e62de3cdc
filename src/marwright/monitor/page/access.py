"""Who may see the page: its token, the sessions of browsers, and which requests are refused.

A browser signs in once, and keeps a random session in a cookie that no script reads and no other
site's page sends. What changes anything must come from the page itself: its Origin is compared, and
the form carries a code that belongs to the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from marwright.errors import UsageError
from marwright.server.registry import state_folder
from marwright.storage import translate_os_errors

__all__ = [
    "Access",
    "find_host_problem",
    "find_names",
    "is_loopback",
    "is_own_origin",
    "keep_token",
]

SESSION_SECONDS = 12 * 3600.0
SESSIONS = 1000
"""Most at a time; the oldest goes."""
TICKET_SECONDS = 600.0
"""How long the address that was printed signs in, once."""
SHORTEST_TOKEN = 16
LONGEST_TOKEN = 512
CALM_SECONDS = 60.0
"""After which a wrong token is forgotten."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 4.0
WAITING = 16
"""Wrong tokens that are kept waiting at a time; further ones are refused at once."""


def keep_token(path: Path | None = None, *, name: str = "") -> tuple[str, Path]:
    """Return the token of a file, and the file: the one given, or one below the state folder.

    One is made where there is none, for this user alone.

    Raises:
        UsageError: others may read the file, or its token is too short or too long.
    """
    path = path or state_folder() / "dashboard" / f"{name}.token"
    with translate_os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(secrets.token_urlsafe(32) + "\n")
    with translate_os_errors(f"read {path}"):
        mode = path.stat().st_mode & 0o077
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    if mode:
        raise UsageError(
            f"others may read the token in {path}",
            expected="mode 600",
            found=f"{path.stat().st_mode & 0o777:o}",
            remedy=f"chmod 600 {path}",
        )
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not token.isascii():
        raise UsageError(
            f"the token in {path} cannot be used",
            expected=f"{SHORTEST_TOKEN} to {LONGEST_TOKEN} ASCII characters",
            found=f"{len(token)} characters",
            remedy="remove the file, and another one is made",
        )
    return token, path


class Access:
    """Tokens, tickets and sessions of one page."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._key = secrets.token_bytes(32)
        """Of what is derived from a session; as short-lived as this process."""
        self._sessions: dict[bytes, float] = {}
        self._tickets: dict[bytes, float] = {}
        self._failures = 0
        self._failed_at = 0.0
        self._waiting = 0

    def make_ticket(self) -> str:
        """Return a text that signs in once, within some minutes."""
        ticket = secrets.token_urlsafe(24)
        self._tickets[_digest(ticket)] = time.monotonic() + TICKET_SECONDS
        return ticket

    def is_token(self, text: str) -> bool:
        """Whether it is the page's token; takes as long for one that nearly is."""
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token)

    def sign_in(self, text: str) -> str | None:
        """Return a new session for the token or for a ticket, which is used up; None for others."""
        until = self._tickets.pop(_digest(text), 0.0)
        if time.monotonic() >= until and not self.is_token(text):
            return None
        session = secrets.token_urlsafe(32)
        while len(self._sessions) >= SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        self._sessions[_digest(session)] = time.monotonic() + SESSION_SECONDS
        return session

    def sign_out(self, session: str) -> None:
        """Forget a session."""
        self._sessions.pop(_digest(session), None)

    def is_session(self, session: str) -> bool:
        """Whether somebody signed in so, and not too long ago."""
        until = self._sessions.get(_digest(session), 0.0)
        if time.monotonic() < until:
            return True
        self._sessions.pop(_digest(session), None)
        return False

    def make_code(self, session: str) -> str:
        """Return what each form of a session carries."""
        return hmac.new(self._key, session.encode(), hashlib.sha256).hexdigest()

    def is_code(self, session: str, code: object) -> bool:
        """Whether a form was made for this session."""
        sent = code.encode("utf-8", "replace") if isinstance(code, str) else b""
        return hmac.compare_digest(self.make_code(session).encode(), sent)

    async def pause(self) -> bool:
        """Wait after a wrong token, longer each time; return False where too many wait already."""
        now = time.monotonic()
        if now - self._failed_at > CALM_SECONDS:
            self._failures = 0
        self._failures, self._failed_at = self._failures + 1, now
        if self._waiting >= WAITING:
            return False
        self._waiting += 1
        try:
            exponent = min(self._failures - 1, 10)
            await asyncio.sleep(min(FIRST_PAUSE * 2**exponent, LONGEST_PAUSE))
        finally:
            self._waiting -= 1
        return True


def _digest(text: str) -> bytes:
    """Return what is looked up in place of a secret, so that the look-up's time tells nothing."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def find_names(served: str) -> frozenset[str]:
    """Return the names that the page has, listening at `served`; it may ask a name server."""
    names = {"localhost", served}
    if not is_loopback(served):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def find_host_problem(host: str, served: str, names: Collection[str]) -> str:
    """Return why a request's Host cannot be meant; "" where it can.

    A page elsewhere may have its own name lead to this address (DNS rebinding), and would then
    count as the same site. It has a name; so names other than this machine's are refused, and
    addresses are not. `served` is the address that the page listens at; `names`: see find_names.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return "it names no host"
    if is_loopback(served) and not is_loopback(name):
        return "it names another host"
    if name in names:
        return ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "it names another host"
    return ""


def is_own_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request that changes something was sent by the page itself, or by no browser.

    Browsers say with each POST where it came from. The page's own say "Origin: null", since it has
    them name no referrer; Sec-Fetch-Site tells these from others. A browser that is too old for it
    is held by the cookie, which no other site's page sends, and by the form's code.
    """
    if headers.get("sec-fetch-site", "same-origin") not in {"same-origin", "none"}:
        return False
    return headers.get("origin", "null") in {"null", f"http://{headers.get('host', '')}"}
