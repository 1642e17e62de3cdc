from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]  # has no types

from marwright.errors import UsageError
from marwright.training.optimise.comparison import Comparison, compare

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
counts = st.tuples(*[st.integers(0, 400)] * 3).filter(any)


def make(only_a: int, only_b: int, neither_or_both: int) -> Comparison:
    return Comparison(only_a + only_b + neither_or_both, only_a, only_b)


def test_items_are_counted_by_who_was_right() -> None:
    found = compare([True, True, False, False, True], [True, False, True, False, False])
    assert found == Comparison(n=5, only_a=2, only_b=1)
    assert found.difference == pytest.approx(-0.2)


def test_the_exact_test_equals_the_one_counted_by_hand() -> None:
    # Bentur et al. (2009), in Fagerland, Lydersen and Laake: 1, 1, 7, 12; 2 (1 + 8) / 2**8.
    assert make(1, 7, 13).p_value == 18 / 256
    assert make(0, 5, 175).p_value == 2 / 32
    assert make(4, 4, 2).p_value == 1.0
    assert make(0, 0, 9).p_value == 1.0


def test_the_interval_equals_that_of_the_r_package_propcis() -> None:
    # diffpropci.mp(b = 40, c = 20, n = 160): the example in its manual, and what R prints.
    assert make(40, 20, 100).interval == pytest.approx((-0.21601726, -0.03089632), abs=5e-9)


def test_the_interval_nears_that_of_wald_with_many_items() -> None:
    # Agresti, Categorical Data Analysis, 10.1: 150 and 86 of 1600, -0.04 with error 0.0095.
    assert make(150, 86, 1364).interval == pytest.approx((-0.059, -0.021), abs=1e-3)


def test_the_verdict_is_in_words() -> None:
    assert make(0, 0, 180).verdict == "no difference that 180 items could show"
    assert make(4, 1, 175).verdict == "no difference that 180 items could show"
    assert make(40, 20, 100).verdict == "12.5 points worse, 95 % interval 3.1 to 21.6"
    assert make(20, 40, 100).verdict == "12.5 points better, 95 % interval 3.1 to 21.6"


@given(counts)
def test_the_test_equals_that_of_scipy(drawn: tuple[int, int, int]) -> None:
    found = make(*drawn)
    discordant = found.only_a + found.only_b
    if discordant:
        expected = binomtest(found.only_a, discordant).pvalue
        assert found.p_value == pytest.approx(expected, rel=1e-6)


@given(counts)
def test_the_interval_holds_the_difference_and_stays_in_range(drawn: tuple[int, int, int]) -> None:
    found = make(*drawn)
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1
    assert low < high


@given(pairs)
def test_exchanging_the_two_turns_the_sign_and_nothing_else(drawn: list[tuple[bool, bool]]) -> None:
    first, second = zip(*drawn, strict=True)
    found, turned = compare(first, second), compare(second, first)
    assert turned.difference == -found.difference
    assert turned.p_value == found.p_value
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_many_items_are_no_trouble() -> None:
    found = make(3_000, 3_400, 60_000)
    assert found.p_value == pytest.approx(binomtest(3_000, 6_400).pvalue, rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], []), ([True], [True, False])])
def test_other_items_cannot_be_compared(first: list[bool], second: list[bool]) -> None:
    with pytest.raises(UsageError, match="the same items"):
        compare(first, second)


def test_json_holds_all_that_follows() -> None:
    # 6 / 22, give or take 1.96 sqrt(9 - 36 / 22) / 22
    assert make(1, 7, 12).to_json() == {
        "n": 20,
        "only_a": 1,
        "only_b": 7,
        "difference": pytest.approx(0.3),
        "p_value": 18 / 256,
        "interval": pytest.approx([0.27273 - 0.24176, 0.27273 + 0.24176], abs=1e-4),
        "verdict": "30.0 points better, 95 % interval 3.1 to 51.4",
    }
