"""What other processes add to a server's metrics: files in its run folder, written whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from marwright.server.metrics.exposition import Exposition, read_lines
from marwright.server.metrics.families import find_family
from marwright.storage import translate_os_errors, write_file

__all__ = ["FOLDER", "read_files", "write_metrics"]

FOLDER = "metrics"
MOST_BYTES = 4 << 20
"""Of one file; what is larger is not read."""


def write_metrics(run_folder: Path, name: str, text: str) -> None:
    """Let the metrics of a server say what `text` does, in the text format, until it is replaced.

    Only metrics whose origin is "monitor" are taken.

    Raises:
        StorageError: the folder cannot be written; the server may have gone.
    """
    folder = run_folder / FOLDER
    with translate_os_errors(f"write {folder}"):
        folder.mkdir(mode=0o700, exist_ok=True)
    with write_file(folder / f"{name}.prom") as stream:
        stream.write(text.encode())


def read_files(run_folder: Path, exposition: Exposition) -> int:
    """Add what the files say; return how many lines or files could not be read."""
    failed = 0
    for path in sorted((run_folder / FOLDER).glob("*.prom")):
        text = _read(path)
        if text is None:
            failed += 1
            continue
        samples, broken = read_lines(text)
        families = [find_family(sample.name) for sample in samples]
        exposition.take(
            sample
            for sample, family in zip(samples, families, strict=True)
            if family is None or family.origin == "monitor"
        )
        failed += broken
    return failed


def _read(path: Path) -> str | None:
    """Return the content of a plain file of bounded size, without waiting for a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
                return None
            return stream.read(MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
