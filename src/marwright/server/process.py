"""The server's process group, held through its guard: started here, or adopted from one who died.

docs/decisions/0003-guard.md says who ends what; guard.py is the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from marwright.errors import ServerDiedError, ServerError

__all__ = ["end_orphans", "hide_environment", "Process", "read_server_pid", "read_start_time"]

_log = logging.getLogger(__name__)

PR_SET_DUMPABLE = 4  # linux/prctl.h

ADOPT_SECONDS = 3.0
"""How long the guard may take to notice that its holder died."""


def hide_environment() -> None:
    """Keep this process's environment from other processes of its user: /proc/PID/environ.

    A worker runs as the same user, and is kept from the secrets of its own environment. root reads
    everything in any case. What is started later is as readable as ever.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


class Process:
    """A server and its guard; `start` or `adopt` makes one.

    Whoever holds it and dies without `end`, kill -9 included, leaves the server to its guard, which
    ends it after `linger` seconds unless somebody adopts it before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        guard: subprocess.Popen[bytes] | None = None,
        connection: socket.socket | None = None,
        grace: float = 10.0,
    ) -> None:
        self.folder = folder
        self._guard = guard
        self._connection = connection
        self._grace = grace

    @classmethod
    def start(
        cls,
        folder: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        grace: float,
        linger: float = 0.0,
    ) -> Process:
        """Start a command under a guard in a run folder, where its output goes to output.log.

        `grace` is how many seconds it may take to end once asked; `linger` how many it outlives a
        holder that died.
        """
        for name in ("exit_status", "server_pid"):  # of an earlier start in this folder
            (folder / name).unlink(missing_ok=True)
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [*guard, str(folder), str(grace), str(linger), *command],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we then stop the server in order
            )
        return cls(folder, guard=process, grace=grace)

    @classmethod
    def adopt(cls, folder: Path, *, grace: float = 10.0) -> Process:
        """Hold the server of a run folder whose holder died.

        Raises:
            ServerDiedError: its guard is gone too.
            ServerError: somebody holds it.
        """
        deadline = time.monotonic() + ADOPT_SECONDS
        while True:
            connection = _connect(folder)
            if connection is not None:
                return cls(folder, connection=connection, grace=grace)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server in {folder} cannot be adopted",
                    found="another process holds it",
                    remedy="stop that first: marwright stop",
                )
            time.sleep(0.05)

    @property
    def exit_status(self) -> int | None:
        """The server's exit status where it ended by itself, 1 where its guard was killed.

        None while it runs.
        """
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "exit_status").read_text(encoding="ascii"))
        return None if self._is_guarded() else 1

    @property
    def pid(self) -> int | None:
        """The server's process id, once it has one."""
        found = read_server_pid(self.folder)
        return found[0] if found else None

    def end(self, *, keep_folder: bool = False) -> None:
        """End the whole process group; remove the run folder unless it is to be kept.

        Safe to call twice, and where the guard is gone. A folder that is no run folder is let be.
        """
        self._say(b"end\n" if keep_folder else b"stop\n")
        self._wait_for_guard(self._grace + 10)
        if not _is_run_folder(self.folder):
            if self.folder.exists():
                _log.warning("%s is no server's run folder; it is let be", self.folder.absolute())
            return
        end_orphans(self.folder)
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _is_guarded(self) -> bool:
        if self._guard is not None:
            return self._guard.poll() is None
        if self._connection is None:
            return False
        with contextlib.suppress(BlockingIOError):
            try:
                return bool(self._connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
            except ConnectionError:
                return False
        return True

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # gone, or told before
            if self._connection is not None:
                self._connection.sendall(word)
            elif self._guard is not None and self._guard.stdin is not None:
                self._guard.stdin.write(word)
                self._guard.stdin.flush()

    def _wait_for_guard(self, seconds: float) -> None:
        """Wait until the guard has ended; it closes its connection then."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.settimeout(seconds)
                while self._connection.recv(64):
                    pass
            self._connection.close()
            self._connection = None
        if self._guard is not None:
            if self._guard.stdin is not None:
                with contextlib.suppress(OSError):
                    self._guard.stdin.close()
            try:
                self._guard.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()


def _connect(folder: Path) -> socket.socket | None:
    """Return a connection that holds the server, None where somebody else does.

    Raises:
        ServerDiedError: no guard answers.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        # Through the folder's descriptor: a Unix socket's path ends after 107 bytes.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            connection.settimeout(ADOPT_SECONDS)
            connection.connect(f"/proc/self/fd/{descriptor}/guard.sock")
        finally:
            os.close(descriptor)
        answer = connection.recv(5)
    except ConnectionResetError:
        answer = b""
    except OSError as exc:
        connection.close()
        raise ServerDiedError(
            f"the server in {folder} cannot be adopted", found=f"its guard is gone: {exc}"
        ) from exc
    if answer == b"held\n":
        connection.settimeout(None)
        return connection
    connection.close()
    return None


def _is_run_folder(folder: Path) -> bool:
    """Whether a server was started there; it is asked before all of a folder is removed."""
    marks = ("server_pid", "config.properties")
    return folder.is_absolute() and any((folder / name).exists() for name in marks)


def end_orphans(folder: Path) -> None:
    """Kill what is left of the group that a guard could not end; never a stranger's process."""
    found = read_server_pid(folder)
    if found is None:
        return
    pid, start = found
    now = read_start_time(pid)
    # Without a leader the number is free, or still that of our group: the kernel gives no process
    # a number that a group has.
    if now in {None, start} or start == "0":
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
            deadline = time.monotonic() + ADOPT_SECONDS
            while read_start_time(pid) == start and time.monotonic() < deadline:
                time.sleep(0.02)  # its ports are taken until it is gone


def read_server_pid(folder: Path) -> tuple[int, str] | None:
    """Return what the guard wrote: the server's process id, and when it began."""
    with contextlib.suppress(OSError, ValueError):
        pid, start = (folder / "server_pid").read_text(encoding="ascii").split()
        return int(pid), start
    return None


def read_start_time(pid: int) -> str | None:
    """Return when a process began, in clock ticks since boot; None where it has ended.

    Together with its number this names a process for good: numbers are used again.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]
