"""Giving a worker that has grown a fresh process, without losing what it is asked.

A worker with one of our handlers renews itself in place when it gets SIGUSR2 (handlers/renewal.py).
Any other is replaced: one worker more, then its connection is closed at a moment at which nothing
is on its way; TorchServe starts a new process in its place, and the one more goes the same way.
docs/decisions/0015-renewal.md has what was measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from marwright.client import Client, ModelVersion
from marwright.client.results import Worker
from marwright.errors import NotReadyError, ServerError

__all__ = ["can_renew", "renew"]

_log = logging.getLogger(__name__)

PROC = Path("/proc")
POLL_SECONDS = 0.05
LOOK_SECONDS = 0.002
QUIET_SECONDS = 0.005
"""How long a worker must have been idle before its connection is closed: it is last in line then.

TorchServe's workers queue for requests; the one that has waited longest gets the next.
"""
LONG_QUIET_SECONDS = 1.0
"""The same where no other worker is known to be before it."""
REST_SECONDS = 0.1
"""The same where a worker's calls and its connection cannot be seen, only its sleep."""
PIDFD_GETFD = 438  # asm-generic/unistd.h: the same on every architecture we know
RECVFROM = {45, 207}
"""recvfrom's number on x86_64 and on arm64."""
_WORKER = ("model_service_worker.py", "renewal.py")


def renew(
    client: Client, name: str, version: str, pid: int, *, timeout: float = 120.0
) -> Literal["in place", "replaced"]:
    """Give a worker a fresh process and return how, once it serves.

    `timeout` in seconds holds for the whole, but for what scaling takes (the client's
    start_timeout). Needs Linux, and a server of the same user on this machine.

    Raises:
        ModelNotFoundError: no such model or version.
        ServerError: `pid` is no READY worker of it on this machine, or ended meanwhile.
        NotReadyError: the deadline passed; a worker that is never idle is not replaced.
    """
    deadline = time.monotonic() + timeout
    worker, process = _find_worker(client, name, version, pid)
    try:
        if can_renew(pid):
            _renew_in_place(process, deadline)
            return "in place"
        _replace(client, name, version, worker, deadline)
        return "replaced"
    except psutil.NoSuchProcess as exc:
        raise ServerError(
            f"worker {worker.id} of {name} {version} ended while it was renewed",
            found=f"no process {pid}",
            remedy="TorchServe starts it again; the server's log says why it ended",
        ) from exc


def can_renew(pid: int) -> bool:
    """Tell whether a process catches SIGUSR2, as a worker does that can renew itself."""
    with contextlib.suppress(OSError, ValueError):
        for line in (PROC / str(pid) / "status").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key == "SigCgt":
                return bool(int(value, 16) >> (signal.SIGUSR2 - 1) & 1)
    return False


def _find_worker(
    client: Client, name: str, version: str, pid: int
) -> tuple[Worker, psutil.Process]:
    """Return a worker with its process, made sure that it is this version's and this server's."""
    workers = {w.pid: w for w in client.models.describe(name, version).workers if w.ready}
    try:
        process = psutil.Process(pid)
        if pid in workers and _is_servers_own(process, client.endpoint.management_url):
            return workers[pid], process
    except (psutil.Error, ValueError) as exc:
        raise ServerError(f"worker {pid} cannot be looked at", found=str(exc)) from exc
    raise ServerError(
        f"process {pid} is no READY worker of {name} {version} on this machine",
        found=f"workers {', '.join(map(str, workers)) or 'none'}",
        remedy=f"see marwright models describe {name} --version {version}",
    )


def _is_servers_own(process: psutil.Process, url: str) -> bool:
    """Tell whether a process is a worker below the one that listens at an address."""
    if not any(Path(part).name in _WORKER for part in process.cmdline()[:8]):
        return False
    port = urlsplit(url).port
    return any(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for parent in process.parents()
        if parent.name().startswith("java")
        for connection in parent.net_connections("inet")
    )


def _renew_in_place(process: psutil.Process, deadline: float) -> None:
    """Ask a worker, and wait until another image of it catches the signal: it serves then."""
    before = _count_renewals(process)
    process.send_signal(signal.SIGUSR2)  # psutil makes sure that the id was not used again
    _wait(
        lambda: _count_renewals(process) > before and can_renew(process.pid),
        deadline,
        f"worker {process.pid} did not renew itself",
    )


def _count_renewals(process: psutil.Process) -> int:
    """Return how often a worker renewed itself: its command line says so (handlers/renewal.py)."""
    command = process.cmdline()
    for program, argument in itertools.pairwise(command):
        if Path(program).name == "renewal.py":
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(argument)["renewal"]["count"])
    return 0


def _replace(client: Client, name: str, version: str, worker: Worker, deadline: float) -> None:
    """Replace a worker's process, with another worker beside it meanwhile."""
    before = client.models.describe(name, version)
    count = len(before.workers)
    most = max(before.max_workers, count + 1)
    client.models.scale(name, count + 1, version=version, max_workers=most)
    try:
        _retire(client, name, version, worker.pid, deadline)
        _wait_until_back(client, before, worker, deadline)
    finally:
        _scale_back(client, before, max(deadline, time.monotonic() + 30))


def _scale_back(client: Client, before: ModelVersion, deadline: float) -> None:
    """Scale what is more than before away, and give the version the bounds that it had."""
    known = {worker.id for worker in before.workers}
    for extra in client.models.describe(before.name, before.version).workers:
        if extra.id not in known:
            # TorchServe would fail what it holds. While it loads the model again it holds nothing;
            # scaled away before that its new process would outlive it for half a minute.
            with contextlib.suppress(NotReadyError, OSError):
                _retire(client, before.name, before.version, extra.pid, deadline)
                _wait_until_back(client, before, extra, deadline, ready=False)
    count = len(before.workers)
    client.models.scale(before.name, count, version=before.version)
    if (before.min_workers, before.max_workers) != (count, count):
        least, most = before.min_workers, before.max_workers
        client.models.scale(before.name, least, version=before.version, max_workers=most)


def _wait_until_back(
    client: Client, before: ModelVersion, old: Worker, deadline: float, *, ready: bool = True
) -> None:
    """Wait for the process that TorchServe starts in a worker's place, where wanted until READY."""
    _wait(
        lambda: any(
            worker.id == old.id and worker.pid not in (old.pid, -1) and worker.ready >= ready
            for worker in client.models.describe(before.name, before.version).workers
        ),
        deadline,
        f"worker {old.id} of {before.name} {before.version} did not come back",
    )


def _retire(client: Client, name: str, version: str, pid: int, deadline: float) -> None:
    """End a worker while it is idle.

    Its connection is closed, not its process ended: the frontend sees at once that it has gone,
    while a large process takes long to die. It then ends by itself, in order.
    """
    workers = client.models.describe(name, version).workers
    others = [_Rest(w.pid) for w in workers if w.ready and w.pid != pid]
    rest = _Rest(pid)
    _wait(
        lambda: _close_if_idle(rest, others),
        deadline,
        f"worker {pid} was never seen idle",
        every=LOOK_SECONDS,
    )


class _Rest:
    """Since when a worker has been waiting for a message."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.began = time.monotonic()
        self.since = 0.0
        """By time.monotonic(); 0 where that was before we began to look."""
        self.waiting: tuple[int, int] | None = None
        """The descriptor that it waits at, and its main thread's switches; None while it works."""
        self._is_known = False

    def look(self) -> None:
        """Look again; see `_read_wait` for what is raised."""
        found = _read_wait(self.pid)
        if self._is_known and found != self.waiting:
            self.since = time.monotonic()
        self.waiting, self._is_known = found, True

    def is_behind(self, others: Sequence[_Rest]) -> bool:
        """Tell whether another worker has waited for longer: TorchServe gives it the next work."""
        return any(other.waiting and other.since < self.since for other in others)


def _close_if_idle(rest: _Rest, others: Sequence[_Rest] = ()) -> bool:
    """Close a worker's connection if it waits and the next message is not likely to be its own.

    From the last look until the frontend knows, some 2 ms, one may come nonetheless, and is lost.
    """
    try:
        for other in others:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                other.look()
        rest.look()
        if rest.waiting is None:
            return False
        rested = time.monotonic() - max(rest.since, rest.began)
        if rested < (QUIET_SECONDS if rest.is_behind(others) else LONG_QUIET_SECONDS):
            return False
        with contextlib.closing(_borrow_socket(rest.pid, rest.waiting[0])) as connection:
            if _read_wait(rest.pid) != rest.waiting or _has_data(connection):
                return False
            connection.shutdown(socket.SHUT_RDWR)
            return True
    except PermissionError:
        return _end_if_at_rest(rest.pid)
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended by itself


def _read_wait(pid: int) -> tuple[int, int] | None:
    """Return the descriptor that a process waits to receive from, and its switches so far.

    None where it does something else. Needs the right to trace it (ptrace(2)).
    """
    call = (PROC / str(pid) / "syscall").read_text(encoding="ascii").split()
    if not call or not call[0].isdigit() or int(call[0]) not in RECVFROM:
        return None
    return int(call[1], 16), _count_switches(pid)


def _count_switches(pid: int) -> int:
    """Return how often a process's main thread has gone to sleep."""
    text = (PROC / str(pid) / "status").read_text(encoding="utf-8")
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def _borrow_socket(pid: int, number: int) -> socket.socket:
    """Return another process's socket: the same one, under a descriptor of ours."""
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    if copy < 0:
        # Forbidden, or a kernel before 5.6: to us the same.
        raise PermissionError(ctypes.get_errno(), "pidfd_getfd")
    return socket.socket(fileno=copy)


def _has_data(connection: socket.socket) -> bool:
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True  # or the end of the stream: then it is not idle but ending


def _end_if_at_rest(pid: int) -> bool:
    """End a worker that has slept for a while, where its calls and its socket cannot be seen."""
    process = psutil.Process(pid)
    before = _count_switches(pid)
    time.sleep(REST_SECONDS)
    if process.status() != psutil.STATUS_SLEEPING or _count_switches(pid) != before:
        return False
    process.kill()
    return True


def _wait(
    is_done: Callable[[], bool], deadline: float, message: str, *, every: float = POLL_SECONDS
) -> None:
    """Return once something is so.

    Raises:
        NotReadyError: the deadline passed before.
    """
    while not is_done():
        if time.monotonic() >= deadline:
            raise NotReadyError(
                f"{message} in time", remedy="try again with a longer timeout, or under less load"
            )
        time.sleep(every)
