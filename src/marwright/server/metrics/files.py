"""What another process adds to a server's metrics: files in its run folder, written whole.

They count as long as their writer lives: it holds a lock, which the kernel lets go of whatever
becomes of the process. Else the last word of a monitoring that was killed would be news for ever.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from typing import IO

from marwright.errors import StorageError
from marwright.server.metrics.exposition import Exposition, read_lines
from marwright.server.metrics.families import find_family
from marwright.storage import lock_file, translate_os_errors, write_file

__all__ = ["FOLDER", "MetricsWriter", "read_files"]

FOLDER = "metrics"
LOCK = ".writer"
LOCK_TRIES = 50
"""With 20 ms between: a reader holds the lock for some microseconds, to see whether it is free."""
MOST_BYTES = 4 << 20
"""Of one file; what is larger is not read."""


class MetricsWriter:
    """Adds to the metrics of the server with this run folder, until it is closed.

    What a writer before it left behind goes.

    Raises:
        StorageError: the folder cannot be written, the server may have gone; or another one writes.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self._folder = run_folder / FOLDER
        with translate_os_errors(f"write {self._folder}"):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = self._take_lock()
            self._clear()

    def write(self, name: str, text: str) -> None:
        """Let the server's metrics say what `text` does, in the text format, until it is replaced.

        Only metrics whose origin is "monitor" are taken.
        """
        with write_file(self._folder / f"{name}.prom") as stream:
            stream.write(text.encode())

    def close(self) -> None:
        """Take all of it away: what nobody renews is not to be taken for news."""
        self._clear()
        (self._folder / LOCK).unlink(missing_ok=True)
        self._lock.close()

    def _take_lock(self) -> IO[bytes]:
        for _ in range(LOCK_TRIES):
            if (stream := lock_file(self._folder / LOCK)) is not None:
                return stream
            time.sleep(0.02)
        raise StorageError(
            f"another process writes {self._folder}",
            remedy="one `marwright monitor up` is enough for a server",
        )

    def _clear(self) -> None:
        for path in self._folder.glob("*.prom"):
            path.unlink(missing_ok=True)


def read_files(run_folder: Path, exposition: Exposition) -> int:
    """Add what the files say; return how many lines or files could not be read."""
    folder = run_folder / FOLDER
    if not _is_written(folder):
        return 0
    failed = 0
    for path in sorted(folder.glob("*.prom")):
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


def _is_written(folder: Path) -> bool:
    """Return whether a writer holds the folder's lock."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


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
