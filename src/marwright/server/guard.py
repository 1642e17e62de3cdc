"""The guard: a small process that owns the server and outlives no parent for long.

It starts the server in a process group of its own and obeys whoever holds it: first its parent,
through standard input; later whoever connects to FOLDER/guard.sock and reads "held" there.

    "stop"   end the whole group, remove the run folder
    "end"    end the whole group, keep the run folder for another start in it
    (closed) the holder died, kill -9 included: wait LINGER_SECONDS for another one, then stop

When the server ends by itself the guard writes the exit status into the run folder and waits on,
so that the holder can still read the log.

Run as `python -I -S guard.py FOLDER GRACE_SECONDS LINGER_SECONDS COMMAND...` in FOLDER; it imports
nothing but the standard library, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
STDIN = 0
STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main() -> None:
    """Start the command, wait until nobody wants it any more, clean up."""
    folder, grace, linger, *command = sys.argv[1:]
    _adopt_orphans()
    wake, notify = os.pipe()
    os.set_blocking(notify, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *STOPPING):
        signal.signal(number, lambda *_: None)  # each wakes select() through the pipe
    listener = _listen()
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    word = b"stop"
    try:
        # For the holder, in case this process is killed: then it has to end the group.
        _write("server_pid", f"{server.pid} {_read_start(server.pid)}")
        word = _wait(server.pid, wake, listener, float(linger))
    finally:
        _end_group(server.pid, float(grace))
        if word != b"end":
            shutil.rmtree(folder, ignore_errors=True)


def _adopt_orphans() -> None:
    """Become the parent of workers whose own parent died, so that they can be waited for."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _listen() -> socket.socket:
    """Return a socket in the run folder that only its owner can connect to.

    By its bare name, since a Unix socket's path ends after 107 bytes.
    """
    listener = socket.socket(socket.AF_UNIX)
    Path("guard.sock").unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        listener.bind("guard.sock")
    finally:
        os.umask(before)
    listener.listen()
    return listener


def _write(name: str, text: str) -> None:
    """Write a file of the run folder that readers see whole or not at all."""
    temporary = Path(f"{name}.new")
    temporary.write_text(text, encoding="ascii")
    temporary.replace(name)


def _read_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; "0" where /proc does not say."""
    with contextlib.suppress(OSError, IndexError):
        # Field 22; the name before it may hold spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return "0"


def _wait(server: int, wake: int, listener: socket.socket, linger: float) -> bytes:
    """Return the word that ends it; "stop" too where a signal asks, or no holder is left."""
    holder: int | None = STDIN
    deadline = 0.0
    while True:
        sources = [wake, listener.fileno(), *([] if holder is None else [holder])]
        timeout = None if holder is not None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(sources, [], [], timeout)
        if holder in ready:
            word = _read_word(holder)
            if word in {b"stop", b"end"}:
                return word
            if not word:
                os.close(holder)
                holder, deadline = None, time.monotonic() + linger
        if listener.fileno() in ready:
            holder = _accept(listener, holder)
        if wake in ready and _look(server, wake):
            return b"stop"
        if holder is None and time.monotonic() >= deadline:
            return b"stop"


def _read_word(holder: int) -> bytes:
    """Return what the holder says, without its line end; nothing where it is gone."""
    try:
        said = os.read(holder, 4096)
    except OSError:
        return b""
    return said.strip() or said


def _accept(listener: socket.socket, holder: int | None) -> int | None:
    """Let whoever connects hold the server, where nobody else does."""
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            if holder is None:
                connection.sendall(b"held\n")
                return connection.detach()
    return holder


def _look(server: int, wake: int) -> bool:
    """Collect who ended, keep the server's exit status; return whether a signal asks to stop."""
    received = set(os.read(wake, 4096))
    for pid, status in _reap():
        if pid == server:
            _write("exit_status", str(os.waitstatus_to_exitcode(status)))
    return bool(received & STOPPING)


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
