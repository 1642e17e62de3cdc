from __future__ import annotations

import json
from typing import Any

import pytest

from marwright.client import Answer
from marwright.errors import AnswerError, InputRejectedError
from marwright.monitor.page.tryout import LONGEST_TEXT, Tryout, read_input, try_model


class Model:
    """A client of a model that answers what it is told."""

    def __init__(self, answer: Any, problem: str = "") -> None:
        self.body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.problem = problem
        self.asked: list[Any] = []

    def predict(self, model: str, data: Any, **_: Any) -> Answer:
        self.asked.append(data)
        return Answer(200, "application/json", self.body, "", 0.0123)

    def explain(self, model: str, data: Any, **_: Any) -> Answer:
        self.asked.append(data)
        if self.problem:
            raise AnswerError(self.problem, status=501)
        return Answer(200, "image/png", b"no picture", "", 0.1)


def ask(model: Model, content: bytes = b"x", file: str = "a.png", method: str = "") -> Tryout:
    return try_model(model, "cnn", "1.0", file, content, method=method)  # type: ignore[arg-type]


def test_probabilities_are_sorted_the_likeliest_first() -> None:
    found = ask(Model({"a": 0.1, "b": 0.7, "c": 0.2}))
    assert found.labels == (("b", 0.7), ("c", 0.2), ("a", 0.1))
    assert found.milliseconds == 12


@pytest.mark.parametrize("answer", [[1, 2], {}, {"a": "x"}, {"a": 7}, {"a": -1}, "text", b"\xff"])
def test_what_is_no_classification_is_shown_as_it_is(answer: Any) -> None:
    found = ask(Model(answer))
    assert found.labels == ()
    assert found.text


def test_a_long_answer_is_cut() -> None:
    assert len(ask(Model(list(range(50_000)))).text) < LONGEST_TEXT + 10


def test_an_answer_stands_without_its_explanation() -> None:
    found = ask(Model({"a": 1.0}, problem="pip install captum"), method="default")
    assert found.labels == (("a", 1.0),)
    assert "captum" in found.explanation
    assert found.heat == ""


def test_a_method_goes_beside_the_input() -> None:
    model = Model({"a": 1.0})
    ask(model, b"bytes", method="saliency")
    assert model.asked == [b"bytes", {"data": "Ynl0ZXM=", "method": "saliency"}]
    model.asked.clear()
    ask(model, b'{"x": 1}', "a.JSON", method="occlusion")
    assert model.asked == [{"x": 1}, {"x": 1, "method": "occlusion"}]


def test_a_file_of_json_is_read_and_a_broken_one_is_said() -> None:
    assert read_input("a.json", b"[1, 2]") == [1, 2]
    assert read_input("a.png", b"[1, 2]") == b"[1, 2]"
    for content in (b"{", b"[" * 100_000, b"\xff"):
        with pytest.raises(InputRejectedError, match="no JSON"):
            read_input("a.json", content)
