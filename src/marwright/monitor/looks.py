"""Looks at a served deployment, again and again: how it is, and how fast each version answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any

from marwright.errors import MarwrightError
from marwright.server.metrics.exposition import Sample, read_lines, unescape_label
from marwright.server.registry import Record, find_record
from marwright.server.supervision.inspection import fetch_metrics, inspect_server

__all__ = ["compute_quantile", "Look", "Rates", "Recorder"]

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
REQUESTS = "marwright_http_requests_total"
SECONDS = "marwright_http_request_seconds_bucket"
BATCH = "marwright_batch_size"
QUEUE = "marwright_queue_length"
COUNTED = frozenset({REQUESTS, f"{BATCH}_sum", f"{BATCH}_count"})

Key = tuple[str, str]
Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Rates:
    """How one version did between two looks."""

    requests: float = 0.0
    """Answers a second."""
    errors: float = 0.0
    """Of these, answers with a status of 500 or above, a second."""
    p50: float | None = None
    """Median seconds of a request; None where there was none."""
    p95: float | None = None
    p99: float | None = None
    queue: int = 0
    """Requests that waited at the later look."""
    batch: float | None = None
    """Mean requests of a batch."""


@dataclass(frozen=True)
class Look:
    """What was seen at one moment."""

    time: float
    """Seconds since the epoch."""
    status: Mapping[str, Any]
    """As `marwright status --json` has it."""
    rates: Mapping[Key, Rates] = field(default_factory=dict)
    """By model and version, since the look before; empty at the first one."""
    drift: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    """The last window of each version: detected, rows, and the lowest p as p_value."""
    problem: str = ""
    """Why nothing could be read; empty where it could."""


@dataclass(frozen=True)
class _Reading:
    """The metrics at one moment."""

    clock: float
    """time.monotonic()."""
    values: Mapping[Series, float]


class Recorder:
    """Keeps the last looks at one server or site; use it in a `with` block, or call `look`.

    It goes on while the server is away, and follows it where it comes back under another address.
    """

    def __init__(self, record: Record, *, seconds: float = 2.0, keep: int = 450) -> None:
        self.record = record
        self._seconds = seconds
        self._looks: deque[Look] = deque(maxlen=keep)
        self._before: _Reading | None = None
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looks", daemon=True)

    @property
    def looks(self) -> list[Look]:
        """The looks that are kept, oldest first."""
        with self._changed:
            return list(self._looks)

    def look(self) -> Look:
        """Look now, and keep what is seen; never raises for a server that is away."""
        look = self._look()
        with self._changed:
            self._looks.append(look)
            self._changed.notify_all()
        return look

    def wait(self, after: float, timeout: float) -> Look | None:
        """Return the first look that is later than a time; None where none comes in time."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = next((look for look in self._looks if look.time > after), None)
                left = deadline - time.monotonic()
                if found is not None or left <= 0:
                    return found
                self._changed.wait(left)

    def start(self) -> None:
        """Begin to look every `seconds`."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Recorder:
        """Begin to look."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop looking."""
        self.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self.look()
            except Exception:  # a mistake of ours must not end the looks of all viewers
                _log.exception("a look failed")
            self._ended.wait(max(0.05, self._seconds - (time.monotonic() - began)))

    def _look(self) -> Look:
        now = time.time()
        if self._looks:  # whoever waits for a later one, waits on where the clock was set back
            now = max(now, self._looks[-1].time + 1e-3)
        try:
            self.record = find_record(self.record.name)
        except MarwrightError as exc:
            self._before = None
            return Look(
                now,
                {"name": self.record.name, "models": [], "problems": [str(exc)]},
                problem=exc.message,
            )
        status = inspect_server(self.record)
        text = fetch_metrics(self.record.health_url) if self.record.health_url else None
        if text is None:
            self._before = None
            problems = status.get("problems") or ["its metrics cannot be read"]
            return Look(now, status, problem="; ".join(problems))
        samples, _ = read_lines(text)
        reading = _Reading(time.monotonic(), _gather(samples))
        before, self._before = self._before, reading
        rates = _compare(before, reading) if before is not None else {}
        return Look(now, status, rates, _gather_drift(samples))


def compute_quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float | None:
    """Return a quantile of a histogram as Prometheus' histogram_quantile does.

    `buckets` are upper edges with counts up to them, rising, the last edge infinite. None where
    nothing was counted.
    """
    total = buckets[-1][1] if buckets else 0.0
    if total <= 0:
        return None
    rank = share * total
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank:
            if math.isinf(high):
                return low
            return low + (high - low) * (rank - below) / (count - below) if count > below else high
    return buckets[-1][0]


def _gather(samples: Sequence[Sample]) -> dict[Series, float]:
    """Return the values by name and labels."""
    return {(sample.name, sample.labels): float(sample.value) for sample in samples}


class _Growth:
    """How much each counter has grown between two readings, replica by replica.

    One that fell began anew. One that was not there before begins at 0, but where nothing of its
    metric was read of its replica then: that says nothing about what it had counted.
    """

    def __init__(self, before: Mapping[Series, float]) -> None:
        self._before = before
        self._known = {(name, dict(pairs).get("replica")) for name, pairs in before}

    def find(self, series: Series, value: float) -> float:
        name, pairs = series
        earlier = self._before.get(series)
        if earlier is None:
            return value if (name, dict(pairs).get("replica")) in self._known else 0.0
        return value - earlier if value >= earlier else value


def _compare(before: _Reading, after: _Reading) -> dict[Key, Rates]:
    """Return each version's rates between two readings, its replicas added up."""
    seconds = max(1e-3, after.clock - before.clock)
    growth = _Growth(before.values)
    counts: defaultdict[tuple[str, Key], float] = defaultdict(float)
    buckets: defaultdict[Key, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    for series, value in after.values.items():
        name, labels = series[0], dict(series[1])
        key = _find_key(labels)
        if name == QUEUE:
            counts[QUEUE, key] += value
        elif name == SECONDS:
            buckets[key][float(labels["le"])] += growth.find(series, value)
        elif name in COUNTED:
            grown = growth.find(series, value)
            counts[name, key] += grown
            if labels.get("status", "").startswith("5"):
                counts["errors", key] += grown
    keys = {key for name, key in counts if name in {REQUESTS, QUEUE}}
    return {key: _make_rates(key, counts, sorted(buckets[key].items()), seconds) for key in keys}


def _make_rates(
    key: Key,
    counts: Mapping[tuple[str, Key], float],
    edges: Sequence[tuple[float, float]],
    seconds: float,
) -> Rates:
    batches = counts.get((f"{BATCH}_count", key), 0.0)
    return Rates(
        requests=counts.get((REQUESTS, key), 0.0) / seconds,
        errors=counts.get(("errors", key), 0.0) / seconds,
        p50=compute_quantile(0.5, edges),
        p95=compute_quantile(0.95, edges),
        p99=compute_quantile(0.99, edges),
        queue=int(counts.get((QUEUE, key), 0)),
        batch=counts.get((f"{BATCH}_sum", key), 0.0) / batches if batches else None,
    )


def _find_key(labels: Mapping[str, str]) -> Key:
    """Return which version a series is about, as the status names it."""
    return unescape_label(labels.get("model", "")), unescape_label(labels.get("version", ""))


def _gather_drift(samples: Sequence[Sample]) -> dict[Key, dict[str, float]]:
    """Return what the last windows were found to be, by model and version."""
    fields = {
        "marwright_drift_detected": "detected",
        "marwright_drift_window_rows": "rows",
        "marwright_drift_p_value": "p_value",
    }
    found: dict[Key, dict[str, float]] = {}
    for sample in samples:
        if name := fields.get(sample.name):
            labels = dict(sample.labels)
            row = found.setdefault(_find_key(labels), {})
            value = float(sample.value)
            row[name] = min(value, row.get(name, value)) if name == "p_value" else value
    return found
