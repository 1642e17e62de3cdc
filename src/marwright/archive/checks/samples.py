"""Samples: requests that a model must be able to answer, and what it must answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.member import name_problem
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["Sample"]

LIST = "MAR-INF/samples.json"
FOLDER = "MAR-INF/samples"
MAX_BYTES = 16 << 20
"""Of the list, recorded answers included."""


@dataclass(frozen=True)
class Sample:
    """One request, and what is recorded of its answer."""

    path: Path
    """The file with the body."""
    content_type: str | None = None
    status: int | None = None
    """HTTP status that the answer must have; None stands for any below 400."""
    answer: Any = None
    """What the answer must hold, where it is recorded."""

    @property
    def name(self) -> str:
        """How a finding calls it."""
        return self.path.name

    @classmethod
    def of_file(cls, path: Path) -> Sample:
        """Return a file as the client of marwright would send it."""
        is_json = path.suffix == ".json"
        return cls(path, "application/json" if is_json else "application/octet-stream")

    @classmethod
    def read_all(cls, folder: Path) -> list[Sample]:
        """Return the samples that an unpacked archive carries.

        Raises:
            ArchiveError: their list cannot be read.
        """
        path = folder / LIST
        if not path.is_file():
            return []
        with translate_os_errors(f"read {LIST}"), path.open("rb") as stream:
            text = stream.read(MAX_BYTES)
        try:
            return [cls._parse(entry, folder / FOLDER) for entry in json.loads(text)]
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise ArchiveError(
                f"{LIST} cannot be read",
                expected="a list of {file, content_type, status, answer}",
                found=f"{type(exc).__name__}: {exc}",
                remedy="pack the model again",
            ) from exc

    @classmethod
    def _parse(cls, entry: dict[str, Any], folder: Path) -> Sample:
        name, kind, status = entry["file"], entry.get("content_type"), entry.get("status", 200)
        if not isinstance(name, str) or name_problem(name) or not (folder / name).is_file():
            raise ValueError(f"there is no sample {name!r}")
        if not (kind is None or isinstance(kind, str)) or type(status) is not int:
            raise TypeError(f"a sample {name} with {kind!r} and {status!r}")
        return cls(folder / name, kind, status, entry.get("answer"))


def check_files(paths: Iterable[Path]) -> None:
    """Refuse samples that are no files.

    Raises:
        ArchiveError: all that are missing, at once.
    """
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise ArchiveError(
            f"there is no sample {', '.join(absent)}", remedy="pass files that are there"
        )
