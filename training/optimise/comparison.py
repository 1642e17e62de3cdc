"""Two classifiers on the same items: do they differ by more than chance?

The test is McNemar's, in its exact form: of the items on which just one of the two is right, each
is right on half, if they are equally good. The interval is that of Agresti and Min, Wald's with
half an item added to each of the four counts: it keeps its 95 % with few items, where Wald's own
has no width at all once no item tells the two apart. The exact test is the more cautious of the
two: where it says 0.06, the interval may just leave 0 out.

McNemar (1947): Note on the sampling error of the difference between correlated proportions or
percentages. Psychometrika 12, 153-157.
Agresti, Min (2005): Simple improved confidence intervals for comparing matched proportions.
Statistics in Medicine 24, 729-740.
Fagerland, Lydersen, Laake (2013): The McNemar test for binary matched-pairs data: mid-p and
asymptotic are better than exact conditional. BMC Medical Research Methodology 13, 91.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from marwright.errors import UsageError

__all__ = ["compare", "Comparison"]

QUANTILE = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Comparison:
    """How a second classifier, b, does beside a first one, a."""

    n: int
    """Items."""
    only_a: int
    """Items that only the first had right."""
    only_b: int
    """Items that only the second had right."""

    @property
    def difference(self) -> float:
        """The second's accuracy less the first's, in [-1, 1]."""
        return (self.only_b - self.only_a) / self.n

    @property
    def p_value(self) -> float:
        """The exact two-sided McNemar test's."""
        told_apart = self.only_a + self.only_b
        fewer = min(self.only_a, self.only_b)
        tail = sum(math.comb(told_apart, count) for count in range(fewer + 1))
        return float(min(1.0, 2 * tail / 2**told_apart))

    @property
    def interval(self) -> tuple[float, float]:
        """The difference's 95 % confidence interval, cut to [-1, 1]."""
        a, b, n = self.only_a + 0.5, self.only_b + 0.5, self.n + 2
        centre = (b - a) / n
        width = QUANTILE * math.sqrt(a + b - (b - a) ** 2 / n) / n
        return max(-1.0, centre - width), min(1.0, centre + width)

    @property
    def verdict(self) -> str:
        """What the interval says of the second, in words."""
        low, high = self.interval
        if low <= 0 <= high:
            return f"no difference that {self.n} items could show"
        side = "better" if self.difference > 0 else "worse"
        small, large = sorted((abs(low), abs(high)))
        return (
            f"{abs(self.difference) * 100:.1f} points {side}, "
            f"95 % interval {small * 100:.1f} to {large * 100:.1f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts and all that follows from them."""
        return {
            "n": self.n,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "difference": self.difference,
            "p_value": self.p_value,
            "interval": list(self.interval),
            "verdict": self.verdict,
        }


def compare(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> Comparison:
    """Compare which items two classifiers had right, the same items in the same order.

    Raises:
        UsageError: there are no items, or not as many for both.
    """
    if len(correct_a) != len(correct_b) or not correct_a:
        raise UsageError(
            "two classifiers are compared on the same items",
            expected="one or more, as many for both",
            found=f"{len(correct_a)} and {len(correct_b)}",
        )
    pairs = [(bool(a), bool(b)) for a, b in zip(correct_a, correct_b, strict=True)]
    return Comparison(len(pairs), pairs.count((True, False)), pairs.count((False, True)))
