from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from marwright.errors import ServerDiedError
from marwright.server.sections import SupervisionSettings
from marwright.server.supervision.attempts import Attempts


def test_pauses_double_up_to_the_longest_and_then_there_are_no_more() -> None:
    settings = SupervisionSettings(restarts=5, longest_pause=3)
    attempts = Attempts()
    assert [attempts.fail(settings) for _ in range(6)] == [0.5, 1, 2, 3, 3, None]


def test_no_restarts_means_the_first_failure_is_the_last() -> None:
    assert Attempts().fail(SupervisionSettings(restarts=0)) is None


def test_a_thousand_failures_have_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts()
    attempts.failures = 999
    assert attempts.fail(SupervisionSettings(restarts=1000)) == 30


@pytest.mark.parametrize(("calm", "pause"), [(59.0, 1.0), (60.0, 0.5)])
def test_only_a_calm_time_makes_a_failure_a_first_one(
    monkeypatch: pytest.MonkeyPatch, calm: float, pause: float
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    attempts = Attempts()
    settings = SupervisionSettings()
    assert attempts.fail(settings) == 0.5
    assert attempts.note(ready=True) is True
    assert attempts.note(ready=True) is None
    now[0] += calm
    assert attempts.fail(settings) == pause
    assert attempts.note(ready=False) is None  # a failure is known to be no readiness


def test_being_no_longer_ready_is_news_once() -> None:
    attempts = Attempts()
    assert [attempts.note(ready=ready) for ready in (False, True, False, False)] == [
        None,
        True,
        False,
        None,
    ]


def test_the_end_has_the_last_workers_words(tmp_path: Any) -> None:
    server = cast(Any, SimpleNamespace(log_file=tmp_path / "none.log", log_offset=0))
    attempts = Attempts()
    attempts.failures = 3
    error = attempts.explain(ServerDiedError("it was killed", detail="last line"), server)
    assert "failed 3 times in a row" in str(error)
    assert "it was killed" in str(error)
    assert error.detail == "last line"
