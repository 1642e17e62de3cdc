from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from marwright.errors import RunError
from marwright.training.optimise.result import Parity, Result, Timing
from marwright.training.optimise.variant import Variant

RESULT = Result(
    variant=Variant("onnx-half", "onnx", keep=0.5, epochs=4),
    file="onnx-half.onnx",
    size_bytes=81_234,
    accuracy=0.75,
    correct=(True, False, True, True),
    timings=(Timing(1, 0.1, 0.2, 0.09, 0.12), Timing(32, 1.0, 2.0, 0.9, 1.2)),
    memory_bytes=3_000_000,
    load_seconds=0.03,
    parity=Parity(3e-6, 1e-6, 1.0),
    parameters=314,
    nonzero=300,
    build_seconds=2.5,
    failure="",
)


def pass_through_json(result: Result) -> Result:
    return Result.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))


def test_a_result_survives_json() -> None:
    assert pass_through_json(RESULT) == RESULT
    assert RESULT.to_json()["correct"] == "1011"


def test_a_failure_survives_json() -> None:
    failed = Result.of_failure(Variant("onnx", "onnx"), "no onnxruntime", build_seconds=1.5)
    assert pass_through_json(failed) == failed
    assert (failed.file, failed.failure, failed.timings) == ("", "no onnxruntime", ())


def test_parity_that_is_no_number_is_none_in_json() -> None:
    result = replace(RESULT, parity=Parity(math.inf, math.nan, 0.5))
    assert result.to_json()["parity"] == {"worst": None, "mean": None, "agreement": 0.5}
    restored = pass_through_json(result).parity
    assert restored is not None
    assert math.isnan(restored.worst)
    assert restored.agreement == 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"variant": {"name": "a", "keep": 7}},
        {"variant": {"name": "a", "colour": "red"}},
        {"timings": [{"batch": 1}]},
        {"timings": 3},
        {"correct": "1021"},
        {"correct": None},
        {"parity": {"worst": 1}},
    ],
)
def test_what_is_no_result_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="measure again"):
        Result.from_json({**RESULT.to_json(), **change})


def test_a_missing_key_is_refused_and_an_unknown_one_passed_over() -> None:
    values = RESULT.to_json()
    assert Result.from_json({**values, "ratios": {}}) == RESULT
    del values["failure"]
    with pytest.raises(RunError, match="failure"):
        Result.from_json(values)


def test_a_timing_is_found_by_its_batch() -> None:
    assert RESULT.find_timing(32) == RESULT.timings[1]
    assert RESULT.find_timing(8) is None
