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
from marwright.server.metrics.files import MetricsWriter
from marwright.server.registry import Record

if TYPE_CHECKING:
    from marwright.monitor.drift import Drift
    from marwright.monitor.predictions import Collected, PredictionLog

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
        self._writer: MetricsWriter | None = None
        self._collected: Counter[str] = Counter()
        self._drifts: dict[tuple[str, str], Drift] = {}
        """The last comparison of each version: one that fails leaves the one before, which ages."""

        def pause(seconds: float) -> float:
            return max(seconds / scale, LEAST_SECONDS)

        self._duties = [Duty("releases", pause(RELEASE_SECONDS), _render_releases)]
        self._drift = Duty("drift", deployment.monitoring.drift.every_seconds, self._compare)
        if self._log is not None:
            self._duties += [
                Duty("predictions", pause(COLLECT_SECONDS), self._collect),
                self._drift,
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
            self._write(record, duty.name, duty.render(record))
        with self.failures.note("telling of failures"):
            self._write(record, "duties", self.failures.render())
        ended = time.monotonic()
        duty.due = ended + max(duty.every_seconds, BUSY_SHARE * (ended - began))

    def close(self) -> None:
        """Take away what was added to the server's metrics."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, record: Record, name: str, text: str) -> None:
        # Nobody reads it where the server is gone; one that only begins has no folder yet.
        folder = Path(record.run_folder)
        if not record.run_folder or not folder.is_dir():
            return
        if self._writer is None or self._writer.run_folder != folder:
            self.close()
            self._writer = MetricsWriter(folder)
        self._writer.write(name, text)

    def _find_due(self) -> float:
        return min(duty.due for duty in self._duties)

    def _collect(self, record: Record) -> str:
        """Move the workers' spool to Parquet."""
        log = self._require_log()
        with self.failures.note("collecting predictions"):
            self._count(log.collect())
        exposition = Exposition()
        exposition.add("marwright_prediction_log_bytes", log.measure())
        for outcome, rows in self._collected.items():
            exposition.add("marwright_prediction_log_rows_total", rows, outcome=outcome)
        for model, version in log.list_versions():
            times = log.read_window(model, version, 1, columns=["time"])["time"]
            if len(times):
                latest = times[-1].as_py().timestamp()
                labels = {"model": model, "version": version}
                exposition.add("marwright_prediction_timestamp_seconds", latest, **labels)
        return exposition.render().decode()

    def _count(self, done: Collected) -> None:
        self._collected.update(
            kept=done.rows,
            malformed=done.skipped,
            expired=done.expired,
            skewed=done.skewed,
            dropped=done.dropped,
        )

    def _compare(self, record: Record) -> str:
        """Compare the last window of each version with its reference."""
        from marwright.monitor.drift import evaluate_version, list_archives, render_metrics

        deployment = Deployment.parse(Path(record.config))[0] if record.config else self._deployment
        settings, archives = deployment.monitoring.drift, list_archives(deployment)
        self._drift.every_seconds = settings.every_seconds
        self._drifts = {key: drift for key, drift in self._drifts.items() if key in archives}
        for key, path in archives.items():
            with self.failures.note(f"drift of {' '.join(key)}"):
                self._drifts[key] = evaluate_version(self._require_log(), key, path, settings)
        return render_metrics(self._drifts)

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
