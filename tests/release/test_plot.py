from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from marwright.gateway.accesses import Access, Arm, Try
from marwright.release.history import Event, Line
from marwright.release.plot import _count, draw_release


def make_line(second: float, event: Event, step: str = "") -> Line:
    time = f"2026-11-28T00:00:{second:06.3f}Z"
    return Line(time, "cnn-2.0-x", event, "cnn", "2.0", "1.0", step=step)


def make_access(second: float, *tries: tuple[Arm, int], model: str = "cnn") -> Access:
    answers = tuple(Try(arm, status, 0.01, ("127.0.0.1:1",)) for arm, status in tries)
    moment = 1795824000.0 + second  # 2026-11-28T00:00:00Z
    return Access(moment, "id", "POST", model, "", tries[0][0], "", 200, 0.01, answers)


LINES = [
    make_line(10, "begun"),
    make_line(11, "step", "canary 50 %"),
    make_line(13, "passed", "default"),
    make_line(15, "rolled back"),
]


def test_an_answer_counts_for_who_gave_it() -> None:
    accesses = [
        make_access(9.5, ("none", 200)),  # before the release: the old version's
        make_access(11.5, ("candidate", 500), ("stable", 200)),
        make_access(13.5, ("none", 200)),  # the candidate is the default by now
        make_access(15.5, ("none", 200)),
        make_access(11.5, ("stable", 200), model="other"),
        make_access(99, ("none", 200)),
    ]
    seconds = _count(LINES, accesses)
    found = {
        number: {arm: [failed for failed, _ in got] for arm, got in second.answers.items() if got}
        for number, second in seconds.items()
    }
    assert {number: arms for number, arms in found.items() if arms} == {
        -1: {"stable": [False]},
        1: {"stable": [False], "candidate": [True]},
        3: {"candidate": [False]},
        5: {"stable": [False]},
    }
    share, errors, p95 = seconds[1].measure("candidate")
    assert (share, errors, p95) == pytest.approx((50, 100, 10))


@pytest.mark.parametrize("accesses", [[], [make_access(11.2, ("stable", 200))]])
def test_it_is_drawn_also_where_little_was_asked(tmp_path: Path, accesses: list[Access]) -> None:
    draw_release(LINES, accesses, tmp_path / "release.png")
    with Image.open(tmp_path / "release.png") as picture:
        assert picture.size[0] > 600
