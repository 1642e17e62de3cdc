"""One nginx in front of replicas: started, changed without a pause, adopted, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from marwright.errors import NotReadyError, PortTakenError, ServerDiedError, ServerError
from marwright.gateway.configuration import (
    ACCESS_LOG,
    ERROR_LOG,
    Settings,
    count_workers,
    draining_name,
    read_generation,
    render,
)
from marwright.server.nginx import check_configuration, find_nginx
from marwright.server.process import Process, end_orphans, read_server_pid, read_start_time
from marwright.storage import translate_os_errors, write_file

__all__ = ["Gateway"]

CONFIGURATION = "nginx.conf"
START_SECONDS = 15.0
CHANGE_SECONDS = 15.0
LOOK_SECONDS = 0.02
SILENT_SECONDS = 1.0
DRAIN_SECONDS = 1.0
"""How long clients' connections end after each answer, before a change takes the workers away."""
LOG_BYTES = 32 << 20
"""A log of this size is put aside; one older one is kept of each."""
TAIL_BYTES = 4096
PASSED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
"""The variables that nginx is given: it needs no secret."""


class Gateway:
    """An nginx under a guard; `start` or `adopt` makes one."""

    def __init__(self, process: Process, *, settled: bool = False) -> None:
        self._process = process
        self._settled = settled
        """Whether nginx is known to use what stands in its file."""

    @classmethod
    def start(
        cls, folder: Path, settings: Settings, *, grace: float = 5.0, linger: float = 0.0
    ) -> Gateway:
        """Start it in a run folder, which is made where it is not there, and return once it serves.

        `grace` is how many seconds it may take to end, `linger` how many it outlives a holder that
        died without `stop`.

        Raises:
            ConfigurationError: the settings cannot be used.
            PortTakenError: somebody listens there.
            ServerError: there is no nginx, or it did not start.
        """
        folder = folder.absolute()
        command = [str(find_nginx()), "-p", f"{folder}/", "-c", str(folder / CONFIGURATION)]
        with translate_os_errors(f"write {folder}"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            (folder / "temp").mkdir(mode=0o700, exist_ok=True)
            _end_draining(folder)
        end_orphans(folder)  # of a guard that was killed
        _write_configuration(folder, render(settings, 1))
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        offset = _measure(folder / ERROR_LOG)
        process = Process.start(
            folder, command, environment=environment, grace=grace, linger=linger
        )
        gateway = cls(process, settled=True)
        try:
            gateway._wait(
                lambda: len(gateway._list_workers()) == count_workers(), START_SECONDS, offset
            )
        except BaseException:
            process.end(keep_folder=True)
            raise
        return gateway

    @classmethod
    def adopt(cls, folder: Path, *, grace: float = 5.0) -> Gateway:
        """Hold the gateway of a run folder whose holder died.

        Raises:
            ServerDiedError: its guard is gone too.
            ServerError: somebody holds it.
        """
        gateway = cls(Process.adopt(folder.absolute(), grace=grace))
        _end_draining(gateway.folder)  # where its holder died amid a change
        return gateway

    @property
    def folder(self) -> Path:
        """The run folder: configuration, logs, the capture socket."""
        return self._process.folder

    @property
    def pid(self) -> int | None:
        """The process id of nginx's master."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Its exit status where it ended by itself, None while it runs."""
        return self._process.exit_status

    def change(self, settings: Settings, *, drain: float = DRAIN_SECONDS) -> None:
        """Serve other settings; every request that begins after the return is answered by them.

        Before the workers are replaced, each client's connection ends after its next answer for
        `drain` seconds; an idle connection is closed with its worker. Where the change fails the
        old settings serve on.

        Raises:
            ConfigurationError: they cannot be used.
            ServerError: nginx did not take them over, or has ended.
        """
        self._find_master()
        current = (self.folder / CONFIGURATION).read_text(encoding="utf-8")
        generation = read_generation(current)
        if self._settled and render(settings, generation) == current:
            return
        _write_configuration(self.folder, render(settings, generation + 1))
        draining = self.folder / draining_name(generation)
        try:
            draining.touch(mode=0o600)
            time.sleep(drain)
            self._reload()
            self._settled = True
        except BaseException:
            _replace(self.folder, current)
            raise
        finally:
            _end_draining(self.folder)

    def rotate(self, *, most: int = LOG_BYTES) -> None:
        """Put aside each log that is larger than `most` bytes, in place of the one put aside last.

        Call it now and then: nginx itself bounds nothing.
        """
        large = [
            path
            for path in (self.folder / ACCESS_LOG, self.folder / ERROR_LOG)
            if _measure(path) > most
        ]
        for path in large:
            path.replace(path.with_name(f"{path.name}.1"))
        if large:
            self._signal(signal.SIGUSR1)
            self._wait(lambda: all(path.exists() for path in large), CHANGE_SECONDS, 0)

    def stop(self, *, seconds: float = 10.0, keep_folder: bool = False) -> None:
        """Let it answer what it holds, for some seconds at most, and end it; safe to call twice."""
        with contextlib.suppress(ServerError):
            self._signal(signal.SIGQUIT)
            deadline = time.monotonic() + seconds
            while self.exit_status is None and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
        if self.exit_status is not None:
            end_orphans(self.folder)  # workers of a master that was killed serve on
        self._process.end(keep_folder=keep_folder)

    def __enter__(self) -> Gateway:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    def _reload(self) -> None:
        """Replace the workers, and return once the old ones accept no connection any more."""
        before = self._list_workers()
        offset = _measure(self.folder / ERROR_LOG)
        self._signal(signal.SIGHUP)

        def is_replaced() -> bool:
            now = self._list_workers()
            if "[emerg]" in _read_tail(self.folder / ERROR_LOG, offset):
                self._wait_for_silence()
                raise ServerError(
                    "nginx did not take its new configuration; the old one serves on",
                    detail=_read_tail(self.folder / ERROR_LOG, offset),
                )
            return len(now) == count_workers() and not now & before

        self._wait(is_replaced, CHANGE_SECONDS, offset)

    def _wait_for_silence(self) -> None:
        """Wait until nginx has given up: it tries five times to listen, half a second apart."""
        size, deadline = 0, time.monotonic() + CHANGE_SECONDS
        while size < (size := _measure(self.folder / ERROR_LOG)) and time.monotonic() < deadline:
            time.sleep(SILENT_SECONDS)

    def _wait(self, is_done: Callable[[], bool], seconds: float, offset: int) -> None:
        """Wait until something is so, while nginx runs; `offset` is where its words begin."""
        deadline = time.monotonic() + seconds
        while not is_done():
            if self.exit_status is not None:
                raise _explain(self.folder, offset)
            if time.monotonic() > deadline:
                raise NotReadyError(
                    f"nginx was not ready within {seconds:g} s",
                    detail=_read_tail(self.folder / ERROR_LOG, offset),
                )
            time.sleep(LOOK_SECONDS)

    def _list_workers(self) -> set[int]:
        """Return the workers that accept connections; the others say in their title that they end.

        nginx sets the titles: ngx_process_cycle.c.
        """
        workers = set()
        with contextlib.suppress(psutil.Error, ServerDiedError):
            for child in psutil.Process(self._find_master()).children():
                with contextlib.suppress(psutil.Error):
                    if " ".join(child.cmdline()).strip() == "nginx: worker process":
                        workers.add(child.pid)
        return workers

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._find_master(), number)

    def _find_master(self) -> int:
        """Return the master's process id, and never one that somebody else has since."""
        found = read_server_pid(self.folder)
        if found is None or self.exit_status is not None or read_start_time(found[0]) != found[1]:
            raise ServerDiedError("the gateway has ended", remedy="start it again")
        return found[0]


def _end_draining(folder: Path) -> None:
    """Let clients keep their connections again."""
    for path in folder.glob(draining_name("*")):
        path.unlink(missing_ok=True)


def _write_configuration(folder: Path, text: str) -> None:
    """Put a configuration in place once nginx has read it without complaint."""
    with translate_os_errors(f"write {folder}"):
        fresh = folder / f"{CONFIGURATION}.new"
        fresh.touch(mode=0o600)
        fresh.write_text(text, encoding="utf-8")
        try:
            check_configuration(fresh)
            fresh.replace(folder / CONFIGURATION)
        finally:
            fresh.unlink(missing_ok=True)


def _replace(folder: Path, text: str) -> None:
    """Put back a configuration that was in use."""
    with write_file(folder / CONFIGURATION) as stream:
        stream.write(text.encode())


def _explain(folder: Path, offset: int) -> ServerError:
    """Return the error for an nginx that has ended, in its own words."""
    words = _read_tail(folder / ERROR_LOG, offset) or _read_tail(folder / "output.log", 0)
    if "Address already in use" in words:
        return PortTakenError(
            "the gateway's port is taken",
            remedy="stop what listens there, or choose another port",
            detail=words,
        )
    first = next((line for line in words.splitlines() if "[emerg]" in line), "")
    return ServerDiedError("nginx has ended", found=first, detail=words)


def _measure(path: Path) -> int:
    """Return a file's size; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _read_tail(path: Path, offset: int) -> str:
    """Return the last lines of a file that stand behind an offset."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        stream.seek(max(offset, _measure(path) - TAIL_BYTES))
        return stream.read(TAIL_BYTES).decode("utf-8", "replace")
    return ""
