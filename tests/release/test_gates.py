"""Candidates that are not fit, each stopped at its gate, and gone again without a trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.loads import Reports, find_unanswered

from marwright.release.gates import Agreement, Canary, agree
from marwright.server.sections import CanarySettings, ReleaseSettings

Load = Callable[..., Any]
Record = Callable[..., None]
Pack = Callable[..., Path]
Stop = Callable[..., Reports]

OTHER = {"cat": 0.2, "dog": 0.8}


@pytest.fixture
def stop(site: Any, load: Load, pack: Pack, tmp_path: Path) -> Stop:
    """Return a function that sees a candidate stopped at a step, and no trace of it left."""

    def stop_release(step: str, reason: str, **parts: Any) -> Reports:
        before = site.see()
        traffic = load(site)
        released = site.run("release", pack(tmp_path / "echo-2.0.mar", "2.0", **parts))
        assert released.returncode == 1, released.stderr
        failed = site.read_last("failed")
        assert failed.step.startswith(step)  # how soon is also a matter of the machine
        assert reason in failed.reason
        assert failed.figures or step == "register"
        standing = site.history.list_standings()[-1]
        assert (standing.last.event, standing.last.reason) == ("returned", failed.reason)
        assert site.see() == before
        reports: Reports = traffic.finish()
        return reports

    return stop_release


@pytest.mark.server
def test_one_that_crashes_on_load_is_stopped(stop: Stop, record: Record) -> None:
    reports = stop("register", "KeyError: 'labels'", initialize='raise KeyError("labels")')
    record("a new version that crashes on load", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.server
@pytest.mark.parametrize(
    ("recorded", "step", "reason"),
    [
        ({"cat": 0.9, "dog": 0.1}, "samples", "cat: 0.2 instead of 0.9"),
        (OTHER, "shadow", "the versions agree on 0% of"),
    ],
    ids=["than recorded", "than the version before"],
)
def test_one_that_answers_otherwise_is_stopped(
    stop: Stop, record: Record, recorded: dict[str, float], step: str, reason: str
) -> None:
    reports = stop(step, reason, answer=OTHER, recorded=recorded)
    record("a new version that answers wrongly", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.server
@pytest.mark.slow
def test_one_that_is_ten_times_slower_is_stopped(stop: Stop, record: Record) -> None:
    reports = stop("canary", "times the stable version's", seconds=0.02)
    record("a new version that is ten times slower", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.server
def test_one_that_fails_after_200_requests_is_stopped(
    site: Any, stop: Stop, record: Record
) -> None:
    text = site.text.replace("requests: 30", "requests: 120")  # as many as it takes to see it
    site.deploy.write_text(text, encoding="utf-8")
    reports = stop("canary 50 %", "of its", handle='assert self.asked <= 200, "worn out"')
    record("a new version that works for 200 requests and then fails", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.server
@pytest.mark.slow
def test_without_a_gateway_samples_are_the_gate(
    plain: Any, load: Load, pack: Pack, tmp_path: Path
) -> None:
    before = plain.see()
    traffic = load(plain)
    released = plain.run("release", pack(tmp_path / "echo-2.0.mar", "2.0", answer=OTHER))
    assert released.returncode == 1
    assert "cat: 0.2 instead of 0.9" in released.stderr
    assert plain.see() == before
    assert find_unanswered(traffic.finish()) == {}


def draw(rng: random.Random, count: int, *, errors: float = 0.0, times: float = 1.0) -> Any:
    """Return what a version answered: seconds are log-normal around 10 ms."""
    return [
        (503 if rng.random() < errors else 200, 0.01 * times * rng.lognormvariate(0, 0.3))
        for _ in range(count)
    ]


def judge(seed: int, *, drift: float = 1.0, **candidate: float) -> str:
    """Take a canary through shares of 5, 25 and 50 percent; return why it was stopped.

    `drift`: how many times slower both versions get from step to step.
    """
    rng = random.Random(seed)
    canary = Canary(CanarySettings(), 0.05 / 4)
    for number, share in enumerate((0.05, 0.25, 0.5)):
        canary.begin()
        while canary.count < 40:
            slower = drift**number
            arms = {"stable": draw(rng, round(5 / share) - 5, times=slower)}
            own = {**candidate, "times": candidate.get("times", 1.0) * slower}
            canary.take({**arms, "candidate": draw(rng, 5, **own)})
            if problem := canary.judge().problem:
                return problem
    return ""


def test_equal_versions_pass_however_often_one_looks() -> None:
    assert sum(bool(judge(seed)) for seed in range(20)) <= 1


def test_a_machine_that_gets_slower_stops_no_candidate() -> None:
    assert sum(bool(judge(seed, drift=4.0)) for seed in range(20)) <= 1


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [({"errors": 0.5}, "answers are errors"), ({"times": 10.0}, "times the stable version's")],
)
def test_a_much_worse_candidate_is_stopped(candidate: dict[str, float], reason: str) -> None:
    assert all(reason in judge(seed, **candidate) for seed in range(10))


class Pair:
    """Stands in for a client: the candidate agrees with a given chance."""

    def __init__(self, seed: int, share: float) -> None:
        self._rng = random.Random(seed)
        self._share = share

    def predict(self, model: str, body: Any, *, version: str) -> Any:
        agrees = version == "1.0" or self._rng.random() < self._share
        return type("Answer", (), {"status": 200, "body": b"same" if agrees else b"other"})


@pytest.mark.parametrize(("share", "most"), [(0.92, 0.05), (0.5, 1.0)])
def test_agreement_above_what_is_asked_for_stops_nobody(share: float, most: float) -> None:
    stopped = 0
    for seed in range(100):
        gate = Agreement(ReleaseSettings(), Pair(seed, share), "echo", ("1.0", "2.0"))  # type: ignore[arg-type]
        problems = []
        for _ in range(30):
            gate.ask({})
            problems.append(gate.judge().problem)
        stopped += any(problems)
    assert stopped <= 100 * most
    assert share >= 0.9 or stopped > 80


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((200, b'{"cat": 0.9, "dog": 0.1}'), (200, b'{"cat": 0.6, "dog": 0.4}'), True),
        ((200, b'{"cat": 0.9, "dog": 0.1}'), (200, b'{"cat": 0.4, "dog": 0.6}'), False),
        ((200, b"[1.0, 2.0]"), (200, b"[1.00001, 2.0]"), True),
        ((200, b"[1.0, 2.0]"), (200, b"[1.1, 2.0]"), False),
        ((400, b""), (400, b""), True),
        ((200, b""), (503, b""), False),
    ],
)
def test_answers_agree_in_status_and_label_or_in_all_values(
    one: Any, other: Any, expected: bool
) -> None:
    assert agree(one, other) is expected
