"""Whether two samples come from one distribution: PSI, KS, chi-square, MMD, and their correction.

Every p-value is the chance of a score at least as high where nothing has shifted. Values that are
not finite are left out. A sample that is empty then says nothing: its score is not a number and its
p-value is 1. Rows are taken to be independent of each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]

from marwright.errors import UsageError

__all__ = ["Comparison", "compute_psi", "correct", "test_chi_square", "test_ks", "test_mmd"]

Floats: TypeAlias = npt.NDArray[np.float64]
Method: TypeAlias = Literal["holm", "bh"]

BIN_ROWS = 25
"""Rows of the smaller sample that a bin of the PSI is to have: the chi-square approximation is too
bold far out with fewer."""
FEWEST_EXPECTED = 5.0
"""Rows of the smaller sample to expect in a bin or class; rarer ones are pooled."""
SMOOTHING = 0.5
"""Added to the count of every bin, so that one which is empty on one side has a finite score."""
EXACT_PAIRS = 250_000
"""Product of both sizes up to which the p-value of KS is exact; then the limit serves as well."""
MOST_POINTS = 500
"""Most rows of one sample that the MMD looks at, chosen by the seed: its cost is quadratic."""
EXCEEDED = 20
"""Permutations above the score after which no further ones are needed: there is no shift."""
COLUMNS = 1024
"""Of points, taken at once in double precision."""
BATCH = 500
"""Permutations that one matrix product measures."""


class Comparison(NamedTuple):
    """What one test says of two samples."""

    score: float
    """How far they are apart, in the test's own measure; 0 or little where they are alike."""
    p: float


NOTHING = Comparison(math.nan, 1.0)


def compute_psi(reference: npt.ArrayLike, window: npt.ArrayLike, *, bins: int = 10) -> Comparison:
    """Return the population stability index, and its p-value by the chi-square approximation.

    The bins are quantiles of the reference, and fewer where a sample is small: BIN_ROWS. A value
    that fills a bin by itself has a bin of its own, and so has what the reference never reached,
    below and above. Neighbours that are too rare in both samples
    together are one bin; each count is smoothed by SMOOTHING. Without a shift the index is about
    (1/m + 1/n) times chi-square with one degree of freedom less than bins (Yurdakul: "Statistical
    properties of population stability index", 2018). Two constant samples that agree score 0.

    Raises:
        UsageError: fewer than two bins.
    """
    if bins < 2:
        raise UsageError("a PSI needs bins", expected="2 or more", found=str(bins))
    first, second = _clean(reference), _clean(window)
    if not first.size or not second.size:
        return NOTHING
    edges = _choose_edges(first, max(2, min(bins, first.size // BIN_ROWS, second.size // BIN_ROWS)))
    counts = np.stack([_count_bins(first, edges), _count_bins(second, edges)])
    counts = _join_neighbours(counts)
    number = counts.shape[1]
    if number == 1:
        return Comparison(0.0, 1.0)
    smooth = counts + SMOOTHING
    shares = smooth / smooth.sum(1, keepdims=True)
    score = float(np.sum((shares[1] - shares[0]) * np.log(shares[1] / shares[0])))
    scale = 1 / first.size + 1 / second.size
    return Comparison(score, float(stats.chi2.sf(score / scale, number - 1)))


def test_ks(reference: npt.ArrayLike, window: npt.ArrayLike) -> Comparison:
    """Return the largest distance of both distribution functions, and its p-value.

    Exact for small samples, by the limit for others; with ties both are on the safe side.
    """
    first, second = _clean(reference), _clean(window)
    if not first.size or not second.size:
        return NOTHING
    method = "exact" if first.size * second.size <= EXACT_PAIRS else "asymp"
    found = stats.ks_2samp(first, second, method=method)
    return Comparison(float(found.statistic), float(found.pvalue))


def test_chi_square(reference: Iterable[str], window: Iterable[str]) -> Comparison:
    """Return Pearson's chi-square of two samples of classes, and its p-value.

    A class may be absent from either. Classes of which fewer than FEWEST_EXPECTED are expected in
    the smaller sample are pooled; where one class is left, nothing can have shifted: 0, p 1.
    """
    first, second = Counter(reference), Counter(window)
    if not first or not second:
        return NOTHING
    classes = list(first | second)
    counts = np.array([[sample[name] for name in classes] for sample in (first, second)])
    counts = _pool_rare(counts)
    if counts.shape[1] == 1:
        return Comparison(0.0, 1.0)
    found = stats.chi2_contingency(counts, correction=False)
    return Comparison(float(found.statistic), float(found.pvalue))


def test_mmd(
    reference: npt.ArrayLike, window: npt.ArrayLike, *, permutations: int, seed: int
) -> Comparison:
    """Return the unbiased squared maximum mean discrepancy of two samples of points, and its p.

    The kernel is Gaussian, its width the median distance of all points (Gretton et al.: "A kernel
    two-sample test", JMLR 2012). The p-value is by permutation: exact, and never below
    1 / (permutations + 1). Permuting ends early once EXCEEDED of them scored as high (Besag,
    Clifford: "Sequential Monte Carlo p-values", Biometrika 1991). Of larger samples MOST_POINTS
    rows are looked at. Points with a value that is not finite are left out; of fewer than two
    nothing is said.

    Raises:
        UsageError: points of unlike length, or no permutations.
    """
    if permutations < 1:
        raise UsageError("a permutation test needs permutations", found=str(permutations))
    random = np.random.default_rng(seed)
    first, second = _choose_points(reference, random), _choose_points(window, random)
    if min(len(first), len(second)) < 2:
        return NOTHING
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            "both samples must have points of one length",
            found=f"{first.shape[1]} and {second.shape[1]}",
        )
    kernel = _measure_kernel(np.concatenate([first, second]))
    own = np.zeros((1, len(kernel)), np.float32)
    own[0, : len(first)] = 1
    score = float(_score_splits(kernel, own)[0])
    return Comparison(score, _permute(kernel, own[0], score, permutations, random))


def correct(
    p_values: Sequence[float] | Floats,
    method: Method = "holm",
    *,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """Return p-values corrected for their number, in their order.

    With "holm", rejecting what is below a rate errs at all with at most that chance, whatever the
    tests have to do with each other. `weights` say which comparison gets how much of the rate
    (Holm: "A simple sequentially rejective multiple test procedure", 1979, section 4); equal ones
    where not given. With "bh" (Benjamini, Hochberg, 1995) the rate is the expected share of errors
    among what is rejected.

    Raises:
        UsageError: p-values outside [0, 1], weights that are not above 0 or are too few.
    """
    values = np.asarray(p_values, np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise UsageError("p-values are of [0, 1]", found=str(values.tolist()))
    if method == "bh":
        if weights is not None:
            raise UsageError("Benjamini and Hochberg's correction takes no weights")
        found: list[float] = stats.false_discovery_control(values).tolist() if values.size else []
        return found
    shares = np.ones(values.size) if weights is None else np.asarray(weights, np.float64)
    if shares.shape != values.shape or not np.all(shares > 0):
        raise UsageError("every p-value has a weight above 0", found=str(shares.tolist()))
    order = np.argsort(values / shares, kind="stable")
    left = np.cumsum(shares[order][::-1])[::-1]  # of those that are not rejected yet
    stepped = np.maximum.accumulate(values[order] / shares[order] * left)
    corrected = np.empty(values.size)
    corrected[order] = np.minimum(stepped, 1)
    result: list[float] = corrected.tolist()
    return result


# Values in bins.


def _clean(values: npt.ArrayLike) -> Floats:
    """Return a sample's finite values."""
    found = np.asarray(values, np.float64).ravel()
    return found[np.isfinite(found)]


def _choose_edges(values: Floats, bins: int) -> Floats:
    """Return where bins end; what lies outside of all values has a bin at either end.

    A value that is more than one quantile is fenced on both sides.
    """
    ends = np.quantile(values, np.arange(1, bins) / bins, method="inverted_cdf")
    edges, times = np.unique(ends, return_counts=True)
    fenced = np.append(edges[times > 1], values.min())
    return np.unique(np.concatenate([edges, [values.max()], np.nextafter(fenced, -np.inf)]))


def _count_bins(values: Floats, edges: Floats) -> npt.NDArray[np.int64]:
    """Return how many values there are up to each edge from the one before, and above the last."""
    places = np.searchsorted(edges, values, side="left")
    return np.bincount(places, minlength=len(edges) + 1).astype(np.int64)


def _join_neighbours(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return (2, bins) with rare bins joined to the one after, or before the end."""
    least = _find_least(counts)
    joined: list[npt.NDArray[np.int64]] = []
    open_bin = np.zeros(2, np.int64)
    for column in counts.T:
        open_bin = open_bin + column
        if open_bin.sum() >= least:
            joined.append(open_bin)
            open_bin = np.zeros(2, np.int64)
    if not joined:
        return open_bin[:, None]
    joined[-1] = joined[-1] + open_bin
    return np.stack(joined, axis=1)


def _pool_rare(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return (2, classes) with the rare classes as one; also the next rarest if that is rare."""
    least = _find_least(counts)
    counts = counts[:, np.argsort(counts.sum(0), kind="stable")]
    totals = counts.sum(0)
    rare = int((totals < least).sum())
    if rare and rare < len(totals) and totals[:rare].sum() < least:
        rare += 1
    if rare <= 1:
        return counts
    return np.concatenate([counts[:, :rare].sum(1, keepdims=True), counts[:, rare:]], axis=1)


def _find_least(counts: npt.NDArray[np.int64]) -> float:
    """Return how many of both samples make FEWEST_EXPECTED of the smaller one."""
    sizes = counts.sum(1)
    return FEWEST_EXPECTED * float(sizes.sum()) / float(sizes.min())


# Points and kernels.


def _choose_points(values: npt.ArrayLike, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return at most MOST_POINTS of the finite points, (n, d)."""
    points = np.asarray(values, np.float32)
    points = points.reshape(len(points), -1)
    points = points[np.isfinite(points).all(1)]
    if len(points) > MOST_POINTS:
        points = points[random.choice(len(points), MOST_POINTS, replace=False)]
    return points


def _measure_kernel(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the kernel of each pair, 0 for a point with itself; single precision is enough."""
    products = np.zeros((len(points), len(points)))
    for start in range(0, points.shape[1], COLUMNS):
        part = points[:, start : start + COLUMNS].astype(np.float64)
        part -= part.mean(0)
        products += part @ part.T
    lengths = np.diagonal(products)
    squares = np.maximum(lengths[:, None] + lengths - 2 * products, 0)
    above = squares[np.triu_indices(len(points), 1)]
    width = float(np.median(above)) or float(above.mean()) or 1.0  # half may be the same point
    kernel = np.exp(squares / (-2 * width)).astype(np.float32)
    np.fill_diagonal(kernel, 0)
    return kernel


def _score_splits(
    kernel: npt.NDArray[np.float32], splits: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return the squared discrepancy of each split, a row of ones (first sample) and zeros."""
    size = len(kernel)
    number = float(splits[0].sum())
    rest = size - number
    reach = splits @ kernel
    within = np.einsum("ij,ij->i", reach, splits, dtype=np.float64)
    touching = reach.sum(1, dtype=np.float64)
    everything = float(kernel.sum(dtype=np.float64))
    other = everything - 2 * touching + within
    across = touching - within
    score: npt.NDArray[np.float64] = (
        within / (number * (number - 1))
        + other / (rest * (rest - 1))
        - 2 * across / (number * rest)
    )
    return score


def _permute(
    kernel: npt.NDArray[np.float32],
    own: npt.NDArray[np.float32],
    score: float,
    permutations: int,
    random: np.random.Generator,
) -> float:
    """Return the share of splits at random that score as high as the real one, itself included."""
    # What rounding leaves between equal scores is no difference.
    limit = score - 1e-6 * max(abs(score), float(kernel.mean(dtype=np.float64)) * 1e-2)
    exceeded = done = 0
    while done < permutations:
        number = min(BATCH if done else BATCH // 5, permutations - done)
        splits = random.permuted(np.tile(own, (number, 1)), axis=1)
        reached = exceeded + np.cumsum(_score_splits(kernel, splits) >= limit)
        if reached[-1] >= EXCEEDED:
            return EXCEEDED / (done + 1 + int(np.argmax(reached >= EXCEEDED)))
        exceeded, done = int(reached[-1]), done + number
    return (exceeded + 1) / (permutations + 1)
