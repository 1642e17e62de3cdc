"""Which workers ended unasked, and their CPU time."""

from __future__ import annotations

import os
from dataclasses import replace

from marwright.client.results import ModelVersion, Worker
from marwright.server.state import State
from marwright.server.supervision.census import Census

KEY = ("cnn", "1.0")
CNN = ModelVersion(*KEY, "cnn.mar", 1, 1, 1, 1, True, ())


def take(census: Census, *pids: int) -> int:
    workers = tuple(Worker(str(9000 + i), "READY", pid, 0) for i, pid in enumerate(pids))
    census.take(State({KEY: replace(CNN, workers=workers)}, {"cnn": "1.0"}))
    return census.restarts[KEY]


def test_a_worker_with_another_process_was_restarted() -> None:
    census = Census()
    assert take(census, 1, 2) == 0
    assert take(census, 1, 3) == 1


def test_a_worker_that_is_away_for_some_looks_counts_once() -> None:
    census = Census()
    take(census, 1)
    assert take(census, -1) == 1
    assert take(census, -1) == 1
    assert take(census, 4) == 1


def test_what_was_asked_for_is_no_restart() -> None:
    census = Census()
    take(census, 1, 2)
    with census.expect_ends(KEY):
        assert take(census, 1, 3) == 0
    assert take(census, 1, 4) == 0  # seen only afterwards
    assert take(census, 1) == 0  # scaled down
    assert take(census, 5) == 1
    census.forget()  # the server was started again
    assert take(census, 7) == 1


def test_cpu_time_only_grows() -> None:
    census = Census()
    take(census, os.getpid())
    first = census.cpu_seconds[KEY]
    assert first > 0
    take(census, -1)
    take(census, os.getpid())
    assert census.cpu_seconds[KEY] >= first
