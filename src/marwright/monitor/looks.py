"""Looks at a served deployment, again and again: how it is, and how fast each version answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
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
    """Return the values by name and labels, replicas added up."""
    values: dict[Series, float] = {}
    for sample in samples:
        labels = tuple(pair for pair in sample.labels if pair[0] != "replica")
        series = sample.name, labels
        values[series] = values.get(series, 0.0) + float(sample.value)
    return values


def _compare(before: _Reading, after: _Reading) -> dict[Key, Rates]:
    """Return each version's rates between two readings; a counter that fell began anew."""
    seconds = max(1e-3, after.clock - before.clock)
    requests: dict[Key, float] = {}
    errors: dict[Key, float] = {}
    buckets: dict[Key, list[tuple[float, float]]] = {}
    batches: dict[tuple[Key, str], float] = {}
    queues: dict[Key, int] = {}
    for (name, pairs), value in after.values.items():
        labels = dict(pairs)
        key = _find_key(labels)
        earlier = before.values.get((name, pairs), 0.0)
        grown = value - earlier if value >= earlier else value
        if name == REQUESTS:
            requests[key] = requests.get(key, 0.0) + grown
            if labels["status"] >= "500":
                errors[key] = errors.get(key, 0.0) + grown
        elif name == SECONDS:
            buckets.setdefault(key, []).append((float(labels["le"]), grown))
        elif name in {f"{BATCH}_sum", f"{BATCH}_count"}:
            batches[key, name] = grown
        elif name == "marwright_queue_length":
            queues[key] = int(value)
    rates = {}
    for key in {*requests, *queues}:
        edges = sorted(buckets.get(key, []))
        count = batches.get((key, f"{BATCH}_count"), 0.0)
        rates[key] = Rates(
            requests=requests.get(key, 0.0) / seconds,
            errors=errors.get(key, 0.0) / seconds,
            p50=compute_quantile(0.5, edges),
            p95=compute_quantile(0.95, edges),
            p99=compute_quantile(0.99, edges),
            queue=queues.get(key, 0),
            batch=batches.get((key, f"{BATCH}_sum"), 0.0) / count if count else None,
        )
    return rates


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
