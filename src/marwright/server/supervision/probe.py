"""Whether a version answers: a sample that its archive carries is sent now and then.

Without a sample, having its workers is all that is asked of a version.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.archive.checks.samples import Sample
from marwright.client import Client
from marwright.errors import MarwrightError
from marwright.server.samples import BUSY, judge_sample, read_sample
from marwright.server.wanted import Wanted

__all__ = ["Probe"]

EVERY_SECONDS = 30.0
"""Between two samples for one version."""
AGAIN_SECONDS = 2.0
"""The same where it has not answered its sample yet, or answers it wrongly."""
ANSWER_SECONDS = 10.0

Key = tuple[str, str]
Result = str | None
"""What is wrong with the answer, "" where nothing is, None where none is known yet."""


@dataclass
class _Target:
    """One archive as it is served, and what came of asking it."""

    request: tuple[Any, Sample] | None
    result: Result = None
    due: float = 0.0
    busy: bool = field(default=False)


class Probe:
    """Sends samples in the background; what came of them is there at once."""

    def __init__(self, *, every: float = EVERY_SECONDS) -> None:
        self._every = every
        self._targets: dict[tuple[Key, tuple[int, ...]], _Target] = {}
        self._latest: dict[Key, _Target] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="probe")
        self._lock = threading.Lock()

    def close(self) -> None:
        """Send nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self) -> None:
        """Ask every version anew: the server was started again."""
        with self._lock:
            self._targets.clear()
            self._latest.clear()

    def ask(self, client: Client, folder: Path, versions: Iterable[Wanted]) -> None:
        """Send a sample to each of these versions for which one is due; does not wait.

        `folder` holds the archives as the server reads them.
        """
        now = time.monotonic()
        for item in versions:
            target = self._find_target(item, folder / item.path.name)
            if target is None or target.request is None:
                continue
            with self._lock:
                if target.busy or now < target.due:
                    continue
                target.busy = True
            self._pool.submit(self._send, client, item.key, target)

    def read(self, key: Key) -> Result:
        """Return what is wrong with a version's answer; "" where nothing is, or it has no sample.

        None where that is not known yet.
        """
        target = self._latest.get(key)
        if target is None:
            return None
        return "" if target.request is None else target.result

    def _find_target(self, item: Wanted, path: Path) -> _Target | None:
        try:
            status = path.stat()
        except OSError:
            return None  # it is being replaced
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            target = self._targets.get((item.key, identity))
            if target is None:
                target = _Target(read_sample(path))
                self._targets[item.key, identity] = target
            self._latest[item.key] = target
            return target

    def _send(self, client: Client, key: Key, target: _Target) -> None:
        assert target.request is not None  # ask() looks
        body, sample = target.request
        try:
            target.result = judge_sample(client, key, body, sample, timeout=ANSWER_SECONDS)
        except BUSY:
            target.due = time.monotonic() + AGAIN_SECONDS  # what was known still holds
        except MarwrightError as exc:
            target.result = f"sample {sample.name}: {exc}"
            target.due = time.monotonic() + AGAIN_SECONDS
        else:
            target.due = time.monotonic() + (AGAIN_SECONDS if target.result else self._every)
        finally:
            target.busy = False
