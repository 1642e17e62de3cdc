"""The spool: files of JSON lines that a worker appends to, and something else collects.

A file that is still written is held with flock, which ends with its process however that ends.
What is written is in the kernel's hands at once: a worker that is killed loses none of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Spool"]

FILE_BYTES = 4 << 20
"""Size at which a new file is begun."""
FILE_SECONDS = 30.0
"""Age at which one is: whoever collects can take away only what nobody writes any more."""
MOST_FILES = 2000
"""Of all workers together, where nobody collects."""
MEASURE_SECONDS = 1.0
"""How long a look at the folder counts; what others write meanwhile may come above the bound."""
NAME_CHARACTERS = 80
"""Of model and version in a file's name; its lines have them whole."""


class Spool:
    """The files that one worker writes; see the module."""

    def __init__(self, folder: Path, *, model: str, version: str, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        """Of all files of the folder together, those of other workers too."""
        self._names = [quote(name, safe="")[:NAME_CHARACTERS] for name in (model, version)]
        self._number = 0
        self._file = -1
        self._path = folder
        self._size = 0
        self._began = 0.0
        self._held_files = self._held_bytes = 0
        """Of the folder, as it was looked at last, and what was added here since."""
        self._measured = float("-inf")

    def write(self, lines: Sequence[bytes]) -> None:
        """Append lines, all of them or none.

        Raises:
            OSError: they cannot be written; EDQUOT where the spool is full.
        """
        content = b"".join(lines)
        self.end_old()
        if self._size + len(content) > FILE_BYTES:
            self.close()
        try:
            self._measure()
            if self._held_bytes + len(content) > self._most_bytes:
                raise OSError(errno.EDQUOT, f"the spool holds its {self._most_bytes:,} bytes")
            if self._file < 0:
                if self._held_files >= MOST_FILES:
                    raise OSError(errno.EDQUOT, f"the spool holds its {MOST_FILES:,} files")
                self._open()
            self._append(content)
        except OSError:
            self.close()
            raise

    def end_old(self) -> None:
        """Let the file be collected once it is old."""
        if self._file >= 0 and time.monotonic() - self._began > FILE_SECONDS:
            self.close()

    def close(self) -> None:
        """Let the file be collected, if there is one."""
        if self._file < 0:
            return
        if not self._size:  # nothing could be written to it
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file, self._size = -1, 0

    def leave(self) -> None:
        """Let the file to the process that this one was forked from."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._size = -1, 0

    def _open(self) -> None:
        """Begin a file that nobody has written before: a renewed worker keeps its process id."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        name = "-".join([*self._names, str(os.getpid()), _read_start()])
        while self._file < 0:
            self._path = self._folder / f"{name}-{self._number}.jsonl"
            with contextlib.suppress(FileExistsError):
                self._file = os.open(self._path, flags, mode=0o600)
            self._number += 1
        self._size, self._began = 0, time.monotonic()
        self._held_files += 1
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _append(self, content: bytes) -> None:
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # no half line stays, where that is possible
            raise
        self._size += len(content)
        self._held_bytes += len(content)

    def _measure(self) -> None:
        """Look how many files the folder has, and of how many bytes, unless that was just done."""
        now = time.monotonic()
        if now - self._measured < MEASURE_SECONDS:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sizes = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # collected just now
                    sizes.append(entry.stat(follow_symlinks=False).st_size)
        self._held_files, self._held_bytes, self._measured = len(sizes), sum(sizes), now


def _read_start() -> str:
    """Return when this process was started, in the kernel's ticks: process ids come again."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return str(int(time.time()))
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc(5)
