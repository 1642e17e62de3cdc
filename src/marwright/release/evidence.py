"""What speaks against an allowed error rate or quantile: bets on what comes, and what they won."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from marwright.errors import UsageError

__all__ = ["Bets", "find_nearest", "Floats", "predict_counts", "Ranks", "require"]

Floats: TypeAlias = NDArray[np.float64]

PRIORS = (20.0, 200.0)
"""How many observations each prior of a share is worth; few see a large change early."""
FIRST_RATE = 0.05
"""The error rate that is expected before any request."""
WEIGHT = 10.0
"""How many requests that expectation is worth."""
SMALLEST = 1e-12
"""No error rate is taken to be nearer to 0 or 1."""


@dataclass(frozen=True)
class Bets:
    """What was bet on between two looks, and what came: (2, looks) each, the stable arm first."""

    rates: Floats
    """Expected from the looks before."""
    errors: Floats
    totals: Floats

    @classmethod
    def place(cls, stable: Sequence[tuple[int, int]], candidate: Sequence[tuple[int, int]]) -> Bets:
        """Expect of the stable version what it has shown, of the candidate at first the same."""
        found = f"{len(stable)} and {len(candidate)}"
        require(len(stable) == len(candidate), "the arms", "as many looks at both", found)
        arms = [list(stable), list(candidate)]
        table = np.array(arms, dtype=np.float64).reshape(2, -1, 2)
        new = np.diff(table, axis=1, prepend=0.0)
        errors, totals = new[..., 0], new[..., 1]
        possible = bool(np.all((errors >= 0) & (errors <= totals)))
        require(
            possible, "the counts", "errors among the requests, and no count that falls", "others"
        )
        before = table - new
        stable_rate = (before[0, :, 0] + FIRST_RATE * WEIGHT) / (before[0, :, 1] + WEIGHT)
        rate = (before[1, :, 0] + stable_rate * WEIGHT) / (before[1, :, 1] + WEIGHT)
        return cls(np.stack([stable_rate, rate]), errors, totals)

    def win(self, rise: float, *, worse: bool) -> Floats:
        """Return the logs of what each look won from who allows a difference of `rise` at most.

        With `worse` False, from who asks for that at least. Nothing is bet where such a difference
        was expected, or where an arm had no request.
        """
        placed = ((self.rates[1] - self.rates[0] > rise) == worse) & self.totals.all(axis=0)
        rates, errors, totals = (of[:, placed] for of in (self.rates, self.errors, self.totals))
        nearest = find_nearest(rates, totals, rise)
        won = np.zeros(len(placed))
        won[placed] = (
            errors * np.log(rates / nearest)
            + (totals - errors) * np.log((1 - rates) / (1 - nearest))
        ).sum(axis=0)
        return won

    def measure(self) -> float:
        """Return the difference of the rates over all looks."""
        totals = self.totals.sum(axis=1)
        if not totals.all():
            return math.nan
        stable, candidate = self.errors.sum(axis=1) / totals
        return float(candidate - stable)


def find_nearest(rates: Floats, totals: Floats, rise: float) -> Floats:
    """Return the likeliest rates that differ by `rise`, for counts of `rates` times `totals`.

    The root of a cubic (Miettinen, Nurminen: "Comparative analysis of two rates", Statistics in
    Medicine 1985), and a step of Newton's for the digits that its cosine loses.
    """
    (few, more), errors = totals, rates * totals
    cubic = few + more
    square = (more + 2 * few) * rise - cubic - errors.sum(axis=0)
    linear = (few * rise - cubic - 2 * errors[0]) * rise + errors.sum(axis=0)
    constant = errors[0] * rise * (1 - rise)
    middle = square / (3 * cubic)
    bend = middle**3 - square * linear / (6 * cubic**2) + constant / (2 * cubic)
    width = np.copysign(np.sqrt(np.maximum(middle**2 - linear / (3 * cubic), 0)), bend)
    angle = (np.pi + np.arccos(np.clip(bend / width**3, -1, 1))) / 3
    rate = np.clip(2 * width * np.cos(angle) - middle, max(0, -rise), min(1, 1 - rise))
    rate -= (((cubic * rate + square) * rate + linear) * rate + constant) / (
        (3 * cubic * rate + 2 * square) * rate + linear
    )
    nearest: Floats = np.clip(np.stack([rate, rate + rise]), SMALLEST, 1 - SMALLEST)
    return nearest


@dataclass(frozen=True)
class Ranks:
    """Every place that the true quantile may have among an arm's values."""

    values: Floats
    """Sorted, between 0 and infinity: rank k lies between items k and k + 1."""
    weights: Floats
    """The log of what was won from who gives the true quantile rank k."""
    estimate: float

    @classmethod
    def make(cls, values: Sequence[float] | Floats, quantile: float) -> Ranks:
        """Sort one arm's values and weigh each rank."""
        require(0 < quantile < 1, "the quantile", "above 0 and below 1", quantile)
        ordered = np.sort(np.asarray(values, dtype=np.float64))
        total = len(ordered)
        possible = total == 0 or (ordered[0] >= 0 and math.isfinite(ordered[-1]))
        require(possible, "the latencies", "seconds, none below 0", "others")
        below = np.arange(total + 1)
        weights = predict_counts(total, quantile)
        weights -= below * math.log(quantile) + (total - below) * math.log(1 - quantile)
        estimate = float(ordered[math.ceil(total * quantile) - 1]) if total else math.nan
        return cls(np.concatenate([[0.0], ordered, [math.inf]]), weights, estimate)

    def bound(self, needed: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the first and the last rank that weighs less than is needed."""
        rising = -np.minimum.accumulate(self.weights)
        falling = -np.minimum.accumulate(self.weights[::-1])
        first = np.searchsorted(rising, -needed, side="right")
        return first, len(self.weights) - 1 - np.searchsorted(falling, -needed, side="right")


def predict_counts(total: int, share: float) -> Floats:
    """Return the log of the chance of each series with 0 to `total` successes.

    Beta priors around the share are mixed, so that neither a large nor a small departure is
    late to be seen.
    """
    each = [
        rise_factorial(weight * share, total)
        + rise_factorial(weight * (1 - share), total)[::-1]
        - rise_factorial(weight, total)[-1]
        for weight in PRIORS
    ]
    return np.asarray(np.logaddexp.reduce(each) - math.log(len(each)), dtype=np.float64)


def rise_factorial(start: float, steps: int) -> Floats:
    """Return the logs of start (start + 1) .. (start + k - 1), for k from 0 to `steps`."""
    return np.concatenate([[0.0], np.cumsum(np.log(start + np.arange(steps)))])


def require(holds: bool, what: str, expected: str, found: object) -> None:
    """Refuse an argument that cannot be meant."""
    if not holds:
        raise UsageError(f"{what} cannot be meant", expected=expected, found=str(found))
