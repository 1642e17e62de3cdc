"""releases.jsonl: what is written stays, whatever happens to its last line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.errors import ReleaseError
from marwright.release.history import Event, History, Line, make_line

Run = Callable[..., subprocess.CompletedProcess[str]]


def begin(history: History, model: str = "cnn", version: str = "2.0") -> Line:
    return history.add(
        Line(
            time="2026-01-01T00:00:00.000Z",
            release=f"{model}-{version}",
            event="begun",
            model=model,
            version=version,
            before="1.0",
            archive=f"{model}-{version}.mar",
            digest="ab" * 32,
            before_archive=f"{model}.mar",
            before_digest="cd" * 32,
            user="ada",
        )
    )


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "releases.jsonl")


def test_what_is_added_is_read_back(history: History) -> None:
    assert history.read() == []
    begun = begin(history)
    passed = history.add(make_line(begun, "passed", step="samples", figures={"samples": 3}))
    assert history.read() == [begun, passed]
    assert (passed.archive, passed.before_digest) == (begun.archive, begun.before_digest)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_is_passed_over_and_spoils_no_other(history: History, cut: int) -> None:
    begun = begin(history)
    history.add(make_line(begun, "step", step="register"))
    content = history.path.read_bytes()
    history.path.write_bytes(content[:-cut])
    whole = [begun] if cut > 1 else [begun, history.read()[-1]]
    assert history.read() == whole
    ended = history.add(make_line(begun, "released"))
    assert history.read() == [*whole, ended]


def test_bytes_that_are_no_text_are_passed_over(history: History) -> None:
    begun = begin(history)
    with history.path.open("ab") as stream:
        stream.write(b"\xff\xfe\n[]\n7\n{}\n")
    assert history.read() == [begun]


@pytest.mark.parametrize(
    ("event", "is_open"),
    [("passed", True), ("failed", True), ("released", False), ("returned", False)],
)
def test_a_release_stands_open_until_its_end(history: History, event: Event, is_open: bool) -> None:
    begun = begin(history)
    history.add(make_line(begun, "step", step="canary 5 %"))
    history.add(make_line(begun, event, step="" if not is_open else "canary 5 %"))
    (standing,) = history.list_standings()
    assert standing.is_open is is_open
    assert standing.step == ("canary 5 %" if is_open else "begun")
    assert ("stands at canary 5 %" in standing.describe()) is is_open


def test_two_models_are_told_apart(history: History) -> None:
    begin(history)
    other = begin(history, "words")
    history.add(make_line(other, "released"))
    assert [line.event for line in history.read("words")] == ["begun", "released"]
    assert [item.is_open for item in history.list_standings()] == [True, False]


HOLDER = """
import sys
from pathlib import Path
from marwright.release.history import History
with History(Path(sys.argv[1])).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_releases(history: History) -> None:
    command = [sys.executable, "-c", HOLDER, str(history.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with other.stdin:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(ReleaseError, match=f"process {other.pid} "), history.hold():
                pass
    with history.hold():
        pass


def test_the_command_line_shows_a_history_without_a_server(
    history: History, marwright: Run
) -> None:
    begun = begin(history)
    history.add(make_line(begun, "rolled back", reason="slow at night"))
    begin(history, "words")
    table = marwright("releases", "--history", history.path)
    assert table.returncode == 0, table.stderr
    rows = table.stdout.splitlines()
    assert "rolled back" in next(row for row in rows if " cnn " in row)
    assert "slow at night" in table.stdout
    assert "marwright diff cnn.mar cnn-2.0.mar" in table.stdout
    assert "open: begun" in next(row for row in rows if " words " in row)
    lines = json.loads(
        marwright("releases", "--history", history.path, "--model", "words", "--json").stdout
    )
    assert [line["archive"] for line in lines] == ["words-2.0.mar"]
    assert lines[0]["before_digest"] == "cd" * 32
