"""A process group held through its guard: started, adopted, ended; the server is a small script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from marwright.errors import ServerDiedError, ServerError
from marwright.server import TorchServe
from marwright.server.deployment import Deployment
from marwright.server.launch import RUNNING_NAME
from marwright.server.process import Process, end_orphans, read_server_pid, read_start_time
from marwright.server.supervision.boot import adopt

SERVER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
# Holds a server until it is killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from marwright.server.process import Process
folder, linger, *command = sys.argv[1:]
held = Process.start(Path(folder), command, environment=os.environ, grace=1, linger=float(linger))
print("held", flush=True)
time.sleep(60)
"""


def wait_until(is_true: Callable[[], object], *, timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return read_start_time(pid) is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run folder with a path that no Unix socket's address has room for."""
    path = tmp_path / ("long" * 20) / "run"
    path.mkdir(parents=True)
    yield path
    end_orphans(path)


def start(folder: Path, *, linger: float = 0.0, command: list[str] = SERVER) -> Process:
    process = Process.start(folder, command, environment=os.environ, grace=1, linger=linger)
    wait_until(lambda: process.pid)
    return process


def kill_holder(folder: Path, linger: float) -> int:
    """Start a server, kill whoever held it, and return the server's process id."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(linger), *SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        wait_until(lambda: read_server_pid(folder))
        holder.kill()
    found = read_server_pid(folder)
    assert found
    return found[0]


@pytest.mark.parametrize("keep_folder", [True, False])
def test_ending_it_ends_the_server_and_keeps_the_folder_if_asked(
    folder: Path, keep_folder: bool
) -> None:
    process = start(folder)
    pid = process.pid
    assert pid
    assert process.exit_status is None
    assert (folder / "guard.sock").stat().st_mode & 0o777 == 0o600
    process.end(keep_folder=keep_folder)
    process.end(keep_folder=keep_folder)
    assert is_gone(pid)
    assert folder.exists() == keep_folder


def test_a_folder_that_was_kept_takes_another_start(folder: Path) -> None:
    first = start(folder, command=[sys.executable, "-c", "raise SystemExit(3)"])
    wait_until(lambda: first.exit_status is not None)
    assert first.exit_status == 3
    first.end(keep_folder=True)
    second = start(folder)
    assert second.exit_status is None
    second.end()
    assert not folder.exists()


def test_a_server_outlives_its_holder_and_can_be_adopted_twice(folder: Path) -> None:
    pid = kill_holder(folder, linger=30)
    adopted = Process.adopt(folder, grace=1)
    assert adopted.pid == pid
    assert adopted.exit_status is None
    with pytest.raises(ServerError, match="another process holds it"):
        Process.adopt(folder)
    assert adopted._connection is not None
    adopted._connection.close()  # as the kernel does where a process is killed
    again = Process.adopt(folder, grace=1)
    assert again.pid == pid
    again.end()
    assert is_gone(pid)
    assert not folder.exists()


def test_nobody_adopting_it_in_time_ends_it(folder: Path) -> None:
    pid = kill_holder(folder, linger=1)
    time.sleep(0.3)
    assert not is_gone(pid)
    wait_until(lambda: not folder.exists())
    assert is_gone(pid)


def test_without_lingering_it_ends_with_its_holder(folder: Path) -> None:
    pid = kill_holder(folder, linger=0)
    wait_until(lambda: not folder.exists())
    wait_until(lambda: is_gone(pid))  # whoever collects it may be a moment behind


def test_an_adopted_server_that_ends_tells_its_status(folder: Path) -> None:
    pid = kill_holder(folder, linger=30)
    adopted = Process.adopt(folder, grace=1)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: adopted.exit_status is not None)
    assert adopted.exit_status == -signal.SIGKILL
    adopted.end()


@pytest.mark.parametrize("text", ['{"later": 1}', "no json", None])
def test_a_left_over_server_that_cannot_be_read_is_ended(folder: Path, text: str | None) -> None:
    pid = kill_holder(folder, linger=30)
    if text is not None:
        (folder / RUNNING_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ServerDiedError, match="cannot be adopted"):
        TorchServe.adopt(folder)
    wait_until(lambda: is_gone(pid))
    assert not folder.exists()


def test_what_cannot_be_adopted_is_cleared_away_for_another_server(folder: Path) -> None:
    pid = kill_holder(folder, linger=30)
    find_guard(folder).kill()
    assert adopt([folder], Deployment()) is None
    wait_until(lambda: is_gone(pid))
    assert not folder.exists()


def test_a_folder_that_no_server_was_started_in_is_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").touch()
    monkeypatch.chdir(tmp_path)
    Process(tmp_path).end()
    (tmp_path / "server_pid").touch()
    Process(Path()).end()
    assert (tmp_path / "precious").exists()


def find_guard(folder: Path) -> psutil.Process:
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if "guard.py" in str(process.info["cmdline"]) and str(folder) in process.info["cmdline"]
    )


@pytest.mark.parametrize("adopted", [True, False])
def test_a_killed_guard_leaves_no_server_once_it_is_ended(folder: Path, adopted: bool) -> None:
    if adopted:
        kill_holder(folder, linger=30)
        process = Process.adopt(folder, grace=1)
    else:
        process = start(folder)
    pid = process.pid
    assert pid
    find_guard(folder).kill()
    wait_until(lambda: process.exit_status == 1)
    assert not is_gone(pid)
    process.end()
    wait_until(lambda: is_gone(pid))
    assert not folder.exists()


def test_where_guard_and_holder_were_killed_there_is_nothing_to_adopt(folder: Path) -> None:
    pid = kill_holder(folder, linger=30)
    find_guard(folder).kill()
    with pytest.raises(ServerDiedError, match="its guard is gone"):
        Process.adopt(folder)
    end_orphans(folder)
    wait_until(lambda: is_gone(pid))


def test_a_strangers_process_with_the_servers_number_is_let_be(folder: Path) -> None:
    with subprocess.Popen(SERVER, start_new_session=True) as stranger:
        (folder / "server_pid").write_text(f"{stranger.pid} 12345")
        end_orphans(folder)
        time.sleep(0.1)
        assert stranger.poll() is None
        (folder / "server_pid").write_text(f"{stranger.pid} {read_start_time(stranger.pid)}")
        end_orphans(folder)
        assert stranger.wait(10) == -signal.SIGKILL


def test_the_environment_can_be_hidden_from_others_of_the_same_user() -> None:
    code = (
        "import ctypes; from marwright.server.process import hide_environment; "
        "hide_environment(); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "0\n"
