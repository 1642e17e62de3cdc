from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.cli.logs import show_logs
from marwright.client import Endpoint
from marwright.errors import NoServerError, StorageError, UsageError

START = datetime(2026, 11, 27, 19, 38, 4, 895_000, timezone.utc)


def write(
    message: str, *, seconds: float = 0, level: str = "INFO", thread: str = "main", **more: str
) -> str:
    time = (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
    fields = {"time": time, "level": level, "thread": thread, "logger": "org.pytorch.serve.Server"}
    return json.dumps({**fields, "message": message, **more}) + "\n"


LINES = [
    write("started"),
    write("[PID]12", seconds=1, thread="W-9000-my_net_1.0-stdout"),
    write("[PID]13", seconds=2, thread="W-9001-my_net_2.0-stdout"),
    write("other", seconds=3, thread="W-9002-other_1.0-stdout"),
    write('{"request_id": "12-34", "status": 500}', seconds=4, level="WARN"),
    write("", seconds=5, level="ERROR", exception="java.lang.Error: \x1b[31m\n\tat a.B\n"),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "server.log"
    path.write_text("".join(LINES))
    return path


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Return a function that runs the command; its errors are raised."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("TZ", "UTC")
    app = typer.Typer()
    app.command()(show_logs)

    def run(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def announce(tmp_path: Path, name: str, log: Path | None) -> None:
    """Let a server be found that does not run."""
    folder = tmp_path / "runtime/marwright"
    folder.mkdir(parents=True, exist_ok=True)
    url = "http://127.0.0.1:1"
    Endpoint(inference_url=url, management_url=url, log_file=log).write(tmp_path / f"{name}.json")
    (folder / f"{name}.json").symlink_to(tmp_path / f"{name}.json")


def count(result: Result) -> int:
    assert result.exit_code == 0, result.output
    return len(result.stdout.splitlines())


def test_each_line_is_told_in_one_line(logs: Callable[..., Result], log: Path) -> None:
    clock = START.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    first, second, *_, last = logs("--file", log).stdout.splitlines()
    assert first == f"{clock}.895 info     Server: started"
    assert second.endswith("info     my_net 1.0 9000: [PID]12")
    assert last.endswith("error    Server: java.lang.Error: \\x1b[31m")


def test_json_has_one_object_a_line_and_leaves_nothing_out(
    logs: Callable[..., Result], log: Path
) -> None:
    objects = [json.loads(line) for line in logs("--file", log, "--json").stdout.splitlines()]
    assert len(objects) == len(LINES)
    assert objects[1] == {
        "time": objects[1]["time"],
        "level": "info",
        "logger": "org.pytorch.serve.Server",
        "message": "[PID]12",
        "exception": "",
        "model": "my_net",
        "version": "1.0",
        "worker": 9000,
        "stream": "stdout",
        "request_id": "",
    }
    assert datetime.fromisoformat(objects[1]["time"]) == START + timedelta(seconds=1)
    assert objects[5]["exception"] == "java.lang.Error: \x1b[31m\n\tat a.B\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 6),
        (["--model", "my_net"], 2),
        (["--model", "my_net", "--version", "2.0"], 1),
        (["--model", "my"], 0),
        (["--level", "warning"], 2),
        (["--level", "error"], 1),
        (["--level", "critical"], 0),
        (["--request", "12-34"], 1),
        (["--lines", "2"], 2),
        (["--lines", "0"], 0),
        (["-n", "1", "--model", "my_net"], 1),
    ],
)
def test_lines_are_chosen(
    logs: Callable[..., Result], log: Path, arguments: list[str], expected: int
) -> None:
    assert count(logs("--file", log, *arguments)) == expected


def test_the_log_of_the_server_that_runs_is_found_and_its_supervisors(
    logs: Callable[..., Result], log: Path, tmp_path: Path
) -> None:
    announce(tmp_path, "one", log)
    assert count(logs()) == 6
    log.with_name("supervisor.log").write_text(write("renewed", seconds=2.5))
    assert count(logs("--server", "one")) == 7
    assert "renewed" in logs().stdout.splitlines()[3]


def test_without_a_log_the_error_says_what_to_do(
    logs: Callable[..., Result], log: Path, tmp_path: Path
) -> None:
    with pytest.raises(NoServerError, match="no server runs here"):
        logs()
    announce(tmp_path, "remote", None)
    with pytest.raises(NoServerError, match="pass --file PATH"):
        logs()
    with pytest.raises(StorageError, match="cannot read"):
        logs("--file", tmp_path / "none.log")
    with pytest.raises(UsageError, match="exclude each other"):
        logs("--file", log, "--server", "remote")


def test_ctrl_c_ends_following_with_130(log: Path) -> None:
    program = (
        "import typer; from marwright.cli.logs import show_logs\n"
        "app = typer.Typer(); app.command()(show_logs); app()"
    )
    command = [sys.executable, "-c", program, "--file", str(log), "--follow", "--lines", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "java.lang.Error" in process.stdout.readline()
        with log.open("a") as stream:
            stream.write(write("new"))
        assert process.stdout.readline().endswith("Server: new\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in process.stderr.read()
