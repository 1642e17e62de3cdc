from __future__ import annotations

import asyncio
import socket
import stat
import time
from pathlib import Path

import pytest

from marwright.errors import UsageError
from marwright.monitor.page import access
from marwright.monitor.page.access import (
    Access,
    find_host_problem,
    find_names,
    is_loopback,
    is_own_origin,
    keep_token,
)


def test_a_token_is_made_once_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    token, path = keep_token(name="shop")
    assert path == tmp_path / "marwright/dashboard/shop.token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 40
    assert keep_token(name="shop") == (token, path)
    assert keep_token(name="other")[0] != token


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a-token-that-is-long-enough")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        keep_token(path)
    path.chmod(0o600)
    assert keep_token(path)[0] == "a-token-that-is-long-enough"


@pytest.mark.parametrize("text", ["", "short", "x" * 600, "ä" * 40])
def test_a_token_that_is_no_good_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="cannot be used") as caught:
        keep_token(path)
    assert not text or text not in str(caught.value)


def test_a_ticket_signs_in_once_and_the_token_again_and_again() -> None:
    gate = Access("the token of this page")
    ticket = gate.make_ticket()
    first = gate.sign_in(ticket)
    assert first is not None
    assert gate.sign_in(ticket) is None
    second = gate.sign_in("the token of this page")
    assert second not in (None, first)
    assert gate.sign_in("the token of this pagE") is None
    assert gate.is_session(first)
    gate.sign_out(first)
    assert not gate.is_session(first)
    assert not gate.is_session("")


def test_tickets_and_sessions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Access("the token of this page")
    ticket, session = gate.make_ticket(), gate.sign_in("the token of this page")
    assert session is not None
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + access.TICKET_SECONDS + 1)
    assert gate.sign_in(ticket) is None
    assert gate.is_session(session)
    monkeypatch.setattr(time, "monotonic", lambda: now + access.SESSION_SECONDS + 1)
    assert not gate.is_session(session)


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SESSIONS", 3)
    gate = Access("the token of this page")
    made = [gate.sign_in("the token of this page") or "" for _ in range(5)]
    assert [gate.is_session(one) for one in made] == [False, False, True, True, True]


def test_a_code_belongs_to_one_session() -> None:
    gate = Access("the token of this page")
    one, other = (gate.sign_in("the token of this page") or "" for _ in range(2))
    assert gate.is_code(one, gate.make_code(one))
    for wrong in (gate.make_code(other), "", None, "ü", b"bytes"):
        assert not gate.is_code(one, wrong)


def test_wrong_tokens_wait_longer_each_time_and_not_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(access, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(access, "WAITING", 2)
    gate = Access("the token of this page")

    async def measure() -> tuple[list[float], list[bool]]:
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            assert await gate.pause()
            seconds.append(time.monotonic() - began)
        return seconds, await asyncio.gather(*(gate.pause() for _ in range(5)))

    seconds, together = asyncio.run(measure())
    assert seconds[0] < seconds[2] < 0.2
    assert 0.09 < seconds[4] < 0.3
    assert together.count(False) == 3


@pytest.mark.parametrize(
    ("host", "served", "is_meant"),
    [
        ("127.0.0.1:8090", "127.0.0.1", True),
        ("localhost:9000", "127.0.0.1", True),  # ssh -L 9000:127.0.0.1:8090
        ("[::1]:8090", "::1", True),
        ("evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example:8090", "127.0.0.1", False),
        ("192.0.2.7:8090", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("[::1", "127.0.0.1", False),
        ("192.0.2.7:8090", "0.0.0.0", True),
        ("evil.example:8090", "0.0.0.0", False),
        ("shop.example:8090", "shop.example", True),
    ],
)
def test_a_host_by_another_name_is_refused(host: str, served: str, is_meant: bool) -> None:
    assert (find_host_problem(host, served, find_names(served)) == "") is is_meant


def test_the_machines_own_name_is_one_of_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "Shop.Example")
    assert find_host_problem("shop.example:8090", "0.0.0.0", find_names("0.0.0.0")) == ""
    assert find_host_problem("shop.example:8090", "127.0.0.1", find_names("127.0.0.1"))


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"origin": "http://127.0.0.1:8090"}, True),
        ({"origin": "null", "sec-fetch-site": "same-origin"}, True),
        ({"origin": "null", "sec-fetch-site": "cross-site"}, False),
        ({"origin": "http://127.0.0.1:9999", "sec-fetch-site": "same-site"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "https://127.0.0.1:8090"}, False),
        ({"origin": "http://evil.example"}, False),
    ],
)
def test_only_the_page_itself_changes_anything(headers: dict[str, str], is_own: bool) -> None:
    assert is_own_origin({"host": "127.0.0.1:8090", **headers}) is is_own


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.0.2.1", "::", "shop.example", "")))
