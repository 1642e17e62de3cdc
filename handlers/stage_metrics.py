"""What the handler tells Prometheus: seconds by stage, batch sizes, requests by status.

TorchServe's metrics API costs a printed line and its parsing in Java for each observation, and its
histograms know only buckets from 5 ms up, whatever the unit (simpleclient's defaults). So
the buckets are counted here and handed over once a second, as counters with the label `le`: what a
histogram is on the wire. Without the metrics file that declares them TorchServe would throw them
away, so then none are sent.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["StageMetrics", "StopWatch"]

SECONDS_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
FLUSH_SECONDS = 1.0

STAGE = "marwright_stage_seconds"
BATCH = "marwright_batch_size"
REQUESTS = "marwright_requests_total"

Series = tuple[str, tuple[str, ...]]
"""A metric's name, and its labels' values after model and version."""


class StageMetrics:
    """Counts of one worker since the last flush."""

    def __init__(self, context: Any, *, model: str, version: str, enabled: bool = True) -> None:
        self._labels = (model, version)
        self._cache = context.metrics if enabled and _is_declared(context.metrics) else None
        self._pending: Counter[Series] = Counter()
        self._lock = threading.Lock()
        if self._cache is not None:
            threading.Thread(target=self._flush_forever, name="metrics", daemon=True).start()

    def start(self, size: int) -> StopWatch:
        """Begin to measure one batch."""
        return StopWatch(self, size)

    def record(self, size: int, laps: Sequence[tuple[str, float]], statuses: Sequence[int]) -> None:
        """Count one batch: its size, its stages' seconds, its answers' statuses."""
        if self._cache is None:
            return
        with self._lock:
            _observe(self._pending, BATCH, (), size, SIZE_BUCKETS)
            for stage, seconds in laps:
                _observe(self._pending, STAGE, (stage,), seconds, SECONDS_BUCKETS)
            for status in statuses:
                self._pending[REQUESTS, (str(status),)] += 1

    def flush(self) -> None:
        """Hand what was counted to TorchServe."""
        with self._lock:
            pending, self._pending = self._pending, Counter()
        assert self._cache is not None  # else nothing is counted
        for (name, labels), value in pending.items():
            metric = self._cache.get_metric(name)
            metric.add_or_update(round(value, 6), [*self._labels, *labels])

    def _flush_forever(self) -> None:
        while True:
            time.sleep(FLUSH_SECONDS)
            self.flush()


class StopWatch:
    """Measures the stages of one batch."""

    def __init__(self, metrics: StageMetrics, size: int) -> None:
        self._metrics = metrics
        self._size = size
        self._laps: list[tuple[str, float]] = []
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self._laps.append((stage, now - self._since))
        self._since = now

    def finish(self, stage: str, statuses: Sequence[int]) -> None:
        """End the last stage and count the batch."""
        self.lap(stage)
        self._metrics.record(self._size, self._laps, statuses)


def _observe(
    pending: Counter[Series],
    name: str,
    labels: tuple[str, ...],
    value: float,
    buckets: Sequence[float],
) -> None:
    """Count one observation as a histogram does: in every bucket that it fits into."""
    for edge in buckets[bisect.bisect_left(buckets, value) :]:
        pending[f"{name}_bucket", (*labels, f"{edge:g}")] += 1
    pending[f"{name}_bucket", (*labels, "+Inf")] += 1
    pending[f"{name}_sum", labels] += value  # type: ignore[assignment]  # seconds are no integers
    pending[f"{name}_count", labels] += 1


def _is_declared(cache: Any) -> bool:
    """Tell whether the server's metrics file names all of ours."""
    histograms = [
        f"{name}_{part}" for name in (STAGE, BATCH) for part in ("bucket", "sum", "count")
    ]
    try:
        for name in (REQUESTS, *histograms):
            cache.get_metric(name)
    except Exception:  # TorchServe's own kind, a KeyError of a test's, or no cache at all
        return False
    return True
