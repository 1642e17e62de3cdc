"""The guard is run as TorchServe's owner runs it, over real processes that do not want to end."""

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

from marwright.server import guard

PYTHON = (sys.executable, "-I", "-S")
GUARD = (*PYTHON, guard.__file__)

# Ignores SIGTERM, as does the grandchild that it starts; says both ids once both are ready.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ids = sys.argv[1]
if len(sys.argv) > 2:
    with open(ids + ".new", "w") as stream:
        stream.write(f"{os.getppid()} {os.getpid()}")
    os.rename(ids + ".new", ids)
else:
    subprocess.Popen([sys.executable, "-I", "-S", __file__, ids, "grandchild"])
time.sleep(60)
"""
# Ends when it is asked; the grandchild ignores that, and ends as workers do: once its input does.
POLITE = """
import os, signal, subprocess, sys, time
ids = sys.argv[1]
if len(sys.argv) > 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(ids + ".new", "w") as stream:
        stream.write(f"{os.getppid()} {os.getpid()}")
    os.rename(ids + ".new", ids)
    sys.stdin.read()
else:
    command = [sys.executable, "-I", "-S", __file__, ids, "grandchild"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    time.sleep(60)
"""

# Starts the guard as a parent would, and then does nothing until it is killed.
PARENT = """
import subprocess, sys, time
command = sys.argv[2:]
child = subprocess.Popen(command, cwd=sys.argv[1], stdin=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


def wait_until(is_true: Callable[[], bool], *, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def write_script(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run folder, with something in it."""
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/server.log").touch()
    return tmp_path / "run"


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Return a function that starts the guard over a command."""
    started: list[subprocess.Popen[bytes]] = []

    def start_guard(
        *command: str | Path, grace: float = 0.2, linger: float = 0
    ) -> subprocess.Popen[bytes]:
        words = [*GUARD, str(folder), str(grace), str(linger), *map(str, command)]
        process = subprocess.Popen(words, cwd=folder, stdin=subprocess.PIPE, start_new_session=True)
        started.append(process)
        return process

    yield start_guard
    for process in started:
        process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def family(tmp_path: Path) -> Callable[[str], tuple[list[str | Path], Path]]:
    """Return a function that writes a command that starts a child of its own."""

    def make(text: str) -> tuple[list[str | Path], Path]:
        script = write_script(tmp_path / "family.py", text)
        return [*PYTHON, script, tmp_path / "ids"], tmp_path / "ids"

    return make


def read_ids(path: Path) -> list[psutil.Process]:
    wait_until(path.exists)
    return [psutil.Process(int(word)) for word in path.read_text().split()]


@pytest.mark.parametrize("text", [POLITE, STUBBORN], ids=["polite", "stubborn"])
def test_closing_standard_input_ends_the_whole_group_and_removes_the_folder(
    start: Start, family: Callable[..., tuple[list[str | Path], Path]], folder: Path, text: str
) -> None:
    command, ids = family(text)
    process = start(*command)
    members = read_ids(ids)
    assert not any(map(is_gone, members))
    process.stdin.close()  # type: ignore[union-attr]
    assert process.wait(timeout=10) == 0
    assert all(map(is_gone, members))
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_does_the_same(
    start: Start,
    family: Callable[..., tuple[list[str | Path], Path]],
    folder: Path,
    number: signal.Signals,
) -> None:
    command, ids = family(STUBBORN)
    process = start(*command)
    members = read_ids(ids)
    process.send_signal(number)
    assert process.wait(timeout=10) == 0
    assert all(map(is_gone, members))
    assert not folder.exists()


def test_a_parent_that_is_killed_takes_all_with_it(
    family: Callable[..., tuple[list[str | Path], Path]], folder: Path, tmp_path: Path
) -> None:
    command, ids = family(STUBBORN)
    parent_script = write_script(tmp_path / "parent.py", PARENT)
    guarded = [*GUARD, str(folder), "0.2", "0", *map(str, command)]
    words = [*PYTHON, str(parent_script), str(folder), *guarded]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        guardian = psutil.Process(int(parent.stdout.readline()))  # type: ignore[union-attr]
        members = read_ids(ids)
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(guardian))
    assert all(map(is_gone, members))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("raise SystemExit(0)", "0"),
        ("raise SystemExit(7)", "7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "-9"),
    ],
)
def test_a_server_that_ends_by_itself_leaves_its_status_until_the_parent_lets_go(
    start: Start, folder: Path, script: str, status: str
) -> None:
    process = start(*PYTHON, "-c", script)
    wait_until((folder / "exit_status").exists)
    assert (folder / "exit_status").read_text() == status
    time.sleep(0.1)
    assert process.poll() is None
    assert (folder / "logs/server.log").exists()
    process.stdin.close()  # type: ignore[union-attr]
    assert process.wait(timeout=10) == 0
    assert not folder.exists()


def test_children_that_outlive_the_server_end_with_the_guard(
    start: Start, family: Callable[..., tuple[list[str | Path], Path]], folder: Path
) -> None:
    command, ids = family(STUBBORN)
    process = start(*command)
    server, worker = read_ids(ids)
    server.kill()
    wait_until((folder / "exit_status").exists)
    assert not is_gone(worker)
    assert worker.ppid() == process.pid  # adopted, so that it can be waited for
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=10)
    assert is_gone(worker)


def test_one_that_ignores_the_request_is_killed_after_the_grace_period_and_not_before(
    start: Start, family: Callable[..., tuple[list[str | Path], Path]]
) -> None:
    command, ids = family(STUBBORN)
    process = start(*command, grace=0.6)
    members = read_ids(ids)
    closed = time.monotonic()
    process.stdin.close()  # type: ignore[union-attr]
    time.sleep(0.3)
    assert not any(map(is_gone, members))
    process.wait(timeout=10)
    assert 0.6 <= time.monotonic() - closed < 5
    assert all(map(is_gone, members))


def test_one_that_ends_when_asked_is_not_waited_for(
    start: Start, family: Callable[..., tuple[list[str | Path], Path]]
) -> None:
    command, ids = family(POLITE)
    process = start(*command, grace=30)
    read_ids(ids)
    process.stdin.close()  # type: ignore[union-attr]
    assert process.wait(timeout=5) == 0


def test_words_on_standard_input_change_nothing(
    start: Start, family: Callable[..., tuple[list[str | Path], Path]]
) -> None:
    command, ids = family(POLITE)
    process = start(*command)
    read_ids(ids)
    process.stdin.write(b"words")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    time.sleep(0.1)
    assert process.poll() is None


def test_a_command_that_cannot_be_started_is_said_and_ends_the_guard(
    start: Start, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(folder / "no-such-java")
    assert process.wait(timeout=10) != 0
    assert "No such file" in capfd.readouterr().err
    assert (folder / "logs/server.log").exists()
