"""Whether two answers are the same, but for what arithmetic loses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["compare_bodies", "compare_values", "Difference", "TOLERANCE"]

TOLERANCE = 1e-4
"""Relative and absolute: one float32 sum in another order is a hundred times closer."""
FAR = 100
"""Times the tolerance: no arithmetic explains that."""


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers that matters most."""

    text: str
    is_grave: bool
    """Whether more than arithmetic differs."""


def compare_bodies(one: bytes, other: bytes, *, tolerance: float = TOLERANCE) -> Difference | None:
    """Return how the bodies of two answers differ; numbers in JSON may, within the tolerance."""
    if one == other:
        return None
    try:
        values = json.loads(one), json.loads(other)
    except (ValueError, RecursionError):
        text = f"{_shorten(other)} instead of {_shorten(one)}"
        return Difference(text, is_grave=False)  # an encoder may be free in its bytes
    return compare_values(*values, tolerance=tolerance)


def compare_values(
    expected: Any, found: Any, *, tolerance: float = TOLERANCE, subset: bool = False
) -> Difference | None:
    """Return how two JSON values differ; `subset`: `found` may have further keys."""
    try:
        differences = list(_walk(expected, found, "", tolerance, subset))
    except RecursionError:
        return Difference("values that are nested too deeply to be compared", is_grave=False)
    return max(differences, key=lambda item: item.is_grave, default=None)


def _walk(
    expected: Any, found: Any, place: str, tolerance: float, subset: bool
) -> Iterator[Difference]:
    if _is_number(expected) and _is_number(found):
        if distance := _distance(expected, found, tolerance):
            text = f"{place}{_shorten(found)} instead of {_shorten(expected)}"
            yield Difference(text, is_grave=distance > FAR)
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(() if subset else found.keys() - expected.keys())]:
            # Of the most probable labels the last may be others: all of them are next to 0.
            one, other = (side.get(key, 0.0) for side in (expected, found))
            is_in_both = key in expected and key in found
            if is_in_both or not (_is_small(one, tolerance) and _is_small(other, tolerance)):
                pair = (one if key in expected else None, other if key in found else None)
                yield from _walk(*pair, f"{place}{key}: ", tolerance, subset)
    elif isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            text = f"{place}{len(found)} items instead of {len(expected)}"
            yield Difference(text, is_grave=True)
            return
        for number, pair in enumerate(zip(expected, found, strict=True)):
            yield from _walk(*pair, f"{place}{number}: ", tolerance, subset)
    elif type(expected) is not type(found) or expected != found:
        yield Difference(f"{place}{_shorten(found)} instead of {_shorten(expected)}", is_grave=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_small(value: Any, tolerance: float) -> bool:
    return _is_number(value) and abs(value) <= tolerance


def _distance(expected: float, found: float, tolerance: float) -> float:
    """Return how many tolerances two numbers are apart; 0 within one."""
    if expected == found:
        return 0.0
    try:
        one, other = float(expected), float(found)
    except OverflowError:  # integers that no float can hold
        return math.inf
    if math.isnan(one) and math.isnan(other):
        return 0.0
    apart = abs(one - other) / (tolerance * max(1.0, abs(one), abs(other)))
    return 0.0 if apart <= 1 else apart if math.isfinite(apart) else math.inf


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
