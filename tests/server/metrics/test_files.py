"""What other processes add to a server's metrics."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from marwright.errors import StorageError
from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.files import FOLDER, MOST_BYTES, MetricsWriter, read_files

DRIFT = 'marwright_drift_detected{model="cnn",version="1.0"} 1\n'


def read(folder: Path) -> tuple[list[str], int]:
    exposition = Exposition()
    failed = read_files(folder, exposition)
    return [sample.name for sample in exposition.list_samples()], failed


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[MetricsWriter]:
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
        yield writer


def test_a_file_is_read_until_it_is_replaced(tmp_path: Path, writer: MetricsWriter) -> None:
    writer.write("drift", DRIFT)
    assert read(tmp_path) == (["marwright_drift_detected"], 0)
    writer.write("drift", "")
    assert read(tmp_path) == ([], 0)
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700


def test_only_the_monitors_metrics_are_taken(tmp_path: Path, writer: MetricsWriter) -> None:
    writer.write("x", "marwright_server_up 1\n" + DRIFT)
    assert read(tmp_path) == (["marwright_drift_detected"], 0)


def test_links_pipes_and_large_files_are_counted_and_not_read(
    tmp_path: Path, writer: MetricsWriter
) -> None:
    writer.write("drift", DRIFT)
    folder = tmp_path / FOLDER
    (folder / "link.prom").symlink_to(folder / "drift.prom")
    os.mkfifo(folder / "pipe.prom")
    with (folder / "large.prom").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    assert read(tmp_path) == (["marwright_drift_detected"], 3)


def test_what_a_writer_said_goes_with_it(tmp_path: Path, writer: MetricsWriter) -> None:
    writer.write("drift", DRIFT)
    writer.close()
    assert read(tmp_path) == ([], 0)
    assert not [*(tmp_path / FOLDER).iterdir()]


def test_what_a_writer_said_that_was_killed_counts_no_more(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from marwright.server.metrics.files import MetricsWriter

writer = MetricsWriter(Path({str(tmp_path)!r}))
writer.write("drift", {DRIFT!r})
print("written", flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
            assert read(tmp_path) == (["marwright_drift_detected"], 0)
            with pytest.raises(StorageError, match="another process writes"):
                MetricsWriter(tmp_path)
        finally:
            process.kill()
    assert read(tmp_path) == ([], 0)
    with contextlib.closing(MetricsWriter(tmp_path)):
        assert not [*(tmp_path / FOLDER).glob("*.prom")]


def test_a_reader_keeps_no_writer_from_beginning(tmp_path: Path) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            read(tmp_path)

    readers = [threading.Thread(target=look) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(100):
            MetricsWriter(tmp_path).close()
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_a_server_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        MetricsWriter(tmp_path / "gone")
    assert read(tmp_path / "gone") == ([], 0)
