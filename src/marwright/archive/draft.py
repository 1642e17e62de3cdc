"""A draft: manifest and members of an archive that is not written yet."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

from marwright.archive.archiver import Arguments
from marwright.archive.container import Container, Entry
from marwright.archive.handler import HandlerSource
from marwright.archive.ignore import Ignore, walk_files
from marwright.archive.manifest import MANIFEST_NAME, Manifest, format_creation_time
from marwright.archive.member import (
    SAMPLES_FOLDER,
    SAMPLES_NAME,
    SPEC_NAME,
    Member,
    collect,
)
from marwright.archive.run import CLASSES_NAME
from marwright.archive.settings import SETTINGS_NAME, HandlerSettings
from marwright.archive.spec import FileEntry, Spec, expand, is_wildcard
from marwright.archive.writer import Format, read_epoch
from marwright.errors import ArchiveError

__all__ = ["Draft", "REQUIREMENTS_NAME"]

REQUIREMENTS_NAME = "requirements.txt"


@dataclass(frozen=True)
class Draft:
    """What an archive is to hold."""

    manifest: Manifest
    members: tuple[Member, ...]
    """Sorted by name, without the manifest."""
    format: Format = "zip"
    python: str | None = None
    """Python that the handler must be valid in; the running one where none is declared."""
    notes: tuple[str, ...] = field(default=())
    """What the author should know, though nothing is wrong."""

    @classmethod
    def from_arguments(cls, arguments: Arguments) -> Draft:
        """Gather what torch-model-archiver would, from its own arguments."""
        manifest = arguments.make_manifest(format_creation_time(read_epoch()))
        members, notes = arguments.list_members()
        return cls(manifest, tuple(members), arguments.format, notes=tuple(notes))

    @classmethod
    def from_spec(cls, spec: Spec, folder: Path) -> Draft:
        """Gather what a spec names; its relative paths start in `folder`.

        Raises:
            HandlerError: no worker could load the handler.
            ArchiveError: a file is missing or has no place inside, or two would be one member.
        """
        source = HandlerSource.find(
            spec.handler if not spec.handler.endswith(".py") else str(folder / spec.handler)
        )
        requirements = _requirements(spec, folder)
        manifest = Manifest(
            name=spec.name,
            version=spec.version,
            handler=source.path.name,
            serialized_file=_base(spec.model),
            model_file=_base(spec.architecture),
            config_file=SETTINGS_NAME,
            requirements_file=requirements[0].name if requirements else None,
            created_on=format_creation_time(read_epoch()),
        )
        members = [
            *(Member(name, path) for name, path in source.files()),
            *(Member(Path(name).name, _find(folder / name)) for name in _weights(spec)),
            *requirements,
            *_labels(spec, folder),
            *_files(spec, folder),
            *_samples(spec, folder),
            Member(SETTINGS_NAME, _settings(spec)),
            Member(SPEC_NAME, spec.describe()),
        ]
        if any(member.name == MANIFEST_NAME for member in members):
            raise ArchiveError(f"{MANIFEST_NAME} is written by marwright", remedy="leave it out")
        return cls(manifest, tuple(collect(members)), python=spec.python)

    def extend(self, *members: Member) -> Draft:
        """Return the draft with further members."""
        return replace(self, members=tuple(collect([*self.members, *members])))

    def open(self) -> Container:
        """Return the draft as if it were written, for checks that look into members."""
        return _Unwritten(self.finish())

    def finish(self) -> list[Member]:
        """Return all members, the manifest among them, sorted."""
        return collect([*self.members, Member(MANIFEST_NAME, self.manifest.to_json())])


class _Unwritten(Container):
    """Members that are not in any file yet."""

    format = "folder"

    def __init__(self, members: Sequence[Member]) -> None:
        self.path = Path()
        self._members = {member.name: member for member in members}
        self.entries = tuple(Entry(name, size, size) for name, size in self._measure())

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        with self._members[entry.name].open() as stream:
            yield stream

    def is_in_place(self, entry: Entry) -> bool:
        return True

    def open_seekable(self, entry: Entry) -> contextlib.AbstractContextManager[IO[bytes]]:
        return self.open(entry)

    def _measure(self) -> Iterator[tuple[str, int]]:
        for name, member in self._members.items():
            with member.open() as stream:
                yield name, stream.seek(0, os.SEEK_END)


def _base(name: str | None) -> str | None:
    return Path(name).name if name else None


def _weights(spec: Spec) -> Iterator[str]:
    yield from (name for name in (spec.model, spec.architecture) if name)


def _find(path: Path) -> Path:
    if not path.is_file():
        raise ArchiveError(
            f"there is no file {path}",
            found="a folder" if path.is_dir() else "",
            remedy="pass the files to pack as they are",
        )
    return path


def _requirements(spec: Spec, folder: Path) -> list[Member]:
    if isinstance(spec.requirements, str):
        path = _find(folder / spec.requirements)
        return [Member(path.name, path)]
    text = "".join(f"{line}\n" for line in spec.requirements)
    return [Member(REQUIREMENTS_NAME, text.encode())] if text else []


def _labels(spec: Spec, folder: Path) -> list[Member]:
    if isinstance(spec.labels, str):
        return [Member(CLASSES_NAME, _find(folder / spec.labels))]
    if spec.labels is None:
        return []
    return [Member(CLASSES_NAME, json.dumps(spec.labels, indent=2).encode() + b"\n")]


def _settings(spec: Spec) -> bytes:
    limits = spec.limits.model_dump(exclude_none=True)
    backend = {"backend": spec.backend} if spec.backend != "torchscript" else {}
    own = spec.settings.handler.model_dump(exclude_none=True)
    handler = HandlerSettings.model_validate({**backend, **limits, **own})
    return spec.settings.model_copy(update={"handler": handler}).to_yaml()


def _files(spec: Spec, folder: Path) -> Iterator[Member]:
    ignore = Ignore.read(folder)
    for file in spec.files:
        if is_wildcard(file.source):
            for path in expand(folder, file.source):
                if path.is_file() and not ignore.covers(path):
                    name = os.path.relpath(path, folder)
                    yield Member(_place(name, file, path.name), path)
        elif (path := folder / file.source).is_dir():
            place = PurePosixPath(_keep(file.source) if file.target is None else file.target)
            for item in walk_files(path, skip=ignore.covers):
                if not ignore.covers(item):
                    yield Member((place / PurePosixPath(item.relative_to(path))).as_posix(), item)
        else:
            yield Member(_place(file.source, file, path.name), _find(path))


def _place(name: str, file: FileEntry, base: str) -> str:
    """Return the name inside: where the entry says, or where the file stands below the spec."""
    if file.target is None:
        return _keep(name)
    return f"{file.target}{base}" if file.target.endswith("/") else file.target


def _keep(name: str) -> str:
    normal = PurePosixPath(os.path.normpath(name))
    if normal.is_absolute() or ".." in normal.parts:
        raise ArchiveError(
            f"{name} has no place inside the archive of its own",
            found="a path that leads out of the spec's folder",
            remedy=f"say its place: {{from: {name}, to: {normal.name}}}",
        )
    return "" if normal == PurePosixPath(".") else normal.as_posix()


def _samples(spec: Spec, folder: Path) -> Iterator[Member]:
    listed = []
    for sample in spec.samples:
        for path in expand(folder, sample.file) or [folder / sample.file]:
            yield Member(SAMPLES_FOLDER + path.name, _find(path))
            listed.append({**sample.model_dump(mode="json", exclude_none=True), "file": path.name})
    if listed:
        yield Member(SAMPLES_NAME, json.dumps(listed, indent=2).encode() + b"\n")
