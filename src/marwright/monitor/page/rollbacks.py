"""The rollback button: what `marwright rollback` does, also while somebody else's release runs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil

from marwright.errors import ReleaseError
from marwright.monitor.page.sources import Sources
from marwright.release.history import History, Standing
from marwright.release.rollback import roll_back
from marwright.release.target import open_target

__all__ = ["Rollbacks"]

REASON = "asked for on the page"
END_SECONDS = 120.0
"""How long a release that is told to stop may take to go back."""
LOOK_SECONDS = 0.1


class Rollbacks:
    """Takes releases back, one at a time; threads may share it."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._lock = threading.Lock()

    def roll_back(self, model: str) -> str:
        """Return a model to the version before its last release; say in a line what was done.

        Raises:
            ReleaseError: there is nothing to return to, or it did not work whole.
            MarwrightError: the server does not answer.
        """
        if not self._lock.acquire(blocking=False):
            raise ReleaseError(
                "a release is being taken back already", remedy="wait for its end, and look again"
            )
        try:
            holder = find_holder(self._sources.history)
            if holder is not None:
                return self._interrupt(holder, model)
            return self._roll_back(model)
        finally:
            self._lock.release()

    def _roll_back(self, model: str) -> str:
        said: list[str] = []
        with open_target(self._sources.record.name) as target, target.history.hold():
            roll_back(target, model, reason=REASON, tell=said.append)
        return said[-1] if said else f"{model} is where it was"

    def _interrupt(self, holder: psutil.Process, model: str) -> str:
        """Have the process that makes a release take it back, as Ctrl-C does there."""
        history = self._sources.history
        begun = _find_last(history, model)
        if begun is None or not begun.is_open or not _is_release(holder, begun):
            raise ReleaseError(
                "another release is being made",
                found=f"process {holder.pid}",
                remedy="wait for its end",
            )
        with contextlib.suppress(psutil.NoSuchProcess):
            holder.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while holder.is_running() and find_holder(history) is not None:
            if time.monotonic() > deadline:
                raise ReleaseError(
                    f"the release of {model} was told to stop, and has not gone back yet",
                    found=f"process {holder.pid} still runs",
                    remedy="look again in a while",
                )
            time.sleep(LOOK_SECONDS)
        last = _find_last(history, model)
        if last is not None and not last.is_open:
            return last.last.describe()
        return self._roll_back(model)  # it has ended without an end: killed, perhaps


def _find_last(history: History, model: str) -> Standing | None:
    return next(reversed(history.list_standings(model)), None)


def _is_release(process: psutil.Process, standing: Standing) -> bool:
    """Whether a process is the `marwright release` that makes a release.

    Others hold its history too: a rollback, or the release of another model while an old one of
    this model is still open.
    """
    try:
        words = [Path(word).name for word in process.cmdline()]
    except psutil.Error:
        return False
    archive = standing.begun.archive  # empty where the history does not say
    return ("marwright", "release") in pairwise(words) and archive != "" and archive in words


def find_holder(history: History) -> psutil.Process | None:
    """Return the process that makes a release just now; None where there is none.

    The lock's file says its number, which counts only where that process has the file open:
    numbers are used again.
    """
    lock = history.path.with_name(f".{history.path.name}.lock")  # see storage.hold_path
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        pid = int(lock.read_text(encoding="ascii"))
        if pid != os.getpid():
            process = psutil.Process(pid)
            if any(item.path == str(lock) for item in process.open_files()):
                return process
    return None
