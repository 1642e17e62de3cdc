from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from marwright.errors import UsageError
from marwright.monitor import shifts

RATE = 0.05
RUNS = 1000


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def most_rejections(rate: float, runs: int) -> int:
    """Return how many rejections a test of that rate stays below in all but one in 10,000 runs."""
    return int(stats.binom.ppf(0.9999, runs, rate))


def test_ks_is_that_of_scipy() -> None:
    random = draw()
    for sizes in ((60, 200), (2000, 500)):
        first, second = (random.normal(size=size) for size in sizes)
        found = shifts.test_ks(first, second)
        expected = stats.ks_2samp(first, second)
        assert found.score == pytest.approx(expected.statistic)
        assert found.p == pytest.approx(expected.pvalue, rel=0.05)


def test_chi_square_is_that_of_scipy_where_no_class_is_rare() -> None:
    random = draw()
    first, second = random.choice(list("abc"), 300), random.choice(list("abcd"), 200)
    counts = [[(part == one).sum() for one in "abcd"] for part in (first, second)]
    expected = stats.chi2_contingency(counts, correction=False)
    found = shifts.test_chi_square(first, second)
    assert found.score == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)


def test_a_class_that_was_never_seen_is_a_shift() -> None:
    known = ["a", "b"] * 100
    assert shifts.test_chi_square(known, ["a", "b"] * 80 + ["c"] * 40).p < 1e-6
    assert shifts.test_chi_square(known, ["c"] * 100).p < 1e-6


def test_rare_classes_are_pooled_so_that_a_million_names_make_no_shift() -> None:
    names = [f"name {number}" for number in range(2000)]
    found = shifts.test_chi_square(names[:1000], names[1000:])
    assert found == (0.0, 1.0)


def test_psi_is_its_formula() -> None:
    first, second = draw(1).normal(size=1000), draw(2).normal(0.5, size=1000)
    edges = np.quantile(first, np.arange(1, 10) / 10, method="inverted_cdf")
    shares = [
        (np.bincount(np.searchsorted(edges, part), minlength=10) + 0.5) / (len(part) + 5)
        for part in (first, second)
    ]
    expected = sum((b - a) * math.log(b / a) for a, b in zip(*shares, strict=True))
    found = shifts.compute_psi(first, second)
    assert found.score == pytest.approx(expected)
    assert found.p == pytest.approx(stats.chi2.sf(expected / 0.002, 9))


def test_a_bin_that_is_empty_on_one_side_has_a_finite_score() -> None:
    found = shifts.compute_psi(np.arange(500.0), np.arange(500.0) + 1000)
    assert 1 < found.score < 100
    assert found.p < 1e-10


def test_a_value_that_many_rows_share_is_a_bin_of_its_own() -> None:
    random = draw()
    known = np.where(random.random(1000) < 0.95, 1.0, random.random(1000))
    live = np.where(random.random(500) < 0.7, 1.0, random.random(500))
    assert shifts.compute_psi(known, live).p < 1e-10
    assert shifts.compute_psi(known, known[::2]).p > 0.05


@pytest.mark.parametrize("place", [-9.0, 9.0])
def test_a_few_values_that_the_reference_never_reached_are_a_shift(place: float) -> None:
    known, live = draw(1).normal(size=600), draw(2).normal(size=250)
    live[:20] = place
    assert shifts.compute_psi(known, live).p < 1e-8
    assert shifts.test_ks(known, live).p > 1e-4  # which looks at the middle


TESTS = {"psi": shifts.compute_psi, "ks": shifts.test_ks}


@pytest.mark.parametrize("name", TESTS)
def test_constant_columns_are_alike_or_all_different(name: str) -> None:
    run = TESTS[name]
    assert run(np.full(100, 3.0), np.full(80, 3.0)) == (0.0, 1.0)
    for other in (2.0, 4.0):
        found = run(np.full(100, 3.0), np.full(80, other))
        assert found.score > 0.9
        assert found.p < 1e-10


@pytest.mark.parametrize("name", TESTS)
def test_what_is_not_finite_is_left_out(name: str) -> None:
    run, values = TESTS[name], draw().normal(size=200)
    dirty = np.concatenate([values, [math.nan, math.inf, -math.inf]])
    assert run(dirty, dirty) == run(values, values)
    for empty in ([], [math.nan] * 9):
        for found in (run(values, empty), run(empty, values)):
            assert math.isnan(found.score)
            assert found.p == 1


def test_nothing_is_said_of_no_classes_and_of_single_points() -> None:
    for found in (
        shifts.test_chi_square([], ["a"]),
        shifts.test_chi_square(["a"], []),
        shifts.test_mmd(np.zeros((9, 2)), np.zeros((1, 2)), permutations=9, seed=0),
        shifts.test_mmd(np.full((9, 2), math.nan), np.zeros((9, 2)), permutations=9, seed=0),
    ):
        assert math.isnan(found.score)
        assert found.p == 1


def test_equal_points_are_no_shift() -> None:
    points = np.ones((40, 3))
    assert shifts.test_mmd(points, points, permutations=200, seed=0).p > 0.05
    assert shifts.test_mmd(points, points + 1, permutations=200, seed=0).p < 0.01


def compute_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased estimate by its definition, pair by pair."""
    both = np.concatenate([first, second])
    apart = [float(((a - b) ** 2).sum()) for i, a in enumerate(both) for b in both[:i]]
    width = float(np.median(apart))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * width))

    def mean(part: np.ndarray) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in first for b in second]
    return mean(first) + mean(second) - 2 * sum(across) / len(across)


def test_mmd_is_its_definition() -> None:
    first, second = draw(1).normal(size=(12, 4)), draw(2).normal(0.5, 1, (9, 4))
    found = shifts.test_mmd(first, second, permutations=200, seed=0)
    assert found.score == pytest.approx(compute_mmd(first, second), abs=1e-5)


def test_mmd_sees_what_no_single_column_shows() -> None:
    """Two columns, each as before; only that they go together is new."""
    random = draw()
    first = random.normal(size=(400, 2))
    second = random.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 400)
    assert shifts.test_mmd(first, second, permutations=2000, seed=0).p < 0.001
    assert min(shifts.test_ks(first[:, i], second[:, i]).p for i in range(2)) > 0.01


def test_mmd_is_repeatable_and_its_p_value_never_zero() -> None:
    first, second = np.zeros((60, 5)) + draw().normal(size=(60, 5)), np.ones((700, 5)) * 9
    found = [shifts.test_mmd(first, second, permutations=300, seed=7) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].p == 1 / 301


def test_a_wide_embedding_is_measured_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = draw(1).normal(size=(50, 40)), draw(2).normal(size=(50, 40))
    whole = shifts.test_mmd(first, second, permutations=100, seed=0)
    monkeypatch.setattr(shifts, "COLUMNS", 7)
    pieces = shifts.test_mmd(first, second, permutations=100, seed=0)
    assert pieces.score == pytest.approx(whole.score, abs=1e-6)


def draw_normal(random: np.random.Generator, size: int) -> Any:
    return random.normal(size=size)


def draw_tied(random: np.random.Generator, size: int) -> Any:
    return random.poisson(1.0, size)


def draw_mixed(random: np.random.Generator, size: int) -> Any:
    return np.where(random.random(size) < 0.6, 0, random.exponential(size=size))


@pytest.mark.parametrize("values", [draw_normal, draw_tied, draw_mixed])
@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("sizes", [(2000, 500), (360, 250), (200, 50)])
def test_no_shift_is_called_one_no_more_often_than_stated(
    values: Callable[..., Any], name: str, sizes: tuple[int, int]
) -> None:
    random, run = draw(3), TESTS[name]
    found = [run(*(values(random, size) for size in sizes)).p for _ in range(RUNS)]
    for rate in (0.2, RATE, 0.01):
        # The chi-square approximation may be off by a quarter.
        assert sum(p <= rate for p in found) <= most_rejections(1.25 * rate, RUNS), rate


def test_p_values_of_continuous_data_are_uniform() -> None:
    random = draw(4)
    pairs = [(random.normal(size=400), random.normal(size=300)) for _ in range(RUNS)]
    for run in TESTS.values():
        found = [run(*pair).p for pair in pairs]
        assert stats.kstest(found, "uniform").statistic < 0.07


@pytest.mark.parametrize("weights", [[1] * 10, [1 / (k + 1) ** 2 for k in range(40)]])
def test_classes_without_a_shift_are_called_one_no_more_often_than_stated(
    weights: list[float],
) -> None:
    random, shares = draw(5), np.array(weights) / sum(weights)
    labels = np.array([str(number) for number in range(len(weights))])
    found = [
        shifts.test_chi_square(*(random.choice(labels, size, p=shares) for size in (400, 100))).p
        for _ in range(RUNS)
    ]
    for rate in (0.2, RATE, 0.01):
        assert sum(p <= rate for p in found) <= most_rejections(1.25 * rate, RUNS), rate


def test_points_without_a_shift_are_called_one_no_more_often_than_stated() -> None:
    random = draw(6)
    found = [
        shifts.test_mmd(
            random.normal(size=(50, 3)), random.normal(size=(40, 3)), permutations=200, seed=seed
        ).p
        for seed in range(RUNS)
    ]
    for rate in (0.2, RATE, 0.01):
        assert sum(p <= rate for p in found) <= most_rejections(rate, RUNS), rate
    assert 0.15 < np.mean(np.array(found) <= 0.2) < 0.25


def test_holm_is_its_definition() -> None:
    assert shifts.correct([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert shifts.correct([0.6, 0.9]) == [1, 1]
    assert shifts.correct([]) == []


def test_benjamini_and_hochberg_is_that_of_scipy() -> None:
    values = draw().random(30) ** 3
    expected = stats.false_discovery_control(values)
    assert shifts.correct(values, "bh") == pytest.approx(expected.tolist())
    assert shifts.correct([], "bh") == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_equal_weights_are_none_and_the_order_of_p_values_stays(values: list[float]) -> None:
    plain = shifts.correct(values)
    assert shifts.correct(values, weights=[3.0] * len(values)) == pytest.approx(plain)
    assert all(p >= value for p, value in zip(plain, values, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.array(plain)[order]) >= 0)


def test_a_comparison_with_a_larger_weight_is_corrected_less() -> None:
    found = shifts.correct([0.01, 0.02], weights=[1, 3])
    # 0.02 / 3 comes first: it has three quarters of the rate, and what is left has all of it.
    assert found == pytest.approx([0.02 / 3 * 4, 0.02 / 3 * 4])


def test_weighted_holm_keeps_its_rate_where_some_have_shifted() -> None:
    """Half of the comparisons have shifted; of the others any is called so at most at the rate."""
    random = draw(8)
    weights = [1.0, 0.1, 0.1, 0.5, 1.0, 0.3]
    wrong = 0
    for _ in range(RUNS):
        values = [*(random.random(3) * 1e-4), *random.random(3)]
        wrong += any(p < RATE for p in shifts.correct(values, weights=weights)[3:])
    assert wrong <= most_rejections(RATE, RUNS)
    assert wrong >= RUNS * RATE / 4


@pytest.mark.parametrize(
    "call",
    [
        lambda: shifts.correct([1.5]),
        lambda: shifts.correct([math.nan]),
        lambda: shifts.correct([0.1, 0.2], weights=[1]),
        lambda: shifts.correct([0.1], weights=[0]),
        lambda: shifts.correct([0.1], "bh", weights=[1]),
        lambda: shifts.compute_psi([1], [1], bins=1),
        lambda: shifts.test_mmd([[1]] * 3, [[1, 2]] * 3, permutations=9, seed=0),
        lambda: shifts.test_mmd([[1]] * 3, [[1]] * 3, permutations=0, seed=0),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()
