"""Rendered configurations: nginx takes each of them, and nothing in one is an injection."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import ConfigurationError, ServerError
from marwright.gateway.configuration import Settings, render
from marwright.gateway.traffic import Split, Traffic
from marwright.server import nginx
from marwright.server.certificate import Certificate, make_certificate
from marwright.server.nginx import check_configuration, find_nginx
from marwright.server.ports import Ports

HOSTILE = "1\";}server{listen:1;}$uri'é~^*("

NOBODY = 65534


@pytest.fixture
def tls(tmp_path: Path) -> Certificate:
    return make_certificate(tmp_path / 'a "folder"; with {all} of \\ it')


def check(folder: Path, settings: Settings) -> None:
    (folder / "temp").mkdir(exist_ok=True)
    (folder / "nginx.conf").write_text(render(settings, 3), encoding="utf-8")
    check_configuration(folder / "nginx.conf")


def test_nginx_takes_every_variant(tmp_path: Path, tls: Certificate) -> None:
    splits = (
        Split("cnn", "1.0", "2.0", share=12.34, shadow=0.01),
        Split("CNN", HOSTILE, "2", share=100, shadow=100),
        Split("a.b-c_d", "1", "x" * 128),
    )
    (tmp_path / "tokens").write_text("t" * 512 + "\nother\n")
    port = Ports.find_free().inference
    variants = itertools.product((1, 2, 3), (0, 1, 3), (False, True), (False, True), (None, "t"))
    for count, most, https, secure, token in variants:
        scheme = "https" if secure else "http"
        check(
            tmp_path,
            Settings(
                port=port,
                host="127.0.0.1" if count < 3 else "::1",
                replicas=tuple(f"{scheme}://127.0.0.1:{9000 + n}" for n in range(count)),
                certificate=tls.certificate if https else None,
                key=tls.key if https else None,
                authority=tls.certificate if secure else None,
                client_tokens=tmp_path / "tokens" if token else None,
                replica_token=token,
                traffic=Traffic(splits[:most]),
            ),
        )


def test_hostile_names_stay_within_their_quotes(tmp_path: Path) -> None:
    settings = Settings(
        port=1, replicas=("http://[::1]:9000",), traffic=Traffic((Split("cnn", HOSTILE, "2"),))
    )
    text = render(settings)
    assert '"1%22%3B%7Dserver%7Blisten%3A1%3B%7D%24uri%27%C3%A9~%5E%2A%28"' in text
    assert "listen:1" not in text
    check(tmp_path, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 0},
        {"port": 65536},
        {"host": "127.0.0.1; } #"},
        {"host": "$host"},
        {"host": ""},
        {"host": "fe80::1%eth0;"},
        {"replicas": ()},
        {"replicas": ("http://127.0.0.1:1", "https://127.0.0.1:2")},
        {"replicas": ("http://127.0.0.1:1", "http://127.0.0.1:1/")},
        {"replicas": ("https://127.0.0.1:1",)},
        {"replicas": ("http://192.0.2.1:80",)},
        {"replicas": ("http://example.org:80",)},
        {"replicas": ("http://127.0.0.1",)},
        {"replicas": ("http://127.0.0.1:0",)},
        {"replicas": ("http://127.0.0.1:99999",)},
        {"replicas": ("http://127.0.0.1:80/x;",)},
        {"replicas": ("http://user@127.0.0.1:80 down;#",)},
        {"replicas": ("ftp://127.0.0.1:80",)},
        {"replicas": ("http://[::1%25x;]:80",)},
        {"replica_token": 'x";'},
        {"replica_token": ""},
        {"replica_token": "x\n"},
        {"replica_token": "x" * 513},
        {"certificate": Path("c.pem")},
        {"request_bytes": 0},
        {"request_seconds": 0},
        {"connections": 0},
        {"answer_seconds": 0},
        {"retry_after": -1},
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"port": 8080, "replicas": ("http://127.0.0.1:9000",)}
    Settings(**good)
    with pytest.raises(ConfigurationError):
        Settings(**{**good, **changes})


@pytest.mark.parametrize(
    "text", ["", "\n \n", "good\nba d", 'x"', "x;y", "${x}", "A\na", "x\\", "é", "x" * 513]
)
def test_tokens_that_cannot_be_used_are_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    settings = Settings(port=1, replicas=("http://127.0.0.1:9000",), client_tokens=path)
    with pytest.raises(ConfigurationError) as caught:
        render(settings)
    assert "ba d" not in str(caught.value)


@pytest.mark.parametrize("name", ["a$b", "a\nb"])
def test_paths_that_nginx_cannot_be_told_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    settings = Settings(port=1, replicas=("http://127.0.0.1:9000",), certificate=path, key=path)
    with pytest.raises(ConfigurationError, match="cannot use this path"):
        render(settings)


def test_nginx_says_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text("no_such_thing;\n")
    with pytest.raises(ConfigurationError, match='unknown directive "no_such_thing"'):
        check_configuration(tmp_path / "nginx.conf")


def test_a_missing_nginx_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_nginx().is_absolute()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(nginx, "FOLDERS", ())
    with pytest.raises(ServerError, match=r"apt-get install nginx$"):
        find_nginx()


def test_a_plain_users_path_need_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_nginx()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(nginx, "FOLDERS", (str(found.parent),))
    assert find_nginx() == found


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become somebody else")
def test_a_plain_user_needs_no_other_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(port=Ports.find_free().inference, replicas=("http://127.0.0.1:9000",))
    assert render(settings).splitlines()[1] == "user root;"
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "temp").mkdir()
        (folder / "nginx.conf").write_text(render(settings))
        for path in (folder, folder / "temp"):
            os.chown(path, NOBODY, NOBODY)
        command = [str(find_nginx()), "-t", "-q", "-c", f"{folder}/nginx.conf", "-p", f"{folder}/"]
        done = subprocess.run(
            command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_generation_is_another_text() -> None:
    settings = Settings(port=1, replicas=("http://127.0.0.1:9000",))
    assert render(settings, 1) != render(settings, 2)
    assert render(settings, 1) == render(replace(settings), 1)
