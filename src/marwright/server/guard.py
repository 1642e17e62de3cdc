"""The guard: a small process that owns the server and ends with its parent, whatever happens.

It starts the server in a process group of its own and waits. When its standard input closes (the
parent stopped it, crashed, or was killed with -9) it ends the whole group and removes the run
folder. When the server ends by itself it writes the exit status into the run folder and waits on,
so that the parent can still read the log.

Run as `python -I -S guard.py FOLDER GRACE_SECONDS COMMAND...`; it imports nothing but the standard
library, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main() -> None:
    """Start the command, wait for the parent to let go, clean up."""
    folder, grace, *command = sys.argv[1:]
    _adopt_orphans()
    wake, notify = os.pipe()
    os.set_blocking(notify, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # each wakes select() through the pipe
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        # For the parent, in case this process is killed: then it has to end the group.
        (Path(folder) / "server_pid").write_text(str(server.pid), encoding="ascii")
        _wait(server.pid, wake, Path(folder))
    finally:
        _end_group(server.pid, float(grace))
        shutil.rmtree(folder, ignore_errors=True)


def _adopt_orphans() -> None:
    """Become the parent of workers whose own parent died, so that they can be waited for."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait(server: int, wake: int, folder: Path) -> None:
    """Return when standard input closes or a signal asks to stop."""
    stopping = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if 0 in ready and not os.read(0, 4096):
            return
        if wake in ready:
            received = set(os.read(wake, 4096))
            for pid, status in _reap():
                if pid == server:
                    code = os.waitstatus_to_exitcode(status)
                    temporary = folder / "exit_status.new"
                    temporary.write_text(str(code), encoding="ascii")
                    temporary.rename(folder / "exit_status")
            if received & stopping:
                return


def _reap() -> list[tuple[int, int]]:
    """Collect every child that has ended."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, status))
    return ended


def _end_group(group: int, grace: float) -> None:
    """Ask the server to end, wait `grace` seconds for the whole group, then end it.

    Only the leader is asked: Java closes its ports, answers what it holds, and its workers end when
    their sockets close. Asked together, the workers would be gone before their last answer.
    """
    steps = ((os.kill, signal.SIGTERM, grace), (os.killpg, signal.SIGKILL, 5.0))
    for send, number, seconds in steps:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError, PermissionError):
            with contextlib.suppress(ProcessLookupError):
                send(group, number)  # the leader may be gone while others of its group are not
            while time.monotonic() < deadline:
                _reap()
                os.killpg(group, 0)  # raises once nobody is left
                time.sleep(0.02)
            continue
        return


if __name__ == "__main__":
    main()
