"""Which variants may be served, and which of those is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from marwright.errors import UsageError

from .comparison import compare
from .result import BATCHES, Result, Timing
from .units import format_bytes, parse_bytes, parse_milliseconds

__all__ = [
    "choose",
    "Decision",
    "Gates",
    "judge",
    "parse_bytes",
    "parse_milliseconds",
    "Preference",
]

Preference = Literal["balance", "latency", "throughput", "size"]
SLACK = 1e-9
"""A drop from 0.98 to 0.97 is one point, whatever floating point makes of it."""


@dataclass(frozen=True)
class Gates:
    """What a variant must keep to; None where there is no limit."""

    max_accuracy_drop: float = 0.01
    """Of the accuracy on the validation split, as counted there, below the baseline's."""
    max_p99_ms: float | None = None
    """At batch 1."""
    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits that cannot be meant, all of them at once."""
        problems = []
        if not 0 <= self.max_accuracy_drop <= 1:
            problems.append(f"accuracy drop: expected 0 to 1, found {self.max_accuracy_drop}")
        limits = {
            "p99": self.max_p99_ms,
            "size": self.max_size_bytes,
            "memory": self.max_memory_bytes,
        }
        problems += [
            f"{name}: expected above 0, found {limit}"
            for name, limit in limits.items()
            if limit is not None and not 0 < limit < math.inf
        ]
        if problems:
            raise UsageError("no variant could keep to this", found="; ".join(problems))


@dataclass(frozen=True)
class Decision:
    """The variant to serve, and why it is that one."""

    chosen: Result | None
    line: str
    """The one line for a person."""
    others: dict[str, str]
    """By name: why it is not that one."""


@dataclass(frozen=True)
class _Miss:
    """A gate that a variant did not pass."""

    gate: str
    text: str
    excess: float
    """How far above what is allowed, as a share of that; infinite where nothing was measured."""


def judge(result: Result, baseline: Result, gates: Gates) -> tuple[str, ...]:
    """Return the reasons why a variant may not be served; none where it may."""
    return tuple(miss.text for miss in _find_misses(result, baseline, gates))


def choose(
    results: Sequence[Result],
    baseline: Result,
    gates: Gates,
    prefer: Preference = "latency",
) -> Decision:
    """Choose the best of the variants that pass every gate.

    "balance" is the geometric mean of three costs: the medians at batch 1 and at 32, and the file's
    size. "latency" is that of the two medians, "throughput" the median at batch 32; of variants
    whose medians' spread overlaps that of the fastest, the smallest is the best, then the first by
    name. "size" is the file's. The eager baselines are not served.
    """
    if prefer not in get_args(Preference):
        expected = f"one of {', '.join(get_args(Preference))}"
        raise UsageError("no such preference", expected=expected, found=repr(prefer))
    candidates = [result for result in results if result.variant.backend != "eager"]
    misses = {
        result.variant.name: list(_find_misses(result, baseline, gates)) for result in candidates
    }
    others = {name: ", and ".join(miss.text for miss in found) for name, found in misses.items()}
    passing = [result for result in candidates if not misses[result.variant.name]]
    if not passing:
        return Decision(None, _explain_none(misses), others)
    rank = {"balance": _rank_by_balance, "size": _rank_by_size}.get(prefer, _rank_by_time)
    chosen, losers = rank(passing, BATCHES[1:] if prefer == "throughput" else BATCHES)
    del others[chosen.variant.name]
    return Decision(chosen, _praise(chosen, baseline, results), others | losers)


def _find_misses(result: Result, baseline: Result, gates: Gates) -> Iterator[_Miss]:
    if result.failure:
        yield _Miss("could not be built", f"not built: {result.failure}", math.inf)
        return
    drop, allowed = baseline.accuracy - result.accuracy, gates.max_accuracy_drop
    if not drop <= allowed + SLACK:
        below, most = _tell_apart(100 * drop, 100 * allowed)
        text = (
            f"accuracy {result.accuracy:.4f}, {below} points below {baseline.accuracy:.4f}; "
            f"at most {most} allowed"
        )
        yield _Miss("lose too much accuracy", text, (drop - allowed) / max(allowed, 0.01))
    untimed = [str(batch) for batch in BATCHES if result.find_timing(batch) is None]
    if untimed:
        yield _Miss("were not timed", f"not timed at batch {' and '.join(untimed)}", math.inf)
    alone = result.find_timing(1)
    if alone and gates.max_p99_ms is not None and not alone.p99_ms <= gates.max_p99_ms:
        found, most = _tell_apart(alone.p99_ms, gates.max_p99_ms)
        text = f"p99 {found} ms at batch 1; at most {most} ms allowed"
        yield _Miss("exceed p99", text, alone.p99_ms / gates.max_p99_ms - 1)
    yield from _weigh("size", "are too large", result.size_bytes, gates.max_size_bytes)
    yield from _weigh("memory", "need too much memory", result.memory_bytes, gates.max_memory_bytes)


def _weigh(what: str, gate: str, size: int, allowed: int | None) -> Iterator[_Miss]:
    if allowed is None:
        return
    if not size:
        yield _Miss(gate, f"{what} was not measured", math.inf)
    elif size > allowed:
        found, most = format_bytes(size), format_bytes(allowed)
        if found == most:
            found, most = f"{size:,} bytes", f"{allowed:,} bytes"
        yield _Miss(gate, f"{what} {found}; at most {most} allowed", size / allowed - 1)


def _tell_apart(found: float, allowed: float) -> tuple[str, str]:
    """Return both numbers with as many decimals as it takes to see that they differ."""
    texts = ((f"{found:.{digits}f}", f"{allowed:.{digits}f}") for digits in range(1, 10))
    return next((pair for pair in texts if pair[0] != pair[1]), (str(found), str(allowed)))


def _average(result: Result, batches: Sequence[int], read: Callable[[Timing], float]) -> float:
    """Return the geometric mean over batch sizes of one of a timing's numbers."""
    timings = [timing for timing in result.timings if timing.batch in batches]
    return math.exp(sum(math.log(max(read(timing), 1e-9)) for timing in timings) / len(timings))


def _rank_by_time(
    passing: Sequence[Result], batches: Sequence[int]
) -> tuple[Result, dict[str, str]]:
    """Return the best, and why each other one is not."""

    def median(result: Result) -> float:
        return _average(result, batches, lambda timing: timing.p50_ms)

    fastest = min(passing, key=lambda result: (median(result), result.variant.name))
    slowest_round = _average(fastest, batches, lambda timing: timing.highest_ms)
    equal = [
        result
        for result in passing
        if result is fastest
        or _average(result, batches, lambda timing: timing.lowest_ms) <= slowest_round
    ]
    best = min(equal, key=lambda result: (result.size_bytes, result.variant.name))
    equalled = "" if best is fastest else f", which {best.variant.name} equals"
    losers = {
        result.variant.name: f"as fast as {best.variant.name} within the spread of rounds; "
        + _compare_sizes(result, best)
        if result in equal
        else f"{_round(median(result) / median(fastest))} times slower than "
        f"{fastest.variant.name}{equalled}"
        for result in passing
        if result is not best
    }
    return best, losers


def _rank_by_balance(
    passing: Sequence[Result], batches: Sequence[int]
) -> tuple[Result, dict[str, str]]:
    def median(result: Result) -> float:
        return _average(result, batches, lambda timing: timing.p50_ms)

    def cost(result: Result) -> float:
        return statistics.geometric_mean([median(result)] * len(batches) + [result.size_bytes])

    best = min(passing, key=lambda result: (cost(result), result.variant.name))
    losers = {
        result.variant.name: f"costs {_round(cost(result) / cost(best))} times as much as "
        f"{best.variant.name}: {_round(median(result) / median(best))} times its time, "
        f"{_round(result.size_bytes / best.size_bytes)} times its size"
        for result in passing
        if result is not best
    }
    return best, losers


def _rank_by_size(
    passing: Sequence[Result], batches: Sequence[int]
) -> tuple[Result, dict[str, str]]:
    def key(result: Result) -> tuple[int, float, str]:
        median = _average(result, batches, lambda timing: timing.p50_ms)
        return result.size_bytes, median, result.variant.name

    best = min(passing, key=key)
    losers = {
        result.variant.name: _compare_sizes(result, best)
        if result.size_bytes > best.size_bytes
        else f"as small as {best.variant.name}, and no faster"
        for result in passing
        if result is not best
    }
    return best, losers


def _compare_sizes(result: Result, best: Result) -> str:
    if result.size_bytes == best.size_bytes:
        return f"as small as {best.variant.name}, and later by name"
    sizes = [format_bytes(each.size_bytes) for each in (result, best)]
    if sizes[0] == sizes[1]:
        sizes = [f"{each.size_bytes:,} bytes" for each in (result, best)]
    return f"larger, {sizes[0]} against {sizes[1]}"


def _explain_none(misses: dict[str, list[_Miss]]) -> str:
    if not misses:
        return "no variant was measured"
    counts: dict[str, int] = {}
    for found in misses.values():
        for gate in {miss.gate: None for miss in found}:
            counts[gate] = counts.get(gate, 0) + 1
    line = f"none of {len(misses)} may be served: "
    line += ", ".join(f"{count} {gate}" for gate, count in counts.items())
    worst = {name: max(miss.excess for miss in found) for name, found in misses.items()}
    nearest = min(worst, key=lambda name: (worst[name], name))
    if worst[nearest] < math.inf:
        line += f"; nearest is {nearest}: " + ", and ".join(miss.text for miss in misses[nearest])
    return line


def _praise(chosen: Result, baseline: Result, results: Sequence[Result]) -> str:
    """Return what a variant is beside the baseline, in one line."""
    speed, said = [], ""
    for batch in BATCHES:
        timing, before = chosen.find_timing(batch), baseline.find_timing(batch)
        if timing and before:
            times = before.p50_ms / timing.p50_ms
            word, times = ("faster", times) if times >= 1 else ("slower", 1 / times)
            words = f" times {word}" if word != said else ""
            beside = f" than {baseline.variant.name}" if not said else ""
            speed.append(f"{_round(times)}{words}{beside} at batch {batch}")
            said = word
    size = format_bytes(chosen.size_bytes) + _compare_to_script(chosen, results)
    accuracy = f"accuracy {chosen.accuracy:.4f} against {baseline.accuracy:.4f}"
    if chosen.correct and len(chosen.correct) == len(baseline.correct):
        accuracy += f" ({compare(baseline.correct, chosen.correct).verdict})"
    return f"{chosen.variant.name}: " + ", ".join([*speed, size, accuracy])


def _compare_to_script(chosen: Result, results: Sequence[Result]) -> str:
    """Return how the file compares with what `marwright train` exports, if that was measured."""
    scripts = [
        result
        for result in results
        if result.variant.backend == "torchscript" and result.variant.is_plain
        if result.size_bytes and result.variant != chosen.variant
    ]
    if not scripts:
        return ""
    share = chosen.size_bytes / scripts[0].size_bytes
    shown = f"1/{1 / share:.0f}" if share <= 0.5 else f"{100 * share:.0f} %"
    return f" ({shown} of fp32 TorchScript)"


def _round(times: float) -> str:
    """Return a ratio with two figures at least: 1.04, 6.1, 143."""
    return f"{times:.2f}" if times < 1.095 else f"{times:.1f}" if times < 100 else f"{times:.0f}"
