"""The access log: half lines, lines of another kind, several replicas, rotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marwright.gateway.accesses import AccessLog, Try, list_tries


def write_line(**changes: Any) -> bytes:
    line = {
        "time": 1000.5,
        "status": 200,
        "seconds": 0.25,
        "request": "id",
        "method": "POST",
        "model": "cnn",
        "asked": "",
        "arm": "stable",
        "version": "1.0",
        "upstream_status": "200",
        "upstream_seconds": "0.2",
        "upstream": "127.0.0.1:1",
    }
    return json.dumps({**line, **changes}).encode() + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.log"


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(text)


def test_a_log_that_is_not_there_yet_is_empty(path: Path) -> None:
    with AccessLog(path.parent) as log:
        assert log.read() == []
        append(path, write_line())
        assert len(log.read()) == 1


def test_half_a_line_is_read_once_it_is_whole(path: Path) -> None:
    line = write_line()
    with AccessLog(path.parent) as log:
        append(path, line + line[:40])
        assert len(log.read()) == 1
        assert log.read() == []
        append(path, line[40:])
        assert len(log.read()) == 1
        assert log.read() == []


@pytest.mark.parametrize(
    "broken", [b"\n", b"{}\n", b"[1]\n", b'{"time":\n', b"\xff\n", write_line(status="x")]
)
def test_a_broken_line_is_passed_over(path: Path, broken: bytes) -> None:
    append(path, broken + write_line())
    with AccessLog(path.parent) as log:
        assert len(log.read()) == 1


def test_nothing_is_lost_over_two_rotations_between_reads(path: Path) -> None:
    with AccessLog(path.parent) as log:
        append(path, write_line(request="1"))
        assert [access.request for access in log.read()] == ["1"]
        append(path, write_line(request="2"))
        with path.open("ab") as late:
            path.replace(path.with_name("access.log.1"))
            append(path, write_line(request="4"))
            late.write(write_line(request="3"))
        path.replace(path.with_name("access.log.1"))
        append(path, write_line(request="5"))
        assert [access.request for access in log.read()] == ["2", "3", "4", "5"]
        assert log.read() == []


def test_what_was_put_aside_is_still_read(path: Path) -> None:
    append(path.with_name("access.log.1"), write_line(request="1"))
    append(path, write_line(request="2"))
    with AccessLog(path.parent) as log:
        assert [access.request for access in log.read()] == ["1", "2"]
        # A worker that has not opened the new file yet.
        append(path.with_name("access.log.1"), write_line(request="late"))
        assert [access.request for access in log.read()] == ["late"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("503, 200", "0.001, 0.2", "a:1, b:2"), [Try("stable", 200, 0.2, ("a:1", "b:2"))]),
        (("502", "-", "a:1"), []),
        (("-", "0.5", "a:1"), []),  # the client did not wait
        (("", "", ""), []),
    ],
)
def test_replicas_and_tries_are_told_apart(
    path: Path, columns: tuple[str, str, str], expected: list[Try]
) -> None:
    names = ("upstream_status", "upstream_seconds", "upstream")
    append(path, write_line(**dict(zip(names, columns, strict=True))))
    with AccessLog(path.parent) as log:
        assert list(log.read()[0].tries) == expected


def test_arms_are_asked_for_by_model_and_moment(path: Path) -> None:
    fallen = {
        "arm": "candidate",
        "upstream_status": "502, 500 : 200",
        "upstream_seconds": "0.000, 0.125 : 0.250",
        "upstream": "a:1, b:2 : a:1",
    }
    append(path, write_line(time=1.0, **fallen) + write_line(time=2.0, **fallen))
    append(path, write_line(time=2.0, model="other", **fallen))
    append(path, write_line(time=2.0, arm="", version="", asked="3"))
    with AccessLog(path.parent) as log:
        accesses = log.read()
    assert accesses[3].arm == "none"
    assert accesses[3].asked == "3"
    (candidate,) = list_tries(accesses, "cnn", "candidate", since=1.5)
    assert (candidate.status, candidate.seconds, candidate.failed) == (500, 0.125, True)
    assert candidate.replicas == ("a:1", "b:2")
    assert [one.failed for one in list_tries(accesses, "cnn", "stable")] == [False, False]
