"""Durations and sizes as people write them."""

from __future__ import annotations

import math
import re

from marwright.errors import UsageError

__all__ = ["format_bytes", "parse_bytes", "parse_milliseconds"]

MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def parse_milliseconds(text: str) -> float:
    """Return the milliseconds that `5ms`, `0.5s` or `300us` says; UsageError for anything else."""
    return _parse(text, MILLISECONDS, "a duration", "a number above 0 and us, ms or s, such as 5ms")


def parse_bytes(text: str) -> int:
    """Return the bytes that `500KB` (1000 each), `2MiB` (1024 twice) or `1000` says.

    Raises:
        UsageError: it says none, or less than one.
    """
    expected = "a number above 0 and KB, MB, GB, KiB, MiB, GiB or nothing, such as 1.5MB"
    size = round(_parse(text, BYTES, "a size", expected))
    if size < 1:
        raise UsageError(f"{text!r} is no size", expected="at least one byte")
    return size


def format_bytes(size: int) -> str:
    """Return a size with two or three figures: `81 KB`, `1.3 MB`."""
    if size < 1000:
        return f"{size} B"
    number, unit = next(
        (size / factor, name)
        for name, factor in (("KB", 1e3), ("MB", 1e6), ("GB", 1e9))
        if size < 999.5 * factor or name == "GB"
    )
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, expected: str) -> float:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    factor = units.get(match[2].lower()) if match else None
    number = float(match[1]) * factor if match and factor is not None else 0.0
    if not 0 < number < math.inf:
        raise UsageError(f"{text!r} is no {what.split()[-1]}", expected=expected)
    return number
