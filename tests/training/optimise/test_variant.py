from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import StorageError, UsageError
from marwright.training.optimise.variant import (
    BACKENDS,
    BASELINES,
    DEFAULT_PLAN,
    Variant,
    fingerprint,
    read_plan,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"name": "Upper"}, "name: expected"),
        ({"name": ""}, "name: expected"),
        ({"name": "../up"}, "name: expected"),
        ({"name": "a\n"}, "name: expected"),
        ({"name": "a" * 65}, "name: expected"),
        ({"backend": "tensorrt"}, "backend: expected one of torchscript"),
        ({"keep": 0.0}, "keep: expected above 0"),
        ({"keep": 1.01}, "keep: expected above 0"),
        ({"keep": math.nan}, "keep: expected above 0"),
        ({"keep": "half"}, "keep: expected a number, found 'half'"),
        ({"keep": True}, "keep: expected a number, found True"),
        ({"sparsity": 1.0}, "sparsity: expected at least 0"),
        ({"sparsity": -0.1}, "sparsity: expected at least 0"),
        ({"quantise": "int4"}, "quantise: expected one of dynamic, static, aware"),
        ({"epochs": -1, "keep": 0.5}, "epochs: expected 0 or more"),
        ({"epochs": 1.5}, "epochs: expected a whole number"),
        ({"epochs": True}, "epochs: expected a whole number"),
        ({"keep": 0.5}, "epochs: expected 1 or more with keep below 1"),
        ({"quantise": "aware"}, "epochs: expected 1 or more with quantise: aware"),
        ({"sparsity": 0.5, "distil": True}, "epochs: expected 1 or more with distil"),
        ({"distil": True, "epochs": 1}, "distil: expected keep below 1"),
        ({"epochs": 1}, "epochs: expected keep below 1"),
        ({"distil": 1}, "distil: expected true or false"),
        ({"backend": "openvino", "quantise": "dynamic"}, "dynamic is for torchscript and onnx"),
        ({"channels_last": True}, "channels_last: is for"),
        ({"backend": "eager", "quantise": "static"}, "eager is the baseline"),
    ],
)
def test_what_cannot_be_built_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        Variant(**{"name": "x", **values})
    assert problem in caught.value.found


def test_every_problem_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Variant("Bad", backend="none", keep=2, sparsity=1, quantise="x", epochs=-1)
    found = caught.value.found.split("; ")
    keys = [problem.split(":")[0] for problem in found]
    assert keys == ["name", "backend", "keep", "sparsity", "quantise", "epochs"]


def test_sparsity_alone_needs_no_fine_tuning() -> None:
    assert not Variant("a", sparsity=0.5).is_plain
    assert Variant("a").is_plain


def test_a_description_says_all_that_is_done() -> None:
    variant = Variant("a", "onnx", 0.25, 0.5, "static", True, 1)
    assert variant.describe() == (
        "onnx, 25 % of channels, 50 % zeros, int8 static, distilled, 1 epoch"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"backend": "onnx"},
        {"keep": 0.25},
        {"sparsity": 0.1},
        {"quantise": "static"},
        {"distil": True},
        {"epochs": 2},
    ],
)
def test_a_fingerprint_changes_with_every_value(change: dict[str, Any]) -> None:
    variant = Variant("a", keep=0.5, epochs=1)
    assert fingerprint(replace(variant, **change)) != fingerprint(variant)
    assert len(fingerprint(variant)) == 64


def test_a_fingerprint_does_not_tell_1_from_one_point_0() -> None:
    assert fingerprint(Variant("a", keep=1, sparsity=0)) == fingerprint(Variant("a"))


def test_the_default_plan_covers_every_backend_under_names_of_their_own() -> None:
    names = [variant.name for variant in (*BASELINES, *DEFAULT_PLAN.variants)]
    assert len(names) == len(set(names))
    assert {variant.backend for variant in DEFAULT_PLAN.variants} == set(BACKENDS)


def test_a_plan_is_read(tmp_path: Path) -> None:
    text = "rounds: 3\nvariants:\n- {name: a}\n- {name: b, backend: onnx, keep: 0.5, epochs: 2}\n"
    plan = read_plan(write(tmp_path, text))
    assert plan.rounds == 3
    assert plan.variants == (Variant("a"), Variant("b", "onnx", keep=0.5, epochs=2))
    assert read_plan(write(tmp_path, "variants: [{name: a}]")).rounds == 5


def test_every_problem_of_a_plan_is_said_with_its_line_and_variant(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "round: 3\n"
        "rounds: 0\n"
        "variants:\n"
        "- {name: a, keep: 2, quantize: static}\n"
        "- onnx\n"
        "- {backend: onnx}\n"
        "- {name: a}\n"
        "- {name: eager, backend: eager}\n",
    )
    with pytest.raises(UsageError) as caught:
        read_plan(path)
    assert caught.value.found == "9 problems"
    assert caught.value.detail.splitlines() == [
        "round: no such key; did you mean rounds?",
        "rounds: expected 1 to 100, found 0",
        "line 4, variant 1 (a): quantize: no such key; did you mean quantise?",
        "line 4, variant 1 (a): keep: expected above 0 and at most 1, found 2",
        "line 5, variant 2: expected a mapping, found 'onnx'",
        "line 6, variant 3: name: missing",
        "line 7, variant 4 (a): name: a is also that of variant 1",
        "line 8, variant 5 (eager): backend: eager is measured anyway, as the baseline",
        "line 8, variant 5 (eager): name: eager is also that of the baseline",
    ]


@pytest.mark.parametrize(
    "text", ["", "rounds: 3", "variants: []", "variants: 7", "[]", "a: [", "x"]
)
def test_an_empty_or_broken_plan_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"plan\.yaml"):
        read_plan(write(tmp_path, text))


def test_a_plan_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*none\.yaml"):
        read_plan(tmp_path / "none.yaml")
