"""What another machine may do to a site's gateway, with its token and without."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import (
    ConfigurationError,
    ConnectionFailedError,
    MarwrightError,
    NotReadyError,
    ReleaseError,
    UsageError,
)
from marwright.gateway.configuration import Settings, render
from marwright.gateway.control import Control
from marwright.gateway.control_routes import UPLOADS, ControlSettings
from marwright.release.member import Member
from marwright.server.sections import ServerSettings

TOKEN = "c" * 32
BEARER = f"Bearer {TOKEN}"
DIGEST = hashlib.sha256(b"archive").hexdigest()


@pytest.fixture
def settings(settings: Settings, replica: Any, tmp_path: Path) -> Settings:
    """A gateway with clients' tokens, that may be released to from elsewhere."""
    (tmp_path / "gateway" / UPLOADS).mkdir(parents=True, mode=0o700)
    (tmp_path / "clients").write_text("client-token")
    (tmp_path / "control").write_text(f"{'d' * 32}\n{TOKEN}\n")
    return replace(
        settings,
        client_tokens=tmp_path / "clients",
        request_bytes=1024,
        control=ControlSettings(tmp_path / "control", replica.url, "the-site-s-key"),
    )


@pytest.mark.parametrize("operation", ["check", "begin", "say"])
def test_a_word_reaches_the_site_with_its_key_and_without_the_token(
    start: Any, settings: Settings, replica: Any, ask: Any, operation: str
) -> None:
    start(settings)
    path = f"/control/{operation}"
    assert ask(settings, path, b'{"a": 1}', authorization=BEARER).json() == {"a": 1}
    (asked,) = replica.asked
    assert (asked.method, asked.path) == ("POST", path)
    assert asked.headers["X-Marwright-Key"] == "the-site-s-key"
    assert "authorization" not in {name.lower() for name in asked.headers}


@pytest.mark.parametrize(
    "token", ["", "Bearer client-token", f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}c", TOKEN]
)
def test_nobody_else_is_let_in(
    start: Any, settings: Settings, replica: Any, ask: Any, token: str, tmp_path: Path
) -> None:
    start(settings)
    headers = {"authorization": token} if token else {}
    assert ask(settings, "/control/say", b"{}", **headers).status == 401
    path = f"/control/archives/{DIGEST}/a.mar"
    assert ask(settings, path, b"x", "PUT", **headers).status == 401
    assert not replica.asked
    assert not list((tmp_path / "gateway" / UPLOADS).iterdir())


def test_who_may_release_is_no_client(
    start: Any, settings: Settings, replica: Any, ask: Any
) -> None:
    start(settings)
    assert ask(settings, "/predictions/cnn", b"{}", authorization=BEARER).status == 401
    assert not replica.asked


def test_an_archive_is_put_whole_also_where_it_is_larger_than_a_request(
    start: Any, settings: Settings, ask: Any, tmp_path: Path
) -> None:
    start(settings)
    content = bytes(range(256)) * 8192
    for _ in range(2):  # again, over what is there
        for name in ("cnn-2.0.mar", "cnn-2.0.mar.sig"):
            path = f"/control/archives/{DIGEST}/{name}"
            assert ask(settings, path, content, "PUT", authorization=BEARER).status in {201, 204}
            assert (tmp_path / "gateway" / UPLOADS / DIGEST / name).read_bytes() == content


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", f"/control/archives/{DIGEST}/..%2F..%2Fnginx.conf.mar", 404),
        ("PUT", f"/control/archives/{DIGEST}/../a.mar", 404),
        ("PUT", f"/control/archives/{DIGEST}/.a.mar", 404),
        ("PUT", f"/control/archives/{DIGEST}/a.txt", 404),
        ("PUT", f"/control/archives/{DIGEST}/a.mar/b.mar", 404),
        ("PUT", f"/control/archives/{DIGEST[1:]}/a.mar", 404),
        ("PUT", "/control/archives/a.mar", 404),
        ("GET", f"/control/archives/{DIGEST}/a.mar", 403),
        ("DELETE", f"/control/archives/{DIGEST}/a.mar", 403),
        ("GET", "/control/say", 403),
        ("POST", "/control/status", 404),
        ("POST", "/control/", 404),
    ],
)
def test_nothing_else_can_be_asked_for(
    start: Any, settings: Settings, replica: Any, ask: Any, method: str, path: str, status: int
) -> None:
    start(settings)
    body = b"x" if method in {"PUT", "POST"} else None
    answer = ask(settings, path, body, method, authorization=BEARER)
    assert answer.status == status
    assert not replica.asked


def test_where_it_is_not_asked_for_there_is_no_control(
    start: Any, settings: Settings, ask: Any
) -> None:
    settings = replace(settings, control=None)
    start(settings)
    assert ask(settings, "/control/say", b"{}", authorization=BEARER).status == 404


@pytest.mark.parametrize(
    ("text", "says"),
    [("short", "could be guessed"), ("client-token", "a token of the clients"), ("", "no token")],
)
def test_tokens_that_protect_nothing_are_refused(
    settings: Settings, tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "control").write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        render(settings)


@pytest.mark.parametrize(
    ("operation", "asked"),
    [
        ("check", None),
        ("check", {"archive": "../a.mar", "digest": DIGEST}),
        ("check", {"archive": "a.mar", "digest": "x"}),
        ("begin", {"archive": "a.mar", "digest": DIGEST, "lease": 0}),
        ("begin", {"archive": "--to.mar", "digest": DIGEST, "lease": 30}),
        ("say", {"archive": "a.mar", "digest": DIGEST, "model": "-x", "word": "stay"}),
        ("say", {"archive": "a.mar", "digest": DIGEST, "model": "x", "word": "go"}),
    ],
)
def test_what_is_not_understood_is_refused(operation: str, asked: Any) -> None:
    with pytest.raises(UsageError, match="not understood"):
        Control().answers[f"/control/{operation}"](asked)


def test_only_the_archive_that_is_meant_is_released(tmp_path: Path) -> None:
    control, asked = Control(), {"archive": "a.mar", "digest": DIGEST}
    with pytest.raises(NotReadyError):
        control.check(asked)
    (tmp_path / UPLOADS / DIGEST).mkdir(parents=True)
    (tmp_path / UPLOADS / DIGEST / "a.mar").write_bytes(b"another")
    with control.open(tmp_path, "site"), pytest.raises(ReleaseError, match=r"another a\.mar"):
        control.check(asked)


def test_a_release_that_is_not_known_cannot_move(tmp_path: Path) -> None:
    control = Control()
    word = {"archive": "a.mar", "digest": DIGEST, "model": "a", "word": "move"}
    with control.open(tmp_path, "site"), pytest.raises(ReleaseError, match=r"no release of a\.mar"):
        control.say(word)


def test_what_was_put_there_before_goes_with_the_next_check(tmp_path: Path) -> None:
    control = Control()
    for digest in (DIGEST, "0" * 64):
        (tmp_path / UPLOADS / digest).mkdir(parents=True)
        (tmp_path / UPLOADS / digest / "a.mar").write_bytes(b"archive")
    with control.open(tmp_path, "nobody"), pytest.raises(MarwrightError):
        control.check({"archive": "a.mar", "digest": DIGEST})  # no server has this name
    assert [path.name for path in (tmp_path / UPLOADS).iterdir()] == [DIGEST]


def test_a_site_that_is_away_is_not_heard_of(
    start: Any, settings: Settings, replica: Any, tmp_path: Path
) -> None:
    """Its gateway answers, but that is no word of it: so its lease may end."""
    start(settings)
    (tmp_path / "token").write_text(TOKEN)
    url = f"http://127.0.0.1:{settings.port}"
    member = Member(ServerSettings(url=url, token=tmp_path / "token"), patience=5)
    with contextlib.closing(member):
        assert member.say({"word": "stay"}) == {"word": "stay"}
        heard = member.heard
        replica.stop()
        with pytest.raises(ConnectionFailedError, match="its gateway says 502"):
            member.say({"word": "stay"})
        assert member.heard == heard
