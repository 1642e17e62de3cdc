from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest

from marwright.archive.worker import Failure, Model
from marwright.archive.worker.trace import is_interruption
from marwright.cli.main import _terminate
from marwright.errors import HandlerError

Unpacked = Callable[..., Path]

CLASS = (
    "class One:\n    def initialize(self, context): ...\n    def handle(self, data, context): ...\n"
)


@pytest.mark.parametrize(
    ("files", "reason", "place"),
    [
        ("import absent_module", "No module named 'absent_module'", "handler.py:1"),
        ("from json import absent", "cannot import name 'absent' from 'json'", "handler.py:1"),
        (
            {"handler.py": "\nimport beside", "beside.py": "\n\nimport absent_module"},
            "No module named 'absent_module'",
            "beside.py:3",
        ),
        ("class One: ...\nclass Two: ...", "Expected only one class", ""),
        ("x = 1", "Expected only one class", ""),
        ("class One:\n    def initialize(self, context): ...", "Expect handle method", ""),
        ("class One:\n    def handle(self, data, context): ...", "no attribute 'initialize'", ""),
        ("def f(:", "SyntaxError: invalid syntax", "handler.py:1"),
        (CLASS + "1 / 0", "ZeroDivisionError: division by zero", "handler.py:4"),
        ("def handle(data, context):\n    exit(3)", "SystemExit: 3", "handler.py:2"),
        ("def handle(data, context):\n    open('no')", "FileNotFoundError", "handler.py:2"),
        ("def handle(data, context):\n    raise MemoryError", "MemoryError", "handler.py:2"),
    ],
)
def test_a_handler_that_does_not_load_says_why_and_where(
    unpacked: Unpacked, files: dict[str, str] | str, reason: str, place: str
) -> None:
    with pytest.raises(HandlerError) as caught:
        Model(unpacked(files))
    assert reason in str(caught.value)
    assert (f" at {place};" if place else ";") in str(caught.value)
    assert "ts.torch_handler" not in caught.value.detail
    assert "model_loader" not in caught.value.detail
    assert str(unpacked()) not in caught.value.detail


def test_a_missing_module_brings_its_remedy(unpacked: Unpacked) -> None:
    with pytest.raises(HandlerError) as caught:
        Model(unpacked("import absent_module.inner"))
    assert "install what brings 'absent_module'" in caught.value.remedy


def test_a_missing_module_of_a_stock_handler_is_the_one_that_is_named(unpacked: Unpacked) -> None:
    with pytest.raises(HandlerError) as caught:
        Model(unpacked({}, handler="dali_image_classifier"))
    assert "No module named 'dali_image_classifier'" not in caught.value.detail
    assert "During handling" not in caught.value.detail


FAIL = """
import torch
from ts.utils.util import PredictionException
def handle(data, context):
    if data is None:
        return None
    {}
"""


@pytest.mark.parametrize(
    ("statement", "status", "failure"),
    [
        ("raise KeyError('x')", 503, Failure("exception", "KeyError: 'x'", "handler.py:7")),
        (
            "torch.zeros(2) @ torch.zeros(3)",
            503,
            Failure("exception", "RuntimeError: ", "handler.py:7"),
        ),
        (
            "raise PredictionException('no', 429)",
            429,
            Failure("refusal", "PredictionException: no : 429", "handler.py:7"),
        ),
        ("raise MemoryError", 507, Failure("out-of-memory", "MemoryError", "handler.py:7")),
        (
            "raise RuntimeError('CUDA error')",
            507,
            Failure("out-of-memory", "RuntimeError: CUDA error", "handler.py:7"),
        ),
        ("return 'ab'", 503, Failure("not-a-list", "str instead of a list with 2 answers")),
        ("return None", 503, Failure("not-a-list", "NoneType instead of a list with 2 answers")),
        ("return ['a']", 503, Failure("wrong-count", "1 answers to 2 requests")),
        (
            "return ['a', {1}]",
            503,
            Failure("not-serialisable", "answer 1: Object of type set is not JSON serializable"),
        ),
        ("raise SystemExit(3)", 500, Failure("worker-died", "SystemExit: 3", "handler.py:7")),
        (
            "return ['\\ud800'] * 2",
            500,
            Failure("worker-died", "UnicodeEncodeError: 'utf-8' codec can't encode"),
        ),
        (
            "context.set_response_status(200, 'schön', 0); return ['a', 'b']",
            500,
            Failure("worker-died", "a content type or phrase that is not plain ASCII"),
        ),
    ],
)
def test_every_answer_of_a_failed_batch_carries_what_went_wrong(
    unpacked: Unpacked, statement: str, status: int, failure: Failure
) -> None:
    with Model(unpacked(FAIL.format(statement))) as model:
        answers = model.predict([b"", b""])
    for answer in answers:
        assert answer.status == status
        found = answer.failure
        assert found is not None
        assert (found.kind, found.place) == (failure.kind, failure.place)
        assert found.message.startswith(failure.message)
        assert (found.traceback != "") == (failure.place != "" or "Error: " in failure.message)


def test_a_failure_quotes_the_handlers_own_frames(unpacked: Unpacked) -> None:
    with Model(
        unpacked("def handle(data, context):\n    if data: fail()\ndef fail():\n    1 / 0")
    ) as model:
        failure = model.predict([b""])[0].failure
    assert failure is not None
    lines = failure.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if line.startswith("  File")] == [
        '  File "handler.py", line 2, in handle',
        '  File "handler.py", line 4, in fail',
    ]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_refusal_of_the_handlers_own_is_no_failure(unpacked: Unpacked) -> None:
    source = """
def handle(data, context):
    if data:
        context.set_response_status(415, "No", 1)
        return ["a", "b"]
"""
    with Model(unpacked(source)) as model:
        answers = model.predict([b"", b""])
    assert [(answer.status, answer.phrase, answer.failure) for answer in answers] == [
        (200, "", None),
        (415, "No", None),
    ]


def test_the_debugger_is_called_at_the_handlers_frame(unpacked: Unpacked) -> None:
    source = """
import json
def handle(data, context):
    if data:
        local = 7
        json.loads("{")
"""
    seen = []

    def look(trace: TracebackType | None) -> None:
        while trace is not None:
            seen.append((trace.tb_lineno, trace.tb_frame.f_locals.get("local")))
            trace = trace.tb_next

    with Model(unpacked(source), debugger=look) as model:
        failure = model.predict([b""])[0].failure
    assert seen == [(6, 7)]
    assert failure is not None
    assert "json/decoder.py" in failure.traceback  # which the debugger was not shown


def test_the_debugger_is_called_where_loading_fails(unpacked: Unpacked) -> None:
    seen: list[object] = []
    with pytest.raises(HandlerError):
        Model(unpacked("1 / 0"), debugger=seen.append)
    assert len(seen) == 1


def test_torchserve_logs_nothing_that_an_answer_says(
    unpacked: Unpacked, caplog: pytest.LogCaptureFixture
) -> None:
    source = """
import logging
def handle(data, context):
    if data:
        logging.warning("mine")
        return [{1}]
"""
    with caplog.at_level(logging.WARNING), Model(unpacked(source)) as model:
        model.predict([b""])
        model.predict([b"", b""])
    assert [record.message for record in caplog.records] == ["mine", "mine"]


def test_sigterm_is_not_the_handlers_exit() -> None:
    with pytest.raises(SystemExit) as caught:
        _terminate(15, None)
    assert is_interruption(caught.value)
    assert is_interruption(KeyboardInterrupt())
    assert not is_interruption(SystemExit(3))
    assert not is_interruption(ValueError())
