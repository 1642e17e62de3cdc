"""What was measured of one variant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from marwright.errors import MarwrightError, RunError

from .variant import Variant

__all__ = ["BATCHES", "Parity", "Result", "Timing"]

BATCHES = (1, 32)
"""The batch sizes at which variants are compared: one request alone, and a busy server."""


@dataclass(frozen=True)
class Timing:
    """How long one batch takes, in milliseconds."""

    batch: int
    """Items."""
    p50_ms: float
    p99_ms: float
    lowest_ms: float
    """The lowest of the rounds' medians."""
    highest_ms: float
    """The highest of the rounds' medians."""


@dataclass(frozen=True)
class Parity:
    """How far a file's logits lie from those of the network it was exported from."""

    worst: float
    """The largest absolute difference of one logit."""
    mean: float
    """The mean absolute difference."""
    agreement: float
    """Share of items with the same predicted class."""


@dataclass(frozen=True)
class Result:
    """One variant: the file, what it answers on the validation split, and what it costs."""

    variant: Variant
    file: str
    """Its name in the folder of variants; empty where there is none."""
    size_bytes: int
    accuracy: float
    """On the validation split, in [0, 1]."""
    correct: tuple[bool, ...]
    """By item of the validation split."""
    timings: tuple[Timing, ...]
    memory_bytes: int
    """What a process grows by when it loads and runs it; 0 where that was not measured."""
    load_seconds: float
    parity: Parity | None
    parameters: int
    nonzero: int
    """Parameters that are not 0."""
    build_seconds: float
    failure: str
    """The one line why it could not be built; empty where it could."""

    @classmethod
    def of_failure(cls, variant: Variant, failure: str, *, build_seconds: float = 0.0) -> Result:
        """Return the result of a variant that could not be built."""
        return cls(
            variant=variant,
            file="",
            size_bytes=0,
            accuracy=0.0,
            correct=(),
            timings=(),
            memory_bytes=0,
            load_seconds=0.0,
            parity=None,
            parameters=0,
            nonzero=0,
            build_seconds=build_seconds,
            failure=failure,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Return the result that `to_json` made the values of.

        Raises:
            RunError: it made none such; keys that it does not know are passed over.
        """
        try:
            parity = values["parity"]
            known = {key: values[key] for key in cls.__dataclass_fields__}
            if set(known["correct"]) - {"0", "1"}:
                raise ValueError("correct: expected 0 and 1 only")
            return cls(
                **known
                | {
                    "variant": Variant(**values["variant"]),
                    "correct": tuple(sign == "1" for sign in values["correct"]),
                    "timings": tuple(Timing(**each) for each in values["timings"]),
                    "parity": None if parity is None else Parity(**_restore(parity)),
                }
            )
        except (KeyError, TypeError, ValueError, MarwrightError) as exc:
            raise RunError(
                "no measured variant can be read from this",
                found=f"{type(exc).__name__}: {exc}",
                remedy="measure again",
            ) from exc

    def to_json(self) -> dict[str, Any]:
        """Return values for JSON: `correct` as a string of 0 and 1, no number in parity as None."""
        return {
            **asdict(self),
            "correct": "".join("01"[right] for right in self.correct),
            "timings": [asdict(timing) for timing in self.timings],
            "parity": None if self.parity is None else _replace(asdict(self.parity)),
        }

    def find_timing(self, batch: int) -> Timing | None:
        """Return the timing of a batch size, or None where that was not measured."""
        return next((timing for timing in self.timings if timing.batch == batch), None)


def _replace(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return values with None for NaN and infinity, for which JSON has no word."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _restore(values: Mapping[str, float | None]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}
