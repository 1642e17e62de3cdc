from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Answer, Client
from marwright.client.answers import AnswerFile, open_answers
from marwright.client.batches import WAIT, keep_in_flight
from marwright.errors import InputRejectedError, StorageError, UsageError


@pytest.fixture
def echo(service: Any, reply: Any) -> Any:
    """The server answers with what it was sent; 400 for what begins with "bad"."""
    service.decide = lambda asked: reply(400 if asked.body[:3] == b"bad" else 200, asked.body)
    return service


def test_each_input_comes_back_with_its_answer(echo: Any, client: Client) -> None:
    inputs = [str(number).encode() for number in range(50)]
    outcomes = list(client.predict_many("cnn", inputs, in_flight=8, version="2.0"))
    assert sorted(outcome.input for outcome in outcomes) == sorted(inputs)
    for given, answer in outcomes:
        assert isinstance(answer, Answer)
        assert answer.body == given
    assert {asked.path for asked in echo.asked} == {"/predictions/cnn/2.0"}


def test_an_error_is_an_outcome_and_the_others_go_on(
    echo: Any, client: Client, tmp_path: Path
) -> None:
    inputs = [b"1", b"bad", tmp_path / "gone", {"a": {1}}, b"2"]
    found = {str(given): result for given, result in client.predict_many("cnn", inputs)}
    kinds = [type(found[str(given)]) for given in inputs]
    assert kinds == [Answer, InputRejectedError, StorageError, UsageError, Answer]


def test_no_more_are_in_flight_than_allowed(service: Any, client: Client, reply: Any) -> None:
    lock = threading.Lock()
    running, most = 0, 0

    def answer(asked: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return reply()

    service.decide = answer
    assert len(list(client.predict_many("cnn", [b""] * 20, in_flight=3))) == 20
    assert most in {2, 3}


def test_inputs_without_end_are_taken_as_needed(echo: Any, client: Client) -> None:
    taken = 0

    def count() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x"

    outcomes = client.predict_many("cnn", count(), in_flight=4)
    assert len(list(itertools.islice(outcomes, 100))) == 100
    assert taken <= 105
    before = taken
    outcomes.close()
    assert taken == before
    assert len(echo.asked) <= taken


def test_nothing_in_flight_is_a_usage_error(client: Client) -> None:
    with pytest.raises(UsageError, match="in flight"):
        list(client.predict_many("cnn", [b""], in_flight=0))
    assert list(client.predict_many("cnn", [])) == []


def test_waits_and_inputs_are_as_many() -> None:
    steps = list(keep_in_flight("abcde", 2))
    assert steps == ["a", "b", WAIT, "c", WAIT, "d", WAIT, "e", WAIT, WAIT]


LINES = b'{"input": "a", "answer": 1}\n{"input": "b", "error": "no"}\n{"input": "c", "answer": 2}\n'


@pytest.mark.parametrize(
    "torn", [b"", b'{"input": "d", "ans', b'{"input": "d", "answer": 4}', b"{"]
)
def test_a_file_of_answers_is_gone_on_with(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(LINES + torn)
    with open_answers(path) as answers:
        assert answers.answered == {"a", "c"}
        answers.write({"input": "b", "answer": 3})
    lines = path.read_bytes().splitlines()
    assert lines == [LINES.splitlines()[0], LINES.splitlines()[2], b'{"input": "b", "answer": 3}']
    with open_answers(path) as answers:
        assert answers.answered == {"a", "b", "c"}


@pytest.mark.parametrize(
    "line", [b"text\n", b"[]\n", b'{"input": 7, "answer": 1}\n', b'{"a": 1}\n']
)
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(LINES + line + b"torn")
    with pytest.raises(UsageError, match="in line 4"), open_answers(path):
        pass
    assert path.read_bytes() == LINES + line + b"torn"


def test_two_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with open_answers(path), pytest.raises(StorageError, match="in use"), open_answers(path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_full_disk_is_a_storage_error() -> None:
    path = Path("/dev/full")
    with path.open("ab", buffering=0) as stream, pytest.raises(StorageError, match="/dev/full"):
        AnswerFile(frozenset(), path, stream).write({"input": "a", "answer": 1})
