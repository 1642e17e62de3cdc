"""Answers in a file of JSON lines that a later run goes on with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from marwright.errors import UsageError
from marwright.storage import hold_path, translate_os_errors, write_file

__all__ = ["AnswerFile", "open_answers"]


@dataclass(frozen=True)
class AnswerFile:
    """One line for each input: {"input", "answer"}, or {"input", "error"} where it was refused."""

    answered: frozenset[str]
    """The inputs whose answers were there before; refused ones are asked about again."""
    _path: Path
    _stream: IO[bytes]

    def write(self, row: dict[str, Any]) -> None:
        """Add one line, whole or not at all but for the end of the process within it.

        Raises:
            StorageError: the disk is full, or the file is not ours any more.
        """
        line = json.dumps(row).encode() + b"\n"
        with translate_os_errors(f"write {self._path}"):
            self._stream.write(line)


@contextlib.contextmanager
def open_answers(path: Path) -> Iterator[AnswerFile]:
    """Open a file of answers to add to it; a torn last line and refusals are taken out of it.

    Raises:
        StorageError: it cannot be written, or another process writes it.
        UsageError: its lines are of another kind; it is left as it is.
    """
    with hold_path(path):
        answered = frozenset(_repair(path)) if path.exists() else frozenset()
        with translate_os_errors(f"write {path}"):
            stream = path.open("ab", buffering=0)  # each line in one call of the system
        with stream:
            yield AnswerFile(answered, path, stream)


def _repair(path: Path) -> set[str]:
    """Take out of the file what is to be asked again, and return the inputs that stay."""
    answered = set()
    dropped = False
    for line, row in _read_rows(path):
        if line.endswith(b"\n") and "answer" in row:
            answered.add(row["input"])
        else:
            dropped = True
    if dropped:
        with write_file(path) as stream:
            for line, row in _read_rows(path):
                if line.endswith(b"\n") and "answer" in row:
                    stream.write(line)
    return answered


def _read_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line with what it says; {} for a last one that is torn."""
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            fits = isinstance(row, dict) and isinstance(row.get("input"), str)
            if fits and row.keys() & {"answer", "error"}:
                yield line, row
            elif line.endswith(b"\n"):
                raise UsageError(
                    f"{path} is no file of answers",
                    expected='{"input": ..., "answer": ...}',
                    found=f"in line {number} {line[:60].decode('utf-8', 'replace').rstrip()!r}",
                    remedy="choose another file with --out",
                )
            else:
                yield line, {}
