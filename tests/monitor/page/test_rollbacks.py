from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor.page.conftest import Told

from marwright.errors import MarwrightError, ReleaseError
from marwright.monitor.page.rollbacks import Rollbacks, find_holder
from marwright.monitor.page.sources import Sources
from marwright.release.history import HISTORY_NAME, History, Line

HOLD = """
import sys, time
from pathlib import Path
from marwright.release.history import History
with History(Path(sys.argv[-1])).hold():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def sources(record: Any) -> Sources:
    return Sources(record, Told(record))


@pytest.fixture
def words() -> list[str]:
    """What the process that holds the history was told."""
    return ["release", "store/cnn-2.0.mar"]


@pytest.fixture
def holder(sources: Sources, tmp_path: Path, words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Another process that makes a release, and dies when told to stop."""
    program = tmp_path / "marwright"
    program.write_text(HOLD, encoding="utf-8")
    command = [sys.executable, str(program), *words, str(sources.history.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def begin(sources: Sources) -> None:
    line = Line("now", "cnn-2.0-now", "begun", "cnn", "2.0", "1.0", archive="cnn-2.0.mar")
    History(Path(sources.record.config).with_name(HISTORY_NAME)).add(line)


def test_who_makes_a_release_is_found_while_it_does(
    sources: Sources, holder: subprocess.Popen[str]
) -> None:
    found = find_holder(sources.history)
    assert found is not None
    assert found.pid == holder.pid
    holder.kill()
    holder.wait()
    assert find_holder(sources.history) is None


def test_a_number_that_another_process_has_by_now_is_nobody(sources: Sources) -> None:
    history = sources.history
    lock = history.path.with_name(f".{history.path.name}.lock")
    with subprocess.Popen(["sleep", "60"]) as other:
        lock.write_text(str(other.pid))
        assert find_holder(history) is None
        lock.write_text("x")
        assert find_holder(history) is None
        other.kill()


def test_a_release_of_something_else_is_left_alone(
    sources: Sources, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(ReleaseError, match="another release is being made"):
        Rollbacks(sources).roll_back("cnn")
    assert holder.poll() is None


def test_a_release_that_is_being_made_is_told_to_stop(
    sources: Sources, holder: subprocess.Popen[str]
) -> None:
    begin(sources)
    # It dies without having gone back; there is no server that it could be taken back on.
    with pytest.raises(MarwrightError, match="no server told runs here"):
        Rollbacks(sources).roll_back("cnn")
    assert holder.wait(10) != 0


@pytest.mark.parametrize(
    "words",
    [["rollback", "cnn"], ["release", "other-2.0.mar"], ["watch", "release", "cnn-2.0.mar"]],
)
def test_who_makes_no_release_of_the_model_is_not_told_to_stop(
    sources: Sources, holder: subprocess.Popen[str]
) -> None:
    begin(sources)
    with pytest.raises(ReleaseError, match="wait for its end"):
        Rollbacks(sources).roll_back("cnn")
    with pytest.raises(subprocess.TimeoutExpired):
        holder.wait(0.3)


def test_two_at_once_are_refused(sources: Sources, holder: subprocess.Popen[str]) -> None:
    begin(sources)
    rollbacks = Rollbacks(sources)
    with rollbacks._lock, pytest.raises(ReleaseError, match="being taken back already"):
        rollbacks.roll_back("cnn")
    assert holder.poll() is None
