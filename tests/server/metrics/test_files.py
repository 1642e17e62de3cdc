"""What other processes add to a server's metrics."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from marwright.errors import StorageError
from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.files import FOLDER, MOST_BYTES, read_files, write_metrics

DRIFT = 'marwright_drift_detected{model="cnn",version="1.0"} 1\n'


def read(folder: Path) -> tuple[list[str], int]:
    exposition = Exposition()
    failed = read_files(folder, exposition)
    return [sample.name for sample in exposition.list_samples()], failed


def test_a_file_is_read_until_it_is_replaced(tmp_path: Path) -> None:
    write_metrics(tmp_path, "drift", DRIFT)
    assert read(tmp_path) == (["marwright_drift_detected"], 0)
    write_metrics(tmp_path, "drift", "")
    assert read(tmp_path) == ([], 0)
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700


def test_only_the_monitors_metrics_are_taken(tmp_path: Path) -> None:
    write_metrics(tmp_path, "x", "marwright_server_up 1\n" + DRIFT)
    assert read(tmp_path) == (["marwright_drift_detected"], 0)


def test_links_pipes_and_large_files_are_counted_and_not_read(tmp_path: Path) -> None:
    write_metrics(tmp_path, "drift", DRIFT)
    folder = tmp_path / FOLDER
    (folder / "link.prom").symlink_to(folder / "drift.prom")
    os.mkfifo(folder / "pipe.prom")
    with (folder / "large.prom").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    assert read(tmp_path) == (["marwright_drift_detected"], 3)


def test_a_server_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_metrics(tmp_path / "gone", "drift", DRIFT)
    assert read(tmp_path / "gone") == ([], 0)
