from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import typer
from typer.testing import CliRunner

from marwright.cli.dashboard import dashboard
from marwright.errors import NoServerError
from marwright.server.process import read_start_time
from marwright.server.registry import Record, claim

pytest.importorskip("fastapi")

PROGRAM = [sys.executable, "-m", "marwright", "dashboard"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def record() -> Iterator[Record]:
    """A supervisor that does not answer."""
    record = Record("shop", os.getpid(), read_start_time(os.getpid()) or "", "today")
    held = claim("shop")
    held.write(record)
    yield record
    held.release()


@pytest.fixture
def page(record: Record) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [*PROGRAM, "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


def test_it_prints_an_address_and_where_the_token_is(
    page: tuple[subprocess.Popen[str], dict[str, Any]], tmp_path: Path
) -> None:
    process, facts = page
    assert facts["server"] == "shop"
    address, _, ticket = facts["url"].partition("#")
    assert address.startswith("http://127.0.0.1:")
    token_file = Path(facts["token_file"])
    assert token_file == tmp_path / "state/marwright/dashboard/shop.token"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    answer = requests.post(address, {"token": ticket}, allow_redirects=False, timeout=20)
    assert answer.status_code == 303
    again = requests.post(address, {"token": ticket}, allow_redirects=False, timeout=20)
    assert again.status_code == 401
    token = token_file.read_text().strip()
    assert token != ticket
    headers = {"Authorization": f"Bearer {token}"}
    look = requests.get(address.replace("login", "api/look"), headers=headers, timeout=20)
    assert look.json()["problem"], "the server does not answer, and the page does"
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    assert process.stderr is not None
    said = process.stderr.read()
    assert said == "the page has ended\n"
    assert ticket not in said


def test_a_server_that_was_never_there_is_said() -> None:
    app = typer.Typer()
    app.command()(dashboard)
    result = CliRunner().invoke(app, ["nobody"])
    assert isinstance(result.exception, NoServerError)


def test_an_address_that_others_reach_warns(record: Record, taken_port: int) -> None:
    command = [*PROGRAM, "--host", "0.0.0.0", "--port", str(taken_port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "warning: 0.0.0.0 is no loopback address" in done.stderr
    assert "the page cannot listen" in done.stderr
