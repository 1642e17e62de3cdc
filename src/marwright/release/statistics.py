"""Comparing a candidate version with the stable one while traffic goes on, look after look.

Every comparison rests on an e-process: a number that starts at one and is expected to stay at or
below one at every look, for as long as the candidate is not worse. That it ever reaches 1 / alpha
has then a probability of at most alpha (Ville's inequality), however often one looks and whenever
one stops (Ramdas, Grünwald, Vovk, Shafer: "Game-theoretic statistics and safe anytime-valid
inference", Statistical Science 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from marwright.release.evidence import Bets, Floats, Ranks, predict_counts, require

__all__ = [
    "compare_correct",
    "compare_errors",
    "compare_latency",
    "Comparison",
    "Counts",
    "estimate_quantile",
    "Interval",
    "judge_agreement",
    "Verdict",
]

Verdict: TypeAlias = Literal["worse", "fine", "unclear"]

STEPS = 20
"""Of a bisection: to the sixth digit."""


class Counts(NamedTuple):
    """What one arm has answered up to one look, from its start on."""

    errors: int
    total: int


@dataclass(frozen=True)
class Interval:
    """An estimate and its bounds.

    Each bound, taken alone, holds at all looks together with a probability of 1 - alpha. The
    estimate is not a number where nothing was measured.
    """

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What one look tells.

    "worse" says that the candidate is beyond the limit, "fine" that it is within; each is
    wrong with a probability of at most alpha over all looks together.
    """

    verdict: Verdict
    interval: Interval
    limit: float
    """What the interval is compared with: a margin, a ratio or a share."""
    e_value: float
    """The evidence that it is worse; 1 / e_value is a p-value that holds at every look."""


def compare_errors(
    stable: Sequence[Counts], candidate: Sequence[Counts], *, margin: float = 0.0, alpha: float
) -> Comparison:
    """Compare two error rates; the interval is of the candidate's minus the stable one's.

    Both sequences have an item for each look. The rates of the earlier looks say what to bet on
    for the requests since, so the first look never finds a candidate worse, and looks should come
    early. The traffic may be split in any way, and differently from look to look.

    Between two looks the bet is the likelihood of the rates expected over that of the nearest
    rates allowed, for which the expected counts stand in for the real ones. The allowed rates are
    a convex set, so no rates in it make the bet worth more than one (Turner, Ly, Grünwald:
    "Generic E-variables for exact sequential k-sample tests that allow for optional stopping",
    Journal of Statistical Planning and Inference 2024).

    Raises:
        UsageError: counts that cannot be, a margin outside [0, 1), or an alpha outside (0, 1).
    """
    require(0 <= margin < 1, "the margin", "at least 0 and below 1", margin)
    needed = find_needed(alpha)
    bets = Bets.place(stable, candidate)

    def weigh(rise: float, *, worse: bool) -> float:
        return float(bets.win(rise, worse=worse).sum())

    evidence, reverse = weigh(margin, worse=True), weigh(margin, worse=False)
    low = bisect(lambda rise: weigh(rise, worse=True) < needed, 1.0, -1.0)
    high = bisect(lambda rise: weigh(rise, worse=False) < needed, -1.0, 1.0)
    verdict: Verdict = "worse" if evidence >= needed else "fine" if reverse >= needed else "unclear"
    return Comparison(verdict, Interval(bets.measure(), low, high), margin, expose(evidence))


def compare_latency(
    stable: Sequence[float] | Floats,
    candidate: Sequence[float] | Floats,
    *,
    quantile: float = 0.95,
    ratio: float = 1.2,
    alpha: float,
) -> Comparison:
    """Compare a quantile of two latencies; the interval is of the candidate's over the stable's.

    Nothing is assumed of the distributions: of the requests of an arm, each falls below the arm's
    true quantile with the same chance, and how many did is weighed as in `estimate_quantile`. The
    e-value is the lowest product of both arms' over the pairs of quantiles with an allowed ratio.
    A quantile of 0.95 cannot be bounded from above before some 110 requests of an arm, at an alpha
    of 0.05; where the arms are alike in size, the median finds what is much slower sooner.

    Args:
        stable: seconds of each request so far, in any order.
        candidate: likewise.
        quantile: which quantile.
        ratio: how many times the stable one's the candidate's may be.
        alpha: the chance of a wrong verdict.

    Raises:
        UsageError: negative seconds, no positive ratio, or a quantile or alpha outside (0, 1).
    """
    require(ratio > 0, "the ratio", "above 0", ratio)
    needed = find_needed(alpha)
    slow, fast = Ranks.make(candidate, quantile), Ranks.make(stable, quantile)
    reached = np.searchsorted(slow.values[:-1], ratio * fast.values[1:], side="right") - 1
    evidence = float((fast.weights + np.minimum.accumulate(slow.weights)[reached]).min())
    room = needed - fast.weights
    possible = np.flatnonzero(room > slow.weights.min())
    first, last = slow.bound(room[possible])
    low = float(divide(slow.values[first], fast.values[possible + 1], 0.0).min())
    high = float(divide(slow.values[last + 1], fast.values[possible], math.inf).max())
    verdict: Verdict = "worse" if evidence >= needed else "fine" if high < ratio else "unclear"
    estimate = slow.estimate / fast.estimate if fast.estimate else math.nan
    return Comparison(verdict, Interval(estimate, low, high), ratio, expose(evidence))


def estimate_quantile(
    values: Sequence[float] | Floats, quantile: float, *, alpha: float
) -> Interval:
    """Estimate a quantile of seconds; the bounds are values measured, 0 or infinity.

    How many values fall below the true quantile is a count of chances of `quantile` each, whatever
    the distribution (Howard, Ramdas: "Sequential estimation of quantiles with applications to A/B
    testing and best-arm identification", Bernoulli 2022); a mixture of Beta priors weighs it.

    Raises:
        UsageError: negative seconds, or a quantile or alpha outside (0, 1).
    """
    ranks = Ranks.make(values, quantile)
    first, last = ranks.bound(np.array([find_needed(alpha)]))
    return Interval(ranks.estimate, float(ranks.values[first[0]]), float(ranks.values[last[0] + 1]))


def judge_agreement(agreed: int, total: int, *, least: float, alpha: float) -> Comparison:
    """Judge how often both versions gave the same answer to the same input.

    A mixture of Beta priors around `least` bets against it; the interval is where the bet would
    not have won (Waudby-Smith, Ramdas: "Estimating means of bounded random variables by betting",
    JRSS B 2024, for what holds beyond booleans).

    Raises:
        UsageError: counts that cannot be, or a share or alpha outside (0, 1).
    """
    require(0 <= agreed <= total, "the inputs agreed on", f"0 to {total}", agreed)
    require(0 < least < 1, "the share", "above 0 and below 1", least)
    needed = find_needed(alpha)
    found = float(predict_counts(total, least)[agreed])

    def weigh(share: float) -> float:
        return found - log_likelihood(agreed, total, share)

    share = agreed / total if total else least
    low = bisect(lambda share: weigh(share) < needed, share, 0.0) if agreed else 0.0
    high = bisect(lambda share: weigh(share) < needed, share, 1.0) if agreed < total else 1.0
    verdict: Verdict = "unclear"
    if weigh(least) >= needed:
        verdict = "worse" if share < least else "fine"
    interval = Interval(share if total else math.nan, low, high)
    return Comparison(verdict, interval, least, expose(weigh(max(least, share))))


def compare_correct(
    only_stable_right: int, only_candidate_right: int, *, least: float = 0.5, alpha: float
) -> Comparison:
    """Compare how often each version alone was right, on inputs whose label is known.

    McNemar's test, look after look: where just one is right, it is the candidate in a share of the
    inputs, which has to be `least`. Versions that are equally good have the share 0.5, and are
    shown to be fine only where `least` is lower.

    Raises:
        UsageError: counts that cannot be, or a share or alpha outside (0, 1).
    """
    require(
        min(only_stable_right, only_candidate_right) >= 0,
        "the inputs",
        "no count below 0",
        min(only_stable_right, only_candidate_right),
    )
    disputed = only_stable_right + only_candidate_right
    return judge_agreement(only_candidate_right, disputed, least=least, alpha=alpha)


def log_likelihood(successes: int, total: int, share: float) -> float:
    """Return the log of the chance of one series of so many successes."""
    failures = total - successes
    likelihood = successes * math.log(share) if successes else 0.0
    return likelihood + (failures * math.log(1 - share) if failures else 0.0)


def bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return where a claim ends that holds inside and not outside, on the outer side."""
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return outside


def divide(over: Floats, under: Floats, otherwise: float) -> Floats:
    """Return quotients; where the divisor is zero, `otherwise`."""
    quotients: Floats = np.divide(over, under, out=np.full(len(over), otherwise), where=under > 0)
    return quotients


def find_needed(alpha: float) -> float:
    """Return the log of the evidence that a verdict takes."""
    require(0 < alpha < 1, "alpha", "above 0 and below 1", alpha)
    return -math.log(alpha)


def expose(evidence: float) -> float:
    """Return an e-value for its log; not beyond what a float can hold."""
    return math.exp(min(evidence, 700.0))
