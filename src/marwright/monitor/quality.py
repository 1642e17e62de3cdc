"""How often served predictions were right, as far as their true labels are known by now."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from marwright.monitor.feedback import count_items, index_labels
from marwright.monitor.spool import compute

if TYPE_CHECKING:
    from marwright.monitor.predictions import PredictionLog

__all__ = ["ClassQuality", "estimate_share", "Interval", "measure_quality", "Quality"]

FEW = 30
"""A class with fewer labels is marked: its shares say little yet."""
BINS = 10
Z = 1.959963984540054
"""Of the normal distribution, 95 % is within so many standard deviations."""


@dataclass(frozen=True)
class Interval:
    """A share, and the Wilson interval that holds the true one with 95 %."""

    value: float
    """Not a number where nothing was measured."""
    low: float
    high: float
    n: int
    """Of how many."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        value = None if math.isnan(self.value) else self.value
        return {"value": value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class ClassQuality:
    """How well one class was told."""

    precision: Interval
    """How many of those that were predicted as it are of it."""
    recall: Interval
    """How many of those that are of it were predicted as it."""

    @property
    def support(self) -> int:
        """How many labels there are of it."""
        return self.recall.n

    @property
    def is_few(self) -> bool:
        """Whether it has too few labels to say much."""
        return self.support < FEW


@dataclass(frozen=True)
class Quality:
    """How well a version predicted, of what is labelled."""

    model: str
    version: str
    accuracy: Interval
    classes: Mapping[str, ClassQuality]
    """By label, those with the most labels first."""
    confusion: Mapping[tuple[str, str], int]
    """How often a label was given a prediction, the most often first."""
    calibration_error: float | None
    """How far confidence is from accuracy, on average over ten bins; None without confidences."""

    def to_json(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return {
            "model": self.model,
            "version": self.version,
            "accuracy": self.accuracy.to_json(),
            "classes": [
                {
                    "label": label,
                    "support": item.support,
                    "few": item.is_few,
                    "precision": item.precision.to_json(),
                    "recall": item.recall.to_json(),
                }
                for label, item in self.classes.items()
            ],
            "confusion": [
                {"label": label, "prediction": prediction, "count": count}
                for (label, prediction), count in self.confusion.items()
            ],
            "calibration_error": self.calibration_error,
        }


class _Pair(NamedTuple):
    """A prediction whose label is known."""

    label: str
    prediction: str
    confidence: float | None


def measure_quality(
    log: PredictionLog, model: str, version: str, *, since: float | None = None
) -> Quality:
    """Return how well a version predicted.

    `since`: only what was predicted from then on, in seconds since the epoch.
    """
    pairs = _join(log, model, version, since or 0.0)
    right = sum(pair.label == pair.prediction for pair in pairs)
    confusion = Counter((pair.label, pair.prediction) for pair in pairs)
    return Quality(
        model=model,
        version=version,
        accuracy=estimate_share(right, len(pairs)),
        classes=_measure_classes(confusion),
        confusion=dict(sorted(confusion.items(), key=lambda item: (-item[1], item[0]))),
        calibration_error=_measure_calibration(pairs),
    )


def estimate_share(count: int, total: int) -> Interval:
    """Return a share with its Wilson interval (Wilson, JASA 1927); anything where total is 0."""
    if not total:
        return Interval(math.nan, 0.0, 1.0, 0)
    share = count / total
    spread = 1 + Z * Z / total
    middle = (share + Z * Z / (2 * total)) / spread
    half = Z / spread * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    # Rounding must not keep a bound from the end that it is at.
    low = 0.0 if not count else max(0.0, middle - half)
    high = 1.0 if count == total else min(1.0, middle + half)
    return Interval(share, low, high, total)


def _join(log: PredictionLog, model: str, version: str, since: float) -> list[_Pair]:
    """Return a version's predictions whose label is known; a request that was sent again once."""
    labels = log.gather_labels()
    if not labels.num_rows:
        return []
    requests = compute.unique(labels["request"])

    def select(table: Any) -> Any:
        is_meant = compute.and_(
            compute.equal(table["model"], model), compute.equal(table["version"], version)
        )
        return table.filter(
            compute.and_(is_meant, compute.is_in(table["request"], value_set=requests))
        )

    names = ["request", "item", "model", "version", "prediction", "confidence", "time"]
    records = log.gather(names, select)
    said = index_labels(labels, count_items(records))
    latest: dict[tuple[str, int], tuple[float, _Pair]] = {}
    micros = records["time"].cast("int64").to_pylist()
    columns = [
        records[name].to_pylist() for name in ("request", "item", "prediction", "confidence")
    ]
    for request, item, prediction, confidence, micro in zip(*columns, micros, strict=True):
        label = said.get((request, item))
        if label is None or prediction is None or micro < since * 1e6:
            continue
        before = latest.get((request, item))
        if before is None or before[0] < micro:
            latest[request, item] = micro, _Pair(label[1], prediction, confidence)
    return [pair for _, pair in latest.values()]


def _measure_classes(confusion: Mapping[tuple[str, str], int]) -> dict[str, ClassQuality]:
    labelled: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    for (label, prediction), count in confusion.items():
        labelled[label] += count
        predicted[prediction] += count
    return {
        label: ClassQuality(
            precision=estimate_share(confusion.get((label, label), 0), predicted[label]),
            recall=estimate_share(confusion.get((label, label), 0), labelled[label]),
        )
        for label in sorted({*labelled, *predicted}, key=lambda name: (-labelled[name], name))
    }


def _measure_calibration(pairs: Sequence[_Pair]) -> float | None:
    """Return the expected calibration error, over bins of equal width."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for pair in pairs:
        if pair.confidence is not None and 0 <= pair.confidence <= 1:
            number = min(int(pair.confidence * BINS), BINS - 1)
            bins.setdefault(number, []).append((pair.confidence, pair.label == pair.prediction))
    total = sum(map(len, bins.values()))
    if not total:
        return None
    gaps = (
        abs(sum(confidence for confidence, _ in items) - sum(right for _, right in items))
        for items in bins.values()
    )
    return sum(gaps) / total
