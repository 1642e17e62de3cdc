from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from marwright.errors import StorageError
from marwright.server.supervision.journal import keep_journal

LOG = logging.getLogger("marwright.server.supervision.supervisor")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_was_said_before_there_was_a_file_is_in_it(tmp_path: Path) -> None:
    told: list[str] = []
    with keep_journal(told.append) as journal:
        LOG.info("early %d", 1)
        journal.open(tmp_path / "logs/supervisor.log", file_bytes=100_000, files=3)
        LOG.error("broken", extra={"detail": "Traceback\n  line"})
    lines = read(tmp_path / "logs/supervisor.log")
    assert [line["message"] for line in lines] == ["early 1", "broken"]
    assert set(lines[0]) == {"time", "level", "thread", "logger", "message"}
    assert lines[1]["exception"] == "Traceback\n  line"
    assert lines[1]["level"] == "ERROR"
    assert told == ["early 1", "broken\n    Traceback\n      line"]


def test_nothing_is_kept_after_the_block(tmp_path: Path) -> None:
    before = logging.getLogger("marwright").handlers[:]
    with keep_journal() as journal:
        journal.open(tmp_path / "one.log", file_bytes=1000, files=2)
        journal.open(tmp_path / "two.log", file_bytes=1000, files=2)
        LOG.info("second")
    LOG.info("after")
    assert logging.getLogger("marwright").handlers == before
    assert read(tmp_path / "one.log") == []
    assert [line["message"] for line in read(tmp_path / "two.log")] == ["second"]


def test_the_same_file_takes_other_sizes(tmp_path: Path) -> None:
    with keep_journal() as journal:
        journal.open(tmp_path / "one.log", file_bytes=100_000, files=2)
        LOG.info("before")
        journal.open(tmp_path / "one.log", file_bytes=2000, files=2)
        assert "before" in (tmp_path / "one.log").read_text()
        for _ in range(30):
            LOG.info("x" * 100)
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())


def test_files_are_rotated(tmp_path: Path) -> None:
    with keep_journal() as journal:
        journal.open(tmp_path / "supervisor.log", file_bytes=2000, files=3)
        for _ in range(100):
            LOG.info("x" * 100)
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert all(path.stat().st_size <= 2000 for path in files)


def test_a_full_disk_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with keep_journal() as journal:
        journal.open(Path("/dev/full"), file_bytes=0, files=1)
        LOG.error("nobody reads this")
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with keep_journal() as journal, pytest.raises(StorageError):
        journal.open(tmp_path / "file/supervisor.log", file_bytes=1000, files=2)
