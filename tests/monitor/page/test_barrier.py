from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

pytest.importorskip("fastapi")

from starlette.responses import PlainTextResponse

from marwright.monitor.page.access import Access
from marwright.monitor.page.barrier import FORM_BYTES, Barrier

TOKEN = "a-token-of-the-tests"
UPLOAD_BYTES = 1000


class Guarded:
    """An application behind a barrier, and how often its limit was looked for."""

    def __init__(self, served: str = "127.0.0.1") -> None:
        self.looks = 0
        self._barrier = Barrier(
            PlainTextResponse("let through"),
            access=Access(TOKEN),
            served=served,
            cookie="c",
            file_bytes=self._find_limit,
            refuse=lambda scope, status, why: PlainTextResponse(why, status),
        )

    def _find_limit(self) -> int:
        self.looks += 1
        return UPLOAD_BYTES

    def ask(self, method: str = "GET", path: str = "/", **headers: str) -> int:
        """Return the status of the answer."""
        told = {"host": "127.0.0.1", **headers}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [
                (name.replace("_", "-").encode(), value.encode()) for name, value in told.items()
            ],
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self._barrier(scope, receive, send))
        return int(sent[0]["status"])


def test_the_limit_of_uploads_is_looked_for_only_for_who_may_upload() -> None:
    guarded = Guarded()
    assert guarded.ask("POST", "/try") == 401
    assert guarded.ask("POST", "/try", sec_fetch_site="cross-site") == 403
    assert guarded.looks == 0
    signed = {"authorization": f"Bearer {TOKEN}"}
    for length, status in ((FORM_BYTES + UPLOAD_BYTES, 200), (FORM_BYTES + UPLOAD_BYTES + 1, 413)):
        assert guarded.ask("POST", "/try", content_length=str(length), **signed) == status
    assert guarded.looks == 2
    assert guarded.ask("POST", "/rollback", content_length=str(FORM_BYTES + 1), **signed) == 413
    assert guarded.looks == 2


def test_no_name_server_is_asked_while_requests_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarded = Guarded("192.0.2.1")
    monkeypatch.setattr(socket, "getfqdn", lambda: pytest.fail("asked"))
    signed = {"authorization": f"Bearer {TOKEN}"}
    assert guarded.ask(**signed) == 200
    assert guarded.ask(host="evil.example", **signed) == 421
