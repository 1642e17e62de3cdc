from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats  # type: ignore[import-untyped]

from marwright.errors import UsageError
from marwright.release.evidence import Bets, find_nearest
from marwright.release.statistics import (
    Comparison,
    Counts,
    compare_correct,
    compare_errors,
    compare_latency,
    estimate_quantile,
    judge_agreement,
)

ALPHA = 0.05


def look_often(errors: np.ndarray, step: int) -> list[Counts]:
    """Return the counts after each look, given the new errors among `step` new requests each."""
    return [Counts(int(e), step * (i + 1)) for i, e in enumerate(np.cumsum(errors))]


def draw_looks(seed: int, rate: float, *, step: int = 10, looks: int = 200) -> list[Counts]:
    return look_often(np.random.default_rng(seed).binomial(step, rate, looks), step)


def draw_seconds(seed: int, count: int, *, shape: str = "lognormal") -> np.ndarray:
    random = np.random.default_rng(seed)
    seconds = 0.02 * random.lognormal(0, 0.3, count)
    if shape == "bimodal":
        seconds = np.round(np.where(random.random(count) < 0.06, 20, 1) * seconds, 3)
    if shape == "pareto":
        seconds = 0.02 * (1 + random.pareto(1.1, count))
    return seconds


def bound_false_alarms(runs: int, rate: float) -> int:
    """Return a number of alarms that a test of this rate exceeds once in a thousand times."""
    return int(stats.binom.isf(1e-3, runs, rate))


counts = st.tuples(st.integers(0, 60), st.integers(1, 60)).map(lambda c: (min(c), max(c)))
seconds = st.lists(st.integers(1, 40).map(lambda ms: ms / 1000), min_size=0, max_size=60)


# Errors


@pytest.mark.parametrize("rise", [0.0, 0.005, 0.2, -0.03])
def test_the_nearest_rates_are_the_likeliest_that_differ_so(rise: float) -> None:
    random = np.random.default_rng(0)
    rates, totals = random.beta(0.5, 3, (2, 40)), random.integers(1, 5000, (2, 40)).astype(float)
    nearest = find_nearest(rates, totals, rise)
    assert nearest[1] - nearest[0] == pytest.approx(rise)
    for column in range(40):

        def lose(rate: float, column: int = column) -> float:
            allowed = np.array([rate, rate + rise])
            terms = special.rel_entr(rates[:, column], allowed)
            terms = terms + special.rel_entr(1 - rates[:, column], 1 - allowed)
            return float((totals[:, column] * terms).sum())

        ends = (max(0.0, -rise) + 1e-12, min(1.0, 1 - rise) - 1e-12)
        best = optimize.minimize_scalar(
            lose, bounds=ends, method="bounded", options={"xatol": 1e-12}
        )
        assert lose(float(nearest[0, column])) <= best.fun + 1e-7


def test_the_nearest_equal_rate_is_the_pooled_one_however_small() -> None:
    random = np.random.default_rng(0)
    rates = 10.0 ** random.uniform(-6, -0.1, (2, 500))
    totals = random.integers(1, 100_000, (2, 500)).astype(float)
    pooled = (rates * totals).sum(axis=0) / totals.sum(axis=0)
    assert find_nearest(rates, totals, 0.0)[0] == pytest.approx(pooled, rel=1e-8)


@pytest.mark.parametrize("rise", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("expected", [(0.02, 0.2), (0.3, 0.45), (0.001, 0.9)])
def test_no_allowed_rates_make_a_bet_worth_more_than_one(
    rise: float, expected: tuple[float, float]
) -> None:
    few, more = 7, 4
    table = np.array([*itertools.product(range(few + 1), range(more + 1))]).T.astype(float)
    looks = table.shape[1]
    rates = np.repeat(np.array(expected)[:, None], looks, axis=1)
    totals = np.repeat(np.array([[few], [more]], dtype=float), looks, axis=1)
    worth = np.exp(Bets(rates, table, totals).win(rise, worse=True))
    for stable, below in itertools.product(np.linspace(0.01, 0.85, 15), np.linspace(0, 0.8, 9)):
        candidate = max(stable + rise - below, 0.0)
        chances = stats.binom.pmf(table[0], few, stable) * stats.binom.pmf(
            table[1], more, candidate
        )
        assert chances.sum() == pytest.approx(1)
        assert (chances * worth).sum() <= 1 + 1e-9


def test_a_bet_is_worth_the_ratio_of_two_exact_binomial_likelihoods() -> None:
    bets = Bets.place([(1, 40), (2, 90)], [(6, 30), (17, 80)])
    nearest = find_nearest(bets.rates[:, 1:], bets.totals[:, 1:], 0.01)[:, 0]
    ratio = math.prod(
        stats.binom.pmf(errors, 50, rate) / stats.binom.pmf(errors, 50, allowed)
        for errors, rate, allowed in zip((1, 11), bets.rates[:, 1], nearest, strict=True)
    )
    found = compare_errors(
        [Counts(1, 40), Counts(2, 90)], [Counts(6, 30), Counts(17, 80)], margin=0.01, alpha=ALPHA
    )
    assert found.e_value == pytest.approx(ratio)


def test_the_first_look_at_errors_never_finds_them_worse() -> None:
    found = compare_errors([Counts(0, 9000)], [Counts(9000, 9000)], alpha=ALPHA)
    assert (found.verdict, found.e_value) == ("unclear", 1)
    assert found.interval.estimate == found.interval.high == 1


@pytest.mark.parametrize("step", [1, 10, 100])
def test_a_stable_version_without_errors_is_no_obstacle(step: int) -> None:
    stable = [Counts(0, step * 3 * (look + 1)) for look in range(50)]
    bad = [Counts(step * (look + 1), step * (look + 1)) for look in range(50)]
    assert compare_errors(stable, bad, alpha=ALPHA).verdict == "worse"
    assert compare_errors(stable, stable, margin=0.1, alpha=ALPHA).verdict == "fine"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=8))
def test_swapping_the_arms_turns_the_difference_around(
    looks: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    stable, candidate = (np.cumsum([look[arm] for look in looks], axis=0) for arm in (0, 1))
    left = Bets.place(stable.tolist(), candidate.tolist())
    right = Bets(left.rates[::-1], left.errors[::-1], left.totals[::-1])
    for rise in (-0.2, 0.0, 0.07):
        won = left.win(rise, worse=True)
        assert won == pytest.approx(right.win(-rise, worse=False), abs=1e-6)
        assert np.isfinite(won).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(counts, min_size=2, max_size=8), st.integers(1, 40))
def test_more_errors_at_the_last_look_are_more_evidence(
    looks: list[tuple[int, int]], more: int
) -> None:
    table = np.cumsum(looks, axis=0)
    stable = [Counts(0, int(total)) for _, total in table]
    candidate = [Counts(int(errors), int(total)) for errors, total in table]
    room = looks[-1][1] - looks[-1][0]
    further = [*candidate[:-1], Counts(candidate[-1].errors + min(more, room), candidate[-1].total)]
    few, many = (compare_errors(stable, arm, alpha=ALPHA) for arm in (candidate, further))
    assert many.e_value >= few.e_value * (1 - 1e-9)
    assert many.interval.estimate >= few.interval.estimate


def test_a_look_without_requests_changes_nothing() -> None:
    stable, candidate = draw_looks(1, 0.01), draw_looks(2, 0.1)
    waited = compare_errors(
        [*stable, stable[-1]], [*candidate, candidate[-1]], margin=0.01, alpha=ALPHA
    )
    assert waited == compare_errors(stable, candidate, margin=0.01, alpha=ALPHA)


def test_equal_error_rates_are_seldom_stopped_however_often_one_looks() -> None:
    runs = 300
    alarms = sum(
        bool(
            np.any(
                np.cumsum(
                    Bets.place(
                        draw_looks(2 * seed, 0.05), draw_looks(2 * seed + 1, 0.05, step=5)
                    ).win(0.0, worse=True)
                )
                >= math.log(1 / ALPHA)
            )
        )
        for seed in range(runs)
    )
    assert alarms <= bound_false_alarms(runs, ALPHA)


def test_bounds_of_the_difference_hold_at_the_end_of_most_runs() -> None:
    runs, rise = 150, 0.06
    found = [
        compare_errors(
            draw_looks(2 * seed, 0.04, looks=60), draw_looks(2 * seed + 1, 0.1, looks=60), alpha=0.1
        ).interval
        for seed in range(runs)
    ]
    assert sum(interval.low > rise for interval in found) <= bound_false_alarms(runs, 0.1)
    assert sum(interval.high < rise for interval in found) <= bound_false_alarms(runs, 0.1)
    assert all(interval.low < interval.estimate < interval.high for interval in found)


def test_two_points_more_errors_are_found_and_none_more_are_shown_to_be_fine() -> None:
    stable = draw_looks(1, 0.01, step=20, looks=300)
    worse = compare_errors(stable, draw_looks(2, 0.03, looks=300), margin=0.005, alpha=0.01)
    fine = compare_errors(stable, draw_looks(3, 0.01, looks=300), margin=0.02, alpha=0.01)
    assert (worse.verdict, fine.verdict) == ("worse", "fine")
    assert worse.interval.low > 0.005
    assert worse.e_value >= 100
    assert fine.interval.high < 0.02


# Latency


@pytest.mark.parametrize("quantile", [0.5, 0.95])
@pytest.mark.parametrize("total", [0, 1, 30, 400])
def test_bounds_of_a_quantile_are_the_ranks_a_mixed_beta_binomial_leaves(
    quantile: float, total: int
) -> None:
    ranks = np.arange(total + 1)
    priors = [
        stats.betabinom.logpmf(ranks, total, weight * quantile, weight * (1 - quantile))
        for weight in (20, 200)
    ]
    evidence = np.logaddexp(*priors) - math.log(2) - stats.binom.logpmf(ranks, total, quantile)
    left = np.flatnonzero(evidence < math.log(1 / ALPHA))
    values = np.concatenate([[0.0], np.sort(draw_seconds(3, total)), [math.inf]])
    found = estimate_quantile(values[1:-1], quantile, alpha=ALPHA)
    assert (found.low, found.high) == (values[left[0]], values[left[-1] + 1])
    if total:
        assert found.estimate == np.quantile(values[1:-1], quantile, method="inverted_cdf")


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_bounds_of_a_quantile_enclose_those_for_a_single_look(quantile: float) -> None:
    values = draw_seconds(5, 2000)
    found = estimate_quantile(values, quantile, alpha=ALPHA)
    once = stats.quantile_test(values, q=np.quantile(values, quantile), p=quantile)
    interval = once.confidence_interval(1 - ALPHA)
    assert found.low <= interval.low < found.estimate < interval.high <= found.high
    # The price of looking at any time: not more than some twice the width.
    assert found.high - found.low < 2.5 * (interval.high - interval.low)


@settings(max_examples=80, deadline=None)
@given(seconds, seconds, st.randoms(use_true_random=False), st.sampled_from([0.5, 0.8]))
def test_the_order_of_requests_and_the_unit_of_time_do_not_matter(
    stable: list[float], candidate: list[float], random: object, quantile: float
) -> None:
    first = compare_latency(stable, candidate, quantile=quantile, alpha=0.3)
    random.shuffle(mixed := [4 * value for value in stable])  # type: ignore[attr-defined]
    doubled = [4 * value for value in reversed(candidate)]
    again = compare_latency(mixed, doubled, quantile=quantile, alpha=0.3)
    assert (again.verdict, again.e_value) == (first.verdict, first.e_value)
    assert again.interval.low == pytest.approx(first.interval.low)
    assert again.interval.high == pytest.approx(first.interval.high)


@settings(max_examples=80, deadline=None)
@given(seconds, seconds, st.floats(1, 5))
def test_a_slower_candidate_is_more_evidence(
    stable: list[float], candidate: list[float], slower: float
) -> None:
    found = compare_latency(stable, candidate, quantile=0.5, alpha=0.2)
    further = compare_latency(stable, [slower * s for s in candidate], quantile=0.5, alpha=0.2)
    assert further.e_value >= found.e_value * (1 - 1e-9)
    assert further.interval.low >= found.interval.low
    assert further.interval.high >= found.interval.high


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.95])
@pytest.mark.parametrize("shape", ["lognormal", "bimodal"])
@pytest.mark.parametrize("slower", [0.4, 1.0, 3.0])
def test_the_verdict_and_the_evidence_change_where_the_interval_ends(
    quantile: float, shape: str, slower: float
) -> None:
    stable, candidate = draw_seconds(1, 900, shape=shape), draw_seconds(2, 500, shape=shape)

    def compare(ratio: float) -> Comparison:
        return compare_latency(
            stable, slower * candidate, quantile=quantile, ratio=ratio, alpha=ALPHA
        )

    low, high = compare(1.0).interval.low, compare(1.0).interval.high
    assert 0 < low < slower < high < math.inf
    found = [compare(end * by) for end in (low, high) for by in (1 - 1e-9, 1 + 1e-9)]
    assert [each.verdict for each in found] == ["worse", "unclear", "unclear", "fine"]
    assert [each.e_value >= 1 / ALPHA for each in found] == [True, False, False, False]


@settings(max_examples=60, deadline=None)
@given(seconds, seconds)
def test_swapping_the_arms_turns_the_ratio_around(
    stable: list[float], candidate: list[float]
) -> None:
    assume(stable and candidate)
    left = compare_latency(stable, candidate, quantile=0.5, ratio=1, alpha=0.2).interval
    right = compare_latency(candidate, stable, quantile=0.5, ratio=1, alpha=0.2).interval
    assert left.low == pytest.approx(1 / right.high if right.high else math.inf)
    assert left.estimate == pytest.approx(1 / right.estimate)


@pytest.mark.parametrize("shape", ["lognormal", "bimodal", "pareto"])
@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_equal_latencies_are_seldom_stopped_without_any_tolerance(
    shape: str, quantile: float
) -> None:
    runs = 100
    alarms = 0
    for seed in range(runs):
        stable = draw_seconds(2 * seed, 600, shape=shape)
        candidate = draw_seconds(2 * seed + 1, 300, shape=shape)
        looks = (
            compare_latency(
                stable[: 2 * n], candidate[:n], quantile=quantile, ratio=1, alpha=ALPHA
            ).verdict
            for n in range(10, 301, 10)
        )
        alarms += "worse" in looks
    assert alarms <= bound_false_alarms(runs, ALPHA)


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_a_version_30_percent_slower_is_found_and_an_equal_one_is_fine(quantile: float) -> None:
    stable, candidate, equal = (draw_seconds(seed, 4000) for seed in (1, 2, 3))
    slower = compare_latency(stable, 1.3 * candidate, quantile=quantile, alpha=0.01)
    fine = compare_latency(stable, equal, quantile=quantile, alpha=0.01)
    assert (slower.verdict, fine.verdict) == ("worse", "fine")
    assert slower.interval.low < 1.3 < slower.interval.high
    assert fine.interval.low < 1 < fine.interval.high


def test_ten_times_slower_is_found_within_a_few_dozen_requests() -> None:
    stable, candidate = draw_seconds(1, 400), 10 * draw_seconds(2, 40)
    assert compare_latency(stable, candidate[:15], alpha=0.01).verdict == "worse"
    equal_share = compare_latency(stable[:40], candidate, quantile=0.5, alpha=0.01)
    assert equal_share.verdict == "worse"


def test_latencies_that_are_all_zero_decide_nothing() -> None:
    found = compare_latency([0.0] * 500, [0.0] * 500, alpha=ALPHA)
    assert found.verdict == "unclear"
    assert (found.interval.low, found.interval.high) == (0, math.inf)


# Agreement


@given(st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_evidence_against_a_share_is_a_mixed_beta_binomial_over_an_exact_binomial(
    agreed: int, other: int
) -> None:
    total, least = agreed + other, 0.9
    assume(total and agreed / total <= least)
    mixed = np.mean(
        [
            stats.betabinom.pmf(agreed, total, weight * least, weight * (1 - least))
            for weight in (20, 200)
        ]
    )
    exact = stats.binom.pmf(agreed, total, least)
    assume(exact > 1e-280)
    found = judge_agreement(agreed, total, least=least, alpha=ALPHA)
    assert found.e_value == pytest.approx(mixed / exact, rel=1e-6)


@given(st.integers(1, 400), st.data())
@settings(deadline=None, max_examples=60)
def test_bounds_of_a_share_enclose_the_exact_ones_and_agree_with_the_verdict(
    total: int, data: st.DataObject
) -> None:
    agreed = data.draw(st.integers(0, total))
    found = judge_agreement(agreed, total, least=0.8, alpha=ALPHA)
    exact = stats.binomtest(agreed, total).proportion_ci(1 - 2 * ALPHA)  # ALPHA at each end
    assert found.interval.low <= exact.low + 1e-5
    assert found.interval.high >= exact.high - 1e-5
    assert (found.verdict == "worse") == (found.e_value >= 1 / ALPHA)
    if found.verdict != "unclear":
        assert (found.interval.high < 0.8) == (found.verdict == "worse")
        assert (found.interval.low > 0.8) == (found.verdict == "fine")


@given(st.integers(0, 80), st.integers(0, 80))
@settings(deadline=None)
def test_who_is_right_more_often_is_symmetric_and_stricter_than_mcnemar(
    stable: int, candidate: int
) -> None:
    found = compare_correct(stable, candidate, alpha=ALPHA)
    turned = compare_correct(candidate, stable, alpha=ALPHA)
    opposite = {"worse": "fine", "fine": "worse", "unclear": "unclear"}
    assert turned.verdict == opposite[found.verdict]
    assert turned.interval.low == pytest.approx(1 - found.interval.high, abs=1e-5)
    if found.verdict == "worse":
        assert stats.binomtest(candidate, stable + candidate, alternative="less").pvalue <= ALPHA
    if stable >= candidate:  # else one more makes them more alike, which is evidence too
        further = compare_correct(stable + 1, candidate, alpha=ALPHA)
        assert further.e_value >= found.e_value * (1 - 1e-9)


def judge_at_every_input(same: np.ndarray, least: float) -> bool:
    agreed = np.cumsum(same)
    return any(
        judge_agreement(int(agreed[n - 1]), n, least=least, alpha=ALPHA).verdict == "worse"
        for n in range(5, len(same) + 1, 5)
    )


@pytest.mark.parametrize("least", [0.5, 0.95])
def test_enough_agreement_is_seldom_judged_worse_however_often_one_looks(least: float) -> None:
    runs = 300
    random = np.random.default_rng(8)
    alarms = sum(judge_at_every_input(random.random(200) < least, least) for _ in range(runs))
    assert alarms <= bound_false_alarms(runs, ALPHA)


def test_too_little_agreement_is_found_and_enough_is_fine() -> None:
    assert judge_agreement(900, 1000, least=0.95, alpha=0.01).verdict == "worse"
    assert judge_agreement(990, 1000, least=0.95, alpha=0.01).verdict == "fine"
    assert compare_correct(40, 10, alpha=0.01).verdict == "worse"
    assert compare_correct(250, 250, least=0.4, alpha=0.01).verdict == "fine"


# What all have in common


@pytest.mark.parametrize(
    "compare",
    [
        lambda: compare_errors([], [], alpha=ALPHA),
        lambda: compare_errors([Counts(0, 0)], [Counts(0, 0)], alpha=ALPHA),
        lambda: compare_latency([], [], alpha=ALPHA),
        lambda: judge_agreement(0, 0, least=0.95, alpha=ALPHA),
        lambda: compare_correct(0, 0, alpha=ALPHA),
    ],
)
def test_nothing_seen_is_unclear_and_no_evidence(compare: Callable[[], Comparison]) -> None:
    found = compare()
    assert (found.verdict, found.e_value) == ("unclear", pytest.approx(1))
    assert math.isnan(found.interval.estimate)


@pytest.mark.parametrize(
    ("compare", "says"),
    [
        (lambda: compare_errors([Counts(2, 1)], [Counts(0, 1)], alpha=ALPHA), "counts"),
        (lambda: compare_errors([Counts(-1, 1)], [Counts(0, 1)], alpha=ALPHA), "counts"),
        (
            lambda: compare_errors([Counts(1, 9), Counts(0, 9)], [Counts(0, 1)] * 2, alpha=ALPHA),
            "counts",
        ),
        (lambda: compare_errors([Counts(0, 1)], [], alpha=ALPHA), "1 and 0"),
        (lambda: compare_errors([], [], margin=-0.1, alpha=ALPHA), "margin"),
        (lambda: compare_errors([], [], alpha=0.0), "alpha"),
        (lambda: compare_latency([-1.0], [1.0], alpha=ALPHA), "seconds"),
        (lambda: compare_latency([math.nan], [1.0], alpha=ALPHA), "seconds"),
        (lambda: compare_latency([], [], ratio=0, alpha=ALPHA), "ratio"),
        (lambda: estimate_quantile([], 1.0, alpha=ALPHA), "quantile"),
        (lambda: judge_agreement(3, 2, least=0.9, alpha=ALPHA), "0 to 2"),
        (lambda: judge_agreement(1, 2, least=1.0, alpha=ALPHA), "share"),
        (lambda: compare_correct(-1, 2, alpha=ALPHA), "below 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(compare: Callable[[], object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        compare()
