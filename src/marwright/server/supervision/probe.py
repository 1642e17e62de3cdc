"""Whether a version answers: a sample that its archive carries is sent now and then.

Without a sample, having its workers is all that is asked of a version.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.archive.checks.comparison import compare_values
from marwright.archive.checks.samples import Sample
from marwright.archive.reader import Archive
from marwright.client import Client
from marwright.errors import (
    AnswerError,
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    RequestTimeoutError,
)
from marwright.server.wanted import Wanted

__all__ = ["Probe"]

EVERY_SECONDS = 30.0
"""Between two samples for one version."""
AGAIN_SECONDS = 2.0
"""The same where it has not answered its sample yet, or answers it wrongly."""
ANSWER_SECONDS = 10.0
_FOLDER = "MAR-INF/samples"
_BUSY = (OverloadedError, ConnectionFailedError, RequestTimeoutError)
"""Of a server that has too much to do, or is being restarted: no answer, neither a wrong one."""

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
            target.result = _judge(client, key, body, sample)
        except _BUSY:
            target.due = time.monotonic() + AGAIN_SECONDS  # what was known still holds
        except MarwrightError as exc:
            target.result = f"sample {sample.name}: {exc}"
            target.due = time.monotonic() + AGAIN_SECONDS
        else:
            target.due = time.monotonic() + (AGAIN_SECONDS if target.result else self._every)
        finally:
            target.busy = False


def _judge(client: Client, key: Key, body: Any, sample: Sample) -> str:
    """Send a sample; return what is wrong with the answer."""
    try:
        answer = client.predict(key[0], body, version=key[1], timeout=ANSWER_SECONDS)
    except _BUSY:
        raise
    except AnswerError as exc:
        if exc.status == sample.status:
            return ""
        return f"sample {sample.name}: {exc}"
    if sample.status not in (None, answer.status):
        return f"sample {sample.name} is answered with {answer.status} instead of {sample.status}"
    if sample.answer is None:
        return ""
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        found = answer.body.decode("utf-8", "replace")
    difference = compare_values(sample.answer, found, subset=True)
    grave = difference is not None and difference.is_grave
    return f"sample {sample.name}: {difference.text}" if difference and grave else ""


def read_sample(path: Path) -> tuple[Any, Sample] | None:
    """Return the first sample of an archive, as it is sent; None where it carries none."""
    try:
        with Archive.open(path) as archive, tempfile.TemporaryDirectory() as scratch:
            names = tuple(name for name in archive.names if name.startswith(_FOLDER))
            if not names:
                return None
            folder = archive.extract(Path(scratch) / "samples", members=names)
            samples = Sample.read_all(folder)
            return (
                (_encode(samples[0], samples[0].path.read_bytes()), samples[0]) if samples else None
            )
    except (MarwrightError, OSError):
        return None  # TorchServe itself says what it cannot load


def _encode(sample: Sample, content: bytes) -> Any:
    """Return a body as the client takes it, so that it sends the kind that the sample has."""
    kind = sample.content_type or ""
    try:
        if kind.startswith("application/json"):
            return json.loads(content)
        if kind.startswith("text/"):
            return content.decode()
    except ValueError:
        pass  # then as bytes: a sample may be one that is to be refused
    return content
