from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marwright.archive.checks.comparison import compare_bodies, compare_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (0.5, 0.50005),
        (10_000, 10_000.9),
        (float("nan"), float("nan")),
        (float("inf"), float("inf")),
        ([{"a": 1}], [{"a": 1.00001}]),
        ({"7": 0.9, "1": 1e-6}, {"7": 0.9, "2": 2e-6}),
        (10**400, 10**400),
        (1, 1.0),
    ],
)
def test_values_that_differ_by_arithmetic_are_the_same(expected: Any, found: Any) -> None:
    assert compare_values(expected, found) is None


@pytest.mark.parametrize(
    ("expected", "found", "is_grave", "text"),
    [
        (0.5, 0.501, False, "0.501 instead of 0.5"),
        (0.5, 0.6, True, "0.6 instead of 0.5"),
        (0.5, float("nan"), True, "nan instead of 0.5"),
        (1.0, float("inf"), True, "inf instead of 1.0"),
        (10**400, 1, True, "1 instead of 1000"),
        ({"a": [1, 2]}, {"a": [1, 3]}, True, "a: 1: 3 instead of 2"),
        ([1], [1, 2], True, "2 items instead of 1"),
        ({"a": 1}, {"b": 1}, True, "a: None instead of 1"),
        ({"a": 1}, {"a": 1, "b": "x"}, True, "b: 'x' instead of None"),
        (True, 1, True, "1 instead of True"),
        ("x" * 100, "y", True, "'y' instead of 'xxx"),
    ],
)
def test_other_differences_are_told(expected: Any, found: Any, is_grave: bool, text: str) -> None:
    difference = compare_values(expected, found)
    assert difference is not None
    assert difference.text.startswith(text)
    assert difference.is_grave == is_grave


def test_the_gravest_difference_is_told() -> None:
    difference = compare_values({"a": 0.5, "b": "x"}, {"a": 0.501, "b": "y"})
    assert difference is not None
    assert difference.text == "b: 'y' instead of 'x'"


def test_of_a_recorded_mapping_only_its_own_keys_count() -> None:
    assert compare_values({"a": 1}, {"a": 1, "b": 2}, subset=True) is None
    assert compare_values({"a": 1}, {"b": 2}, subset=True) is not None


def test_bodies_that_are_no_json_may_differ_only_in_their_bytes() -> None:
    assert compare_bodies(b"\xff", b"\xff") is None
    difference = compare_bodies(b"\xff", b"\xfe")
    assert difference is not None
    assert not difference.is_grave


def test_values_that_are_nested_too_deeply_are_no_crash() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    difference = compare_values(deep, deep)
    assert difference is not None
    assert "too deeply" in difference.text


@given(VALUES)
def test_every_value_is_the_same_as_itself(value: Any) -> None:
    assert compare_values(value, json.loads(json.dumps(value))) is None


@given(VALUES, VALUES)
def test_any_two_values_can_be_compared(one: Any, other: Any) -> None:
    assert (compare_values(one, other) is None) == (compare_values(other, one) is None)
