"""What is done again and again for a monitored server: collect, compare, measure; metrics of it.

Each duty leaves a file that the server's own metrics take in. One that fails keeps no other from
being done: it is told once, and counted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.errors import MarwrightError
from marwright.monitor.release_metrics import render_releases
from marwright.release.history import HISTORY_NAME, History
from marwright.release.target import place_history
from marwright.server.deployment import Deployment
from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.files import FOLDER, write_metrics
from marwright.server.registry import Record

if TYPE_CHECKING:
    from marwright.monitor.predictions import PredictionLog

__all__ = ["Duties", "Duty", "Failures"]

_log = logging.getLogger(__name__)

COLLECT_SECONDS = 10.0
QUALITY_SECONDS = 60.0
RELEASE_SECONDS = 5.0
LEAST_SECONDS = 1.0
BUSY_SHARE = 4
"""The pause after a duty is at least so many times what it took."""
END_SECONDS = 30.0


@dataclass
class Duty:
    """One of them."""

    name: str
    """Of its file too."""
    every_seconds: float
    render: Callable[[Record], str]
    """Do it, and return the metrics of it."""
    due: float = 0.0


class Failures:
    """What goes wrong: each told once until it changes or is over, and counted."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def note(self, what: str) -> Iterator[None]:
        """Let the block fail without harm to what comes after it."""
        try:
            yield
        except Exception as exc:  # a mistake of ours in one duty is no reason to drop the others
            self.counts[what] += 1
            reason = str(exc) if isinstance(exc, MarwrightError) else repr(exc)
            if self._told.get(what) != reason:
                self._told[what] = reason
                self._say(f"{what} failed: {reason}")
                _log.debug("%s failed", what, exc_info=exc)
        else:
            if self._told.pop(what, None) is not None:
                self._say(f"{what} works again")

    def render(self) -> str:
        """Return the counts as metrics."""
        exposition = Exposition()
        for duty, count in self.counts.items():
            exposition.add("marwright_monitor_failures_total", count, duty=duty)
        return exposition.render().decode()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            self._tell(line)


class Duties:
    """All that is done for one deployment; `scale` divides the pauses between."""

    def __init__(
        self, deployment: Deployment, *, tell: Callable[[str], None], scale: float = 1.0
    ) -> None:
        self.failures = Failures(tell)
        self._deployment = deployment
        self._log = _open_log(deployment)

        def pause(seconds: float) -> float:
            return max(seconds / scale, LEAST_SECONDS)

        self._duties = [Duty("releases", pause(RELEASE_SECONDS), _render_releases)]
        if self._log is not None:
            drift = deployment.monitoring.drift.every_seconds
            self._duties += [
                Duty("predictions", pause(COLLECT_SECONDS), self._collect),
                Duty("drift", drift, self._compare),
                Duty("quality", pause(QUALITY_SECONDS), self._measure),
            ]

    @contextlib.contextmanager
    def perform(self, find: Callable[[], Record]) -> Iterator[None]:
        """Do what is due in a thread of its own until the block ends; `find` returns the server."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(max(0.05, self._find_due() - time.monotonic())):
                for duty in self._duties:
                    if not stop.is_set() and duty.due <= time.monotonic():
                        self.do(duty, find())

        thread = threading.Thread(target=work, name="duties", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(END_SECONDS)

    def do(self, duty: Duty, record: Record) -> None:
        """Do one now, whatever comes of it, and say when it is due again."""
        began = time.monotonic()
        with self.failures.note(duty.name):
            _write(record, duty.name, duty.render(record))
        with self.failures.note("telling of failures"):
            _write(record, "duties", self.failures.render())
        ended = time.monotonic()
        duty.due = ended + max(duty.every_seconds, BUSY_SHARE * (ended - began))

    def clear(self, find: Callable[[], Record]) -> None:
        """Take away the files: what nobody renews is not to be taken for news."""
        folder = find().run_folder
        if not folder:
            return  # the server has none yet
        for name in ("duties", *(duty.name for duty in self._duties)):
            (Path(folder) / FOLDER / f"{name}.prom").unlink(missing_ok=True)

    def _find_due(self) -> float:
        return min(duty.due for duty in self._duties)

    def _collect(self, record: Record) -> str:
        """Move the workers' spool to Parquet."""
        log = self._require_log()
        with self.failures.note("collecting predictions"):
            log.collect()
        exposition = Exposition()
        exposition.add("marwright_prediction_log_bytes", log.measure())
        for model, version in log.list_versions():
            times = log.read_window(model, version, 1, columns=["time"])["time"]
            if len(times):
                latest = times[-1].as_py().timestamp()
                labels = {"model": model, "version": version}
                exposition.add("marwright_prediction_timestamp_seconds", latest, **labels)
        return exposition.render().decode()

    def _compare(self, record: Record) -> str:
        """Compare the last window of each version with its reference."""
        from marwright.monitor.drift import Drift, evaluate, list_archives, render_metrics

        deployment = Deployment.parse(Path(record.config))[0] if record.config else self._deployment
        drifts: dict[tuple[str, str], Drift] = {}
        for key, path in list_archives(deployment).items():
            with self.failures.note(f"drift of {' '.join(key)}"):
                drifts |= evaluate(self._require_log(), {key: path}, deployment.monitoring.drift)
        return render_metrics(drifts)

    def _measure(self, record: Record) -> str:
        """Measure each version by the labels that came late."""
        from marwright.monitor.quality import measure_quality

        log, exposition = self._require_log(), Exposition()
        for model, version in log.list_versions():
            with self.failures.note(f"quality of {model} {version}"):
                accuracy = measure_quality(log, model, version).accuracy
                labels = {"model": model, "version": version}
                exposition.add("marwright_quality_labels", accuracy.n, **labels)
                if accuracy.n:
                    place = "marwright_quality_accuracy"
                    exposition.add(f"{place}_ratio", accuracy.value, **labels)
                    exposition.add(f"{place}_lower_ratio", accuracy.low, **labels)
                    exposition.add(f"{place}_upper_ratio", accuracy.high, **labels)
        return exposition.render().decode()

    def _require_log(self) -> PredictionLog:
        assert self._log is not None  # else it is no duty
        return self._log


def _write(record: Record, name: str, text: str) -> None:
    # Nobody reads it where the server is gone; one that only begins has no folder yet.
    if record.run_folder and Path(record.run_folder).is_dir():
        write_metrics(Path(record.run_folder), name, text)


def _open_log(deployment: Deployment) -> PredictionLog | None:
    settings = deployment.monitoring.predictions
    if settings is None:
        return None
    from marwright.monitor.predictions import PredictionLog  # needs pyarrow

    return PredictionLog(
        settings.folder, keep_days=settings.keep_days, most_bytes=settings.most_bytes
    )


def _render_releases(record: Record) -> str:
    path = (
        Path(record.config).with_name(HISTORY_NAME) if record.config else place_history(record.name)
    )
    return render_releases(History(path).list_standings())
