"""torch-model-archiver's arguments, and what they make of an archive.

Source: model_archiver/{arg_parser,model_packaging_utils}.py of release 0.12.0. What that tool does,
this does, but where it loses data: there `collect` refuses.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marwright.archive.ignore import walk_files
from marwright.archive.manifest import ARCHIVER_HANDLERS, CPP_HANDLERS, MANIFEST_NAME, Manifest
from marwright.archive.member import Member, collect
from marwright.archive.writer import Format, suffix_of
from marwright.errors import ArchiveError

__all__ = ["Arguments", "ArchiveFormat", "Runtime"]

ArchiveFormat = Literal["default", "no-archive", "tgz", "zip-store"]
Runtime = Literal["python", "python3", "LSP"]

FORMATS: dict[ArchiveFormat, Format] = {
    "default": "zip",
    "zip-store": "zip",
    "tgz": "tgz",
    "no-archive": "folder",
}
UNWANTED_FOLDERS = frozenset({"__MACOSX", "__pycache__"})


@dataclass(frozen=True)
class Arguments:
    """What torch-model-archiver's command line says; paths are text, as they were written."""

    model_name: str
    version: str
    handler: str
    """A path to a file, or a stock handler's name."""
    serialized_file: str | None = None
    model_file: str | None = None
    extra_files: str | None = None
    """Comma-separated files, folders and wildcards."""
    runtime: Runtime = "python"
    export_path: str = "."
    archive_format: ArchiveFormat = "default"
    requirements_file: str | None = None
    config_file: str | None = None

    @property
    def format(self) -> Format:
        """The container; zip for `default` and `zip-store`, since nothing is ever compressed."""
        return FORMATS[self.archive_format]

    @property
    def target(self) -> Path:
        """The file or folder to write.

        Raises:
            ArchiveError: the export path is no folder.
        """
        folder = Path(self.export_path)
        if not folder.is_dir():
            raise ArchiveError(
                f"there is no export path {self.export_path}",
                expected="a folder that exists",
                remedy=f"make it first: mkdir -p {self.export_path}",
            )
        return folder / f"{self.model_name}{suffix_of(self.format)}"

    def make_manifest(self, created_on: str) -> Manifest:
        """Return the manifest: names without folders, all else as it was given."""
        return Manifest(
            name=self.model_name,
            version=self.version,
            handler=os.path.basename(self.handler),  # noqa: PTH119  a path or `file:function`
            serialized_file=_base(self.serialized_file),
            model_file=_base(self.model_file),
            config_file=_base(self.config_file),
            requirements_file=_base(self.requirements_file),
            runtime=self.runtime,
            created_on=created_on,
        )

    def find_handler(self) -> Path | None:
        """Return the handler's file; None for a stock one, which TorchServe itself has."""
        name = self.handler
        if self.runtime == "LSP":
            return None if name in CPP_HANDLERS else Path(name.split(":")[0] + ".so")
        if name in ARCHIVER_HANDLERS:
            return None
        file = name.split(":")[0]
        return Path(file if ".py" in file else f"{file}.py")

    def list_members(self) -> tuple[list[Member], list[str]]:
        """Return the members, without the manifest, and notes on what matched nothing.

        Raises:
            ArchiveError: a file is missing, or two files would be one member.
        """
        notes: list[str] = []
        single = (self.model_file, self.serialized_file, self.find_handler())
        more = (self.requirements_file, self.config_file)
        members = [_take(Path(path)) for path in (*single, *more) if path]
        for pattern in (self.extra_files or "").split(","):
            members += self._expand(pattern, notes)
        if any(member.name == MANIFEST_NAME for member in members):
            raise ArchiveError(
                f"two files would be {MANIFEST_NAME} inside the archive",
                found="one of the extra files and the one that marwright writes",
                remedy="leave that file out",
            )
        return collect(members), notes

    @staticmethod
    def _expand(pattern: str, notes: list[str]) -> Iterator[Member]:
        wanted = pattern.strip()
        is_wildcard = "*" in wanted or "?" in wanted or ("[" in wanted and "]" in wanted)
        found = sorted(glob.glob(wanted))  # noqa: PTH207  that tool's own rules for wildcards
        if not found and wanted:
            if not is_wildcard:
                raise ArchiveError(f"there is no file {wanted}", remedy="mend --extra-files")
            notes.append(f"the wildcard {wanted} matches no file")
        for path in map(Path, found):
            yield from _flatten(path) if path.is_dir() else [_take(path)]


def _flatten(folder: Path) -> Iterator[Member]:
    """Yield a folder's content at the top level, without hidden folders and Python's caches."""
    for path in walk_files(folder, skip=_is_unwanted):
        yield Member(path.relative_to(folder).as_posix(), path)


def _is_unwanted(folder: Path) -> bool:
    return folder.name in UNWANTED_FOLDERS or folder.name.startswith(".")


def _take(path: Path) -> Member:
    if not path.is_file():
        found = "a folder" if path.is_dir() else ""
        raise ArchiveError(
            f"there is no file {path}", found=found, remedy="pass a file that exists"
        )
    return Member(path.name, path)


def _base(path: str | None) -> str | None:
    return path.split("/")[-1] if path else None
