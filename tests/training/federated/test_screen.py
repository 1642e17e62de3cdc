from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from marwright.training.federated.screen import Answer, measure_update, screen_answers

REFERENCE: dict[str, np.ndarray] = {
    "weight": np.zeros((2, 3), np.float32),
    "seen": np.array(7, np.int64),  # BatchNorm counts its batches
}


def make_answer(change: float = 0.1, items: float = 100, **arrays: Any) -> Answer:
    whole = {
        "weight": REFERENCE["weight"] + np.float32(change),
        "seen": np.array(9, np.int64),
    }
    return Answer({**whole, **arrays}, items)


def screen(*answers: Answer) -> dict[int, str]:
    return screen_answers(REFERENCE, dict(enumerate(answers)))


def test_honest_answers_pass_though_some_learnt_more() -> None:
    assert screen(make_answer(0.1), make_answer(-0.2), make_answer(0.3), make_answer(0.05)) == {}


def test_no_answers_are_no_error() -> None:
    assert screen() == {}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (make_answer(weight=np.full((2, 3), np.nan, np.float32)), "weight is not finite"),
        (make_answer(weight=np.full((2, 3), np.inf, np.float32)), "weight is not finite"),
        (make_answer(weight=np.zeros((3, 2), np.float32)), r"float32\[3, 2\], not float32\[2, 3\]"),
        (make_answer(weight=np.zeros((2, 3), np.float64)), "is float64"),
        (make_answer(other=np.zeros(1, np.float32)), "other arrays: other"),
        (Answer({}, 100), "other arrays: seen, weight"),
        (make_answer(items=0), "claims 0 items"),
        (make_answer(items=float("nan")), "claims nan items"),
        (make_answer(items=2.5), "claims 2.5 items"),
        (make_answer(items=1e9), "claims over 20 times"),
        (make_answer(100.0), "an update over 10 times"),
    ],
)
def test_garbage_is_refused_and_only_that(answer: Answer, why: str) -> None:
    refused = screen(make_answer(), answer, make_answer(0.2))
    assert list(refused) == [1]
    assert re.search(why, refused[1])


def test_two_liars_of_five_do_not_move_the_median() -> None:
    liars = [make_answer(50.0), make_answer(60.0)]
    assert list(screen(*liars, make_answer(), make_answer(), make_answer(0.3))) == [0, 1]


def test_the_length_of_an_update_is_that_of_the_change_alone() -> None:
    moved = {name: array + 5 for name, array in REFERENCE.items()}
    arrays = {"weight": moved["weight"] + np.float32(1), "seen": np.array(99, np.int64)}
    assert measure_update(moved, arrays) == pytest.approx(6**0.5)
