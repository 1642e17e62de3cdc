from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.cli import servers
from marwright.errors import NoServerError, RequestTimeoutError, UsageError
from marwright.server.process import Process, read_server_pid, read_start_time
from marwright.server.registry import Claim, Record, claim
from marwright.server.supervision.health import Health
from marwright.server.supervision.status import Status, VersionStatus

app = typer.Typer()
for command in (servers.status, servers.stop, servers.restart):
    app.command()(command)

VERSION = VersionStatus("cnn", "1.0", default=True, workers=1, ready_workers=1)
BROKEN = VersionStatus(
    "bad", "2.0", default=False, workers=2, problem="KeyError", detail="Traceback\n  File"
)


def call(*words: str) -> Result:
    result = CliRunner().invoke(app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime/marwright"


@pytest.fixture
def announce() -> Iterator[Callable[..., Record]]:
    """Return a function that announces a supervisor that says what it is told to."""
    held: list[Claim] = []
    open_endpoints: list[Health] = []

    def make(name: str, status: Status | None = None, **values: object) -> Record:
        url = ""
        if status is not None:
            status = dataclasses.replace(status, name=name)
            health = Health(lambda: status, port=0, key="key")
            open_endpoints.append(health.__enter__())
            url = health.url
        start = read_start_time(os.getpid()) or ""
        record = Record(name, os.getpid(), start, "today", health_url=url, key="key")
        record = dataclasses.replace(record, **values)  # type: ignore[arg-type]
        held.append(claim(name))
        held[-1].write(record)
        return record

    yield make
    for health in open_endpoints:
        health.__exit__(None, None, None)
    for one in held:
        one.release()


SERVING = Status(phase="serving", models=(VERSION,), started=True)


@pytest.mark.parametrize(
    ("status", "live", "ready", "started"),
    [
        (SERVING, 0, 0, 0),
        (dataclasses.replace(SERVING, models=(VERSION, BROKEN)), 0, 1, 0),
        (dataclasses.replace(SERVING, phase="restarting"), 1, 1, 0),
        (Status(phase="starting"), 0, 1, 1),
    ],
)
def test_each_question_has_an_exit_status(
    announce: Callable[..., Record], status: Status, live: int, ready: int, started: int
) -> None:
    announce("one", status)
    for option, code in (("--live", live), ("--ready", ready), ("--started", started)):
        assert call("status", option).exit_code == code
    assert call("status").exit_code == 0


def test_a_server_is_shown_with_its_models_and_their_problems(
    announce: Callable[..., Record],
) -> None:
    status = dataclasses.replace(
        SERVING, models=(VERSION, BROKEN), differences=("cnn: the default is 2.0, wanted 1.0",)
    )
    announce("one", status)
    text = call("status", "one").output
    for part in (
        "serving, not ready",
        "1 of 1",
        "0 of 2",
        "KeyError",
        "    Traceback",
        "wanted 1.0",
    ):
        assert part in text
    (found,) = json.loads(call("status", "--json").stdout)
    assert found["models"][1]["detail"] == "Traceback\n  File"


def test_no_server_and_a_wrong_name_are_errors(announce: Callable[..., Record]) -> None:
    for words in (["status"], ["stop"], ["restart"], ["status", "--ready"]):
        with pytest.raises(NoServerError, match="marwright serve"):
            call(*words)
    announce("one", SERVING)
    with pytest.raises(NoServerError, match="no server two"):
        call("status", "two")


def test_all_servers_are_shown_and_one_is_stopped_only_by_name(
    announce: Callable[..., Record],
) -> None:
    announce("one", SERVING)
    announce("two", Status(phase="starting"))
    assert call("status", "--ready").exit_code == 1
    assert call("status", "one", "--ready").exit_code == 0
    assert "two:" in call("status").output
    with pytest.raises(UsageError, match="several servers"):
        call("stop")


@pytest.mark.parametrize(
    ("values", "phase"),
    [
        ({"health_url": "http://127.0.0.1:9"}, "hung"),
        ({}, "starting"),
        ({"start": "1", "run_folder": "/"}, "abandoned"),
    ],
)
def test_a_supervisor_that_does_not_answer_is_told(
    announce: Callable[..., Record], values: dict[str, str], phase: str
) -> None:
    announce("one", **values)
    result = call("status", "--live")
    assert result.exit_code == 1
    assert call("status").exit_code == (phase != "starting")
    assert f"{phase}, not ready" in result.output


def test_what_a_killed_supervisor_left_is_stopped(
    announce: Callable[..., Record], tmp_path: Path
) -> None:
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    folder = tmp_path / "run"
    folder.mkdir()
    process = Process.start(folder, command, environment=os.environ, grace=1, linger=30)
    deadline = time.monotonic() + 60
    while read_server_pid(folder) is None:
        assert time.monotonic() < deadline, "the process did not start"
        time.sleep(0.01)
    guard = process._guard
    assert guard is not None
    assert guard.stdin is not None
    guard.stdin.close()  # as the kernel does where the supervisor is killed
    announce("one", start="1", run_folder=str(folder))
    assert call("stop").exit_code == 0
    assert guard.wait(10) == 0
    assert not folder.exists()


SLOW = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(time.sleep(float(sys.argv[1]))))
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "in_time"), [("0.5", True), ("5", False)])
def test_stop_waits_until_the_supervisor_has_ended(
    announce: Callable[..., Record], seconds: str, in_time: bool
) -> None:
    command = [sys.executable, "-I", "-S", "-c", SLOW, seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        announce("one", pid=supervisor.pid, start=read_start_time(supervisor.pid))
        if in_time:
            assert call("stop").exit_code == 0
            assert supervisor.poll() == 0
        else:
            with pytest.raises(RequestTimeoutError, match="did not stop within 1 s"):
                call("stop", "--timeout", "1")
