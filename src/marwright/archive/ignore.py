"""Which files of a folder stay out of an archive: the patterns of `.marwrightignore`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pathspec

from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["Ignore", "walk_files"]

IGNORE_NAME = ".marwrightignore"
ALWAYS = ("__pycache__/", "__MACOSX/", "*.pyc", ".DS_Store", ".git/", ".*/", IGNORE_NAME)
"""As torch-model-archiver leaves hidden folders out; `!name` in a .marwrightignore takes one in."""


class Ignore:
    """The patterns that hold below one folder, written as in a `.gitignore`."""

    def __init__(self, folder: Path, patterns: tuple[str, ...] = ()) -> None:
        self.folder = folder
        try:
            self._spec = pathspec.GitIgnoreSpec.from_lines((*ALWAYS, *patterns))
        except (ValueError, TypeError) as exc:
            raise ArchiveError(
                f"{folder / IGNORE_NAME} has a pattern that cannot be used",
                expected="patterns as in a .gitignore",
                found=str(exc),
            ) from exc

    @classmethod
    def read(cls, folder: Path) -> Ignore:
        """Read the folder's `.marwrightignore`, if it has one."""
        path = folder / IGNORE_NAME
        with translate_os_errors(f"read {path}"):
            if not path.is_file():
                return cls(folder)
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except ValueError as exc:
                raise ArchiveError(f"cannot read {path}", expected="UTF-8 text") from exc
        return cls(folder, tuple(lines))

    def covers(self, path: Path) -> bool:
        """Whether a file below the folder is left out; one outside never is."""
        try:
            name = path.relative_to(self.folder)
        except ValueError:
            return False
        return self._spec.match_file(name.as_posix() + ("/" if path.is_dir() else ""))


def walk_files(folder: Path, *, skip: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the files below a folder, through links, without going in circles.

    What `skip` is true for is left out, folders with all that is in them.
    """
    pending = [(folder, frozenset[str]())]
    while pending:
        current, above = pending.pop()
        real = os.path.realpath(current)
        if real in above:
            raise ArchiveError(
                f"{current} leads back to a folder above it", remedy="remove the link, or ignore it"
            )
        with translate_os_errors(f"read {current}"):
            entries = sorted(current.iterdir())
        for entry in entries:
            if entry.is_dir():
                if not skip(entry):
                    pending.append((entry, above | {real}))
            elif entry.is_file():
                yield entry
