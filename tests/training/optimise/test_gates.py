from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marwright.errors import UsageError
from marwright.training.optimise.gates import (
    Gates,
    choose,
    judge,
    parse_bytes,
    parse_milliseconds,
)
from marwright.training.optimise.result import Result, Timing
from marwright.training.optimise.units import format_bytes
from marwright.training.optimise.variant import Variant

ITEMS = 180


def make(
    name: str,
    *,
    ms: float = 1.0,
    large_ms: float | None = None,
    size: int = 1_300_000,
    wrong: int = 2,
    spread: float = 0.01,
    **values: Any,
) -> Result:
    """Return a result whose rounds lie within `spread` of their medians."""
    timings = tuple(
        Timing(batch, p50, 2 * p50, p50 * (1 - spread), p50 * (1 + spread))
        for batch, p50 in ((1, ms), (32, 10 * ms if large_ms is None else large_ms))
    )
    return Result(
        variant=Variant(name, **values),
        file=f"{name}.pt",
        size_bytes=size,
        accuracy=(ITEMS - wrong) / ITEMS,
        correct=tuple(number >= wrong for number in range(ITEMS)),
        timings=timings,
        memory_bytes=5_000_000,
        load_seconds=0.1,
        parity=None,
        parameters=1000,
        nonzero=1000,
        build_seconds=1.0,
        failure="",
    )


EAGER = make("eager", backend="eager", ms=6.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5ms", 5.0), ("0.5s", 500.0), ("300us", 0.3), (" 2 MS ", 2.0), (".5ms", 0.5), ("1.s", 1000)],
)
def test_milliseconds_are_read(text: str, expected: float) -> None:
    assert parse_milliseconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "ms", "-1ms", "0ms", "5 min", "nan", "1e3ms", "1,5ms"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no duration"):
        parse_milliseconds(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500KB", 500_000),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 * 2**20),
        ("1000", 1000),
        ("1 kb", 1000),
        ("1KiB", 1024),
        ("3GB", 3 * 10**9),
        ("12B", 12),
    ],
)
def test_bytes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "KB", "0", "-5KB", "5TB", "5 K", "0.1", "five", "٣KB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (999, "999 B"),
        (1000, "1.0 KB"),
        (81_234, "81 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (1_264_000, "1.3 MB"),
        (9_960_000, "10 MB"),
        (12 * 10**12, "12000 GB"),
    ],
)
def test_sizes_are_shown_with_two_or_three_figures(size: int, expected: str) -> None:
    assert format_bytes(size) == expected


@given(st.integers(1, 10**12))
def test_a_shown_size_reads_as_nearly_the_same(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)


def test_limits_that_cannot_be_meant_are_refused_all_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Gates(max_accuracy_drop=math.nan, max_p99_ms=0, max_size_bytes=-1, max_memory_bytes=0)
    assert [problem.split(":")[0] for problem in caught.value.found.split("; ")] == [
        "accuracy drop",
        "p99",
        "size",
        "memory",
    ]


def test_a_gate_says_what_it_found_and_what_it_allows() -> None:
    result = make("a", wrong=7, ms=4, size=2_000_000)
    gates = Gates(max_p99_ms=5, max_size_bytes=1_500_000, max_memory_bytes=4_000_000)
    assert judge(result, replace(EAGER, accuracy=0.9833), gates) == (
        "accuracy 0.9611, 2.2 points below 0.9833; at most 1.0 allowed",
        "p99 8.0 ms at batch 1; at most 5.0 ms allowed",
        "size 2.0 MB; at most 1.5 MB allowed",
        "memory 5.0 MB; at most 4.0 MB allowed",
    )


def test_a_limit_itself_is_allowed() -> None:
    result = replace(make("a", ms=2.5, size=1000), accuracy=0.97)
    gates = Gates(max_p99_ms=5, max_size_bytes=1000, max_memory_bytes=5_000_000)
    assert 0.98 - 0.97 > 0.01  # as floating point has it
    assert not judge(result, replace(EAGER, accuracy=0.98), gates)


def test_numbers_that_differ_are_shown_so() -> None:
    found = judge(replace(make("a"), accuracy=0.9732), replace(EAGER, accuracy=0.98324), Gates())
    assert found == ("accuracy 0.9732, 1.004 points below 0.9832; at most 1.000 allowed",)
    found = judge(make("a", size=1_000_100), EAGER, Gates(max_size_bytes=1_000_000))
    assert found == ("size 1,000,100 bytes; at most 1,000,000 bytes allowed",)


def test_what_was_not_measured_does_not_pass() -> None:
    nothing = replace(make("a"), timings=(), memory_bytes=0)
    assert judge(nothing, EAGER, Gates(max_memory_bytes=10)) == (
        "not timed at batch 1 and 32",
        "memory was not measured",
    )
    failed = Result.of_failure(Variant("b"), "no compiler")
    assert judge(failed, EAGER, Gates(max_p99_ms=1)) == ("not built: no compiler",)
    assert judge(replace(make("a"), accuracy=math.nan), EAGER, Gates())


def test_the_line_says_what_was_chosen_and_why() -> None:
    results = [
        make("torchscript", ms=3, size=1_296_000),
        make("onnx-quarter", backend="onnx", ms=1, large_ms=61 / 9, size=81_000),
    ]
    decision = choose(results, EAGER, Gates())
    assert decision.chosen is results[1]
    assert decision.line == (
        "onnx-quarter: 6.1 times faster than eager at batch 1, 9.0 at batch 32, "
        "81 KB (1/16 of fp32 TorchScript), accuracy 0.9889 against 0.9889 "
        "(no difference that 180 items could show)"
    )
    assert decision.others == {"torchscript": "3.6 times slower than onnx-quarter"}


def test_a_variant_slower_than_the_baseline_is_called_that() -> None:
    decision = choose(
        [make("exported", backend="exported", ms=12.2, large_ms=30.5)], EAGER, Gates()
    )
    assert decision.line.startswith(
        "exported: 2.0 times slower than eager at batch 1, 2.0 times faster at batch 32, 1.3 MB, "
    )


def test_the_fastest_on_both_batches_together_is_chosen() -> None:
    results = [make("a", ms=1, large_ms=40), make("b", ms=2, large_ms=10)]
    for prefer, name in (("latency", "b"), ("throughput", "b")):
        chosen = choose(results, EAGER, Gates(), prefer).chosen  # type: ignore[arg-type]
        assert chosen is not None
        assert chosen.variant.name == name
    results[0] = make("a", ms=0.2, large_ms=40)
    assert choose(results, EAGER, Gates(), "latency").chosen is results[0]
    assert choose(results, EAGER, Gates(), "throughput").chosen is results[1]


def test_of_equally_fast_ones_the_smallest_is_chosen() -> None:
    results = [
        make("a", ms=1.0, size=300_000, spread=0.1),
        make("b", ms=1.05, size=200_000),
        make("c", ms=1.2, size=100_000),
    ]
    decision = choose(results, EAGER, Gates())
    assert decision.chosen is results[1]
    assert decision.others == {
        "a": "as fast as b within the spread of rounds; larger, 300 KB against 200 KB",
        "c": "1.2 times slower than a, which b equals",
    }


def test_of_equally_fast_and_small_ones_the_first_by_name_is_chosen() -> None:
    results = [make("b"), make("a")]
    decision = choose(results, EAGER, Gates())
    assert decision.chosen is results[1]
    assert decision.others["b"].endswith("as small as a, and later by name")


def test_the_smallest_is_chosen_where_size_is_preferred() -> None:
    results = [make("a", ms=1), make("b", ms=9, size=100_000), make("c", ms=8, size=100_000)]
    decision = choose(results, EAGER, Gates(), "size")
    assert decision.chosen is results[2]
    assert decision.others == {
        "a": "larger, 1.3 MB against 100 KB",
        "b": "as small as c, and no faster",
    }


def test_the_best_that_passes_is_chosen_not_the_best_of_all() -> None:
    results = [make("fast", ms=0.1, wrong=9), make("slow", ms=3), make("eager", backend="eager")]
    decision = choose(results, EAGER, Gates())
    assert decision.chosen is results[1]
    assert "points below" in decision.others["fast"]
    assert set(decision.others) == {"fast"}


def test_where_nothing_passes_the_line_names_the_gates_and_the_nearest() -> None:
    results = [
        make("a", ms=0.1, wrong=9),
        make("b", ms=4),
        make("c", ms=3),
        Result.of_failure(Variant("d"), "no compiler"),
    ]
    decision = choose(results, EAGER, Gates(max_p99_ms=5))
    assert decision.chosen is None
    assert decision.line == (
        "none of 4 may be served: 1 lose too much accuracy, 2 exceed p99, 1 could not be built; "
        "nearest is c: p99 6.0 ms at batch 1; at most 5.0 ms allowed"
    )
    assert set(decision.others) == {"a", "b", "c", "d"}


def test_where_nothing_was_built_the_line_says_so() -> None:
    failed = [Result.of_failure(Variant("d"), "no compiler")]
    assert choose(failed, EAGER, Gates()).line == "none of 1 may be served: 1 could not be built"
    assert choose([], EAGER, Gates()).line == "no variant was measured"


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(UsageError, match="balance, latency, throughput, size"):
        choose([], EAGER, Gates(), "speed")  # type: ignore[arg-type]


@given(st.permutations([("a", 1.0), ("b", 1.004), ("c", 2.0), ("d", 0.7)]))
def test_the_order_of_results_does_not_matter(drawn: list[tuple[str, float]]) -> None:
    results = [make(name, ms=ms, size=int(100_000 * ms)) for name, ms in drawn]
    chosen = choose(results, EAGER, Gates()).chosen
    assert chosen is not None
    assert chosen.variant.name == "d"


def test_balance_takes_a_slower_file_that_is_much_smaller_and_says_what_the_others_cost() -> None:
    fast = make("fast", ms=1.0, size=100_000)
    small = make("small", ms=1.2, size=30_000)
    decision = choose([fast, small], EAGER, Gates(), "balance")
    assert decision.chosen is small
    # (1 / 1.2) squared times 100 / 30, its third root
    assert decision.others["fast"].startswith("costs 1.3 times as much as small: ")
    assert "3.3 times its size" in decision.others["fast"]
    assert choose([fast, small], EAGER, Gates(), "latency").chosen is fast
