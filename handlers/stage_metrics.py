"""What the handler tells Prometheus: seconds by stage, batch sizes, requests by status.

TorchServe's metrics API costs a printed line and its parsing in Java for each observation, and its
histograms know only buckets from 5 ms up, whatever the unit (simpleclient's defaults). So
the buckets are counted here and handed over every five seconds, as counters with the label `le`:
what a histogram is on the wire. Without the metrics file that declares them TorchServe would throw
them away, so then none are sent; an older file of ours declares all but the prediction log's.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

__all__ = ["StageMetrics", "StopWatch"]

SECONDS_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
FLUSH_SECONDS = 5.0
"""Each time prints a line a bucket, which TorchServe parses: once a second cost 2 %."""

STAGE = "marwright_stage_seconds"
BATCH = "marwright_batch_size"
REQUESTS = "marwright_requests_total"
LOGGED = "marwright_predictions_logged_total"
LOST = "marwright_predictions_lost_total"

Series = tuple[str, tuple[str, ...]]
"""A metric's name, and its labels' values after model and version."""


class StageMetrics:
    """Counts of one worker since the last flush."""

    def __init__(self, context: Any, *, model: str, version: str, enabled: bool = True) -> None:
        self._labels = (model, version)
        self._cache = context.metrics if enabled and _is_declared(context.metrics, *_OWN) else None
        self._counts_predictions = self._cache is not None and _is_declared(
            self._cache, LOGGED, LOST
        )
        self._histograms: dict[Series, Histogram] = {}
        self._statuses: Counter[int] = Counter()
        self._predictions: Counter[str] = Counter()
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
            self._observe((BATCH, ()), size, SIZE_BUCKETS)
            for stage, seconds in laps:
                self._observe((STAGE, (stage,)), seconds, SECONDS_BUCKETS)
            self._statuses.update(statuses)

    def count_predictions(self, logged: int, lost: int) -> None:
        """Count what the prediction log wrote, and what it could not."""
        if self._counts_predictions:
            with self._lock:
                self._predictions.update({LOGGED: logged, LOST: lost})

    def _observe(self, series: Series, value: float, edges: Sequence[float]) -> None:
        histogram = self._histograms.get(series)
        if histogram is None:
            histogram = self._histograms[series] = Histogram(edges)
        histogram.observe(value)

    def flush(self) -> None:
        """Hand what was counted to TorchServe."""
        with self._lock:
            histograms, self._histograms = self._histograms, {}
            statuses, self._statuses = self._statuses, Counter()
            predictions, self._predictions = self._predictions, Counter()
        for (name, labels), histogram in histograms.items():
            for edge, count in histogram.accumulate():
                self._add(f"{name}_bucket", count, *labels, edge)
            self._add(f"{name}_sum", histogram.total, *labels)
            self._add(f"{name}_count", sum(histogram.counts), *labels)
        for status, count in statuses.items():
            self._add(REQUESTS, count, str(status))
        for name, count in predictions.items():
            self._add(name, count)

    def _add(self, name: str, value: float, *labels: str) -> None:
        assert self._cache is not None  # else nothing is counted
        self._cache.get_metric(name).add_or_update(round(value, 6), [*self._labels, *labels])

    def _flush_forever(self) -> None:
        while True:
            time.sleep(FLUSH_SECONDS)
            self.flush()


class Histogram:
    """Observations by bucket: one addition each, whatever the number of buckets."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket that it fits into."""
        self.counts[bisect.bisect_left(self._edges, value)] += 1
        self.total += value

    def accumulate(self) -> Iterator[tuple[str, int]]:
        """Give each bucket's `le` with the observations that fit into it, but for empty ones."""
        names = [*(f"{edge:g}" for edge in self._edges), "+Inf"]
        for name, count in zip(names, accumulate(self.counts), strict=True):
            if count:
                yield name, count


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


_OWN = (
    REQUESTS,
    *(f"{name}_{part}" for name in (STAGE, BATCH) for part in ("bucket", "sum", "count")),
)


def _is_declared(cache: Any, *names: str) -> bool:
    """Tell whether the server's metrics file has all of these names."""
    try:
        for name in names:
            cache.get_metric(name)
    except Exception:  # TorchServe's own kind, a KeyError of a test's, or no cache at all
        return False
    return True
