"""Stopping and restarting from outside, where supervisors were killed or end meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from marwright.client import Endpoint
from marwright.errors import ServerDiedError, ServerError
from marwright.server import process as process_module
from marwright.server.process import Process, read_start_time
from marwright.server.registry import Record
from marwright.server.supervision.health import Health
from marwright.server.supervision.inspection import (
    fetch_status,
    inspect_server,
    restart_server,
    stop_server,
)
from marwright.server.supervision.status import Status, VersionStatus

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
BROKEN = VersionStatus("bad", "1.0", default=True, workers=1, problem="no", detail="Traceback")
SERVING = Status(phase="serving", models=(BROKEN,))


@pytest.fixture
def health() -> Iterator[Health]:
    with Health(lambda: SERVING, port=0, key="key") as health:
        yield health


def make_record(pid: int = 7, start: str = "1", **values: str) -> Record:
    """Return the record of a supervisor; by default of one that was killed."""
    return Record("one", pid, start, "today", **values)


def test_what_a_supervisor_left_before_it_had_a_server_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").touch()
    monkeypatch.chdir(tmp_path)
    stop_server(make_record(run_folder=""), timeout=1)
    assert (tmp_path / "precious").exists()


def test_a_server_that_another_supervisor_has_adopted_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "ADOPT_SECONDS", 0.5)
    held = Process.start(tmp_path, SLEEP, environment=os.environ, grace=1)
    try:
        while held.pid is None:
            assert held.exit_status is None
        with pytest.raises(ServerError, match="another process holds it"):
            stop_server(make_record(run_folder=str(tmp_path)), timeout=1)
        assert held.exit_status is None
        assert read_start_time(held.pid)
    finally:
        held.end()


def test_what_a_killed_supervisor_left_word_of_is_told(tmp_path: Path) -> None:
    endpoint = Endpoint(
        "http://127.0.0.1:1", "http://127.0.0.1:2", log_file=tmp_path / "server.log"
    )
    endpoint.write(tmp_path / "endpoint.json")
    found = inspect_server(make_record(run_folder=str(tmp_path)))
    assert (found["phase"], found["address"]) == ("abandoned", endpoint.inference_url)
    assert found["log"] == str(endpoint.log_file)
    assert "address" not in inspect_server(make_record())  # it had no server yet


def test_a_restart_tells_that_the_supervisor_has_ended(health: Health) -> None:
    with subprocess.Popen(SLEEP) as supervisor:  # SIGUSR1 ends it
        start = read_start_time(supervisor.pid) or ""
        record = make_record(supervisor.pid, start, health_url=health.url)
        with pytest.raises(ServerDiedError, match="the supervisor of one has ended"):
            restart_server(record, timeout=60)


@pytest.mark.parametrize(("key", "detail"), [("key", "Traceback"), ("", "")])
def test_tracebacks_take_the_records_key(health: Health, key: str, detail: str) -> None:
    status = fetch_status(health.url, key)
    assert status
    assert status["models"][0]["detail"] == detail
