from __future__ import annotations

import math

import pytest

from marwright.errors import UsageError
from marwright.training.settings import Settings


def test_all_impossible_numbers_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Settings(
            epochs=0,
            batch_size=0,
            lr=0.0,
            momentum=1.0,
            weight_decay=-1.0,
            shift=-1,
            seed=-1,
            threads=0,
            label_smoothing=1.0,
            clip=-1.0,
            patience=-1,
            checkpoint_steps=-1,
        )
    problems = caught.value.found.split("; ")
    assert sorted(problem.split(",")[0] for problem in problems) == [
        "batch size 0",
        "checkpoint steps -1",
        "clip -1.0",
        "epochs 0",
        "label smoothing 1.0",
        "learning rate 0.0",
        "momentum 1.0",
        "patience -1",
        "seed -1",
        "shift -1",
        "threads 0",
        "weight decay -1.0",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"lr": math.nan},
        {"lr": math.inf},
        {"momentum": math.nan},
        {"weight_decay": math.nan},
        {"label_smoothing": math.nan},
        {"clip": math.nan},
        {"clip": math.inf},
        {"momentum": -0.1},
        {"weight_decay": 1.0},
        {"seed": 1 << 32},
    ],
)
def test_a_number_just_outside_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="these settings cannot be used"):
        Settings(**values)  # type: ignore[arg-type]


def test_the_outermost_numbers_are_taken() -> None:
    Settings(
        epochs=1,
        batch_size=1,
        lr=1e-9,
        momentum=0,
        weight_decay=0,
        shift=0,
        seed=(1 << 32) - 1,
        label_smoothing=0.999,
        clip=0,
    )


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"optimizer": "lion"}, "gd, sgd, adam, adamw"),
        ({"schedule": "linear"}, "cosine, constant, step, onecycle"),
        ({"precision": "int8"}, "float32, bfloat16, float16"),
        ({"device": "tpu"}, "cpu, cuda, auto"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known(values: dict[str, str], known: str) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(values.values()))}.*one of {known}"):
        Settings(**values)  # type: ignore[arg-type]


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UsageError, match="float16 on a CPU, bfloat16 or float32"):
        Settings(precision="float16")
    Settings(precision="float16", device="cuda")
