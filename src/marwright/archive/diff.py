"""What differs between two archives: files, manifest, settings, schema, text, weights by tensor.

Only content counts: neither time nor compression nor whether one is a folder and the other a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from marwright.archive.container import Entry
from marwright.archive.digests import digest_stream
from marwright.archive.limits import check_expansion
from marwright.archive.manifest import MANIFEST_NAME
from marwright.archive.member import PROVENANCE_NAME, SPEC_NAME
from marwright.archive.reader import Archive
from marwright.archive.summary import flatten, read_json, read_settings
from marwright.archive.tensor_diff import WeightsChange, compare_weights
from marwright.archive.tensors import read_weights
from marwright.errors import ArchiveError

__all__ = ["Change", "Difference", "FileChange", "TextChange"]

MAX_TEXT_BYTES = 256 << 10
MAX_LINES = 5_000
"""Of a text that is compared line by line, which takes the square of them at worst."""
WEIGHTS = frozenset({".bin", ".ckpt", ".onnx", ".pt", ".pt2", ".pth", ".safetensors"})
"""How files end of which one expects tensors."""


@dataclass(frozen=True)
class Change:
    """One value of manifest, settings, spec or provenance; None where it is not there."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True)
class FileChange:
    """One file."""

    name: str
    kind: Literal["added", "removed", "changed"]
    before_bytes: int | None
    after_bytes: int | None


@dataclass(frozen=True)
class TextChange:
    """One text file, line by line."""

    name: str
    added: int
    removed: int
    lines: tuple[str, ...]
    """A unified diff."""


@dataclass(frozen=True)
class Difference:
    """What differs between two archives; empty where nothing does."""

    before: Path
    after: Path
    manifest: tuple[Change, ...]
    files: tuple[FileChange, ...]
    settings: tuple[Change, ...]
    spec: tuple[Change, ...]
    provenance: tuple[Change, ...]
    texts: tuple[TextChange, ...]
    weights: tuple[WeightsChange, ...]

    def __bool__(self) -> bool:
        """Return whether anything differs."""
        return bool(self.files)

    @classmethod
    def between(cls, before: Path, after: Path) -> Difference:
        """Compare two archives of any format.

        Members are told apart by the digests and checksums that the archives state, and are read
        only where these are missing or differ.

        Raises:
            ArchiveError: one of them is no archive, or damaged.
        """
        with Archive.open(before) as old, Archive.open(after) as new:
            pair = old, new
            for archive in pair:
                _check_size(archive)
            manifest = _compare_values(*(_read_manifest(archive) for archive in pair))
            files = tuple(
                file
                for file in _compare_files(old, new)
                if file.name != MANIFEST_NAME or manifest  # its time is no content
            )
            changed = [file.name for file in files if file.kind == "changed"]
            return cls(
                before,
                after,
                manifest=manifest,
                files=files,
                settings=_compare_values(*(read_settings(archive) for archive in pair)),
                spec=_compare_values(*(read_json(archive, SPEC_NAME, {}) for archive in pair)),
                provenance=_compare_values(
                    *(read_json(archive, PROVENANCE_NAME, {}) for archive in pair)
                ),
                texts=tuple(
                    change
                    for name in changed
                    if not _is_weights(name, pair) and (change := _compare_text(name, old, new))
                ),
                weights=tuple(
                    _compare_tensors(name, old, new) for name in changed if _is_weights(name, pair)
                ),
            )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as `--json` prints them."""
        return {"equal": not self, **asdict(self)}


def _check_size(archive: Archive) -> None:
    if archive.path.is_file():
        check_expansion(archive.path, sum(entry.size_bytes for entry in archive.entries))


def _read_manifest(archive: Archive) -> dict[str, Any]:
    document = read_json(archive, MANIFEST_NAME, {})
    return {key: value for key, value in document.items() if key != "createdOn"}


def _compare_values(before: dict[str, Any], after: dict[str, Any]) -> tuple[Change, ...]:
    old, new = flatten(before), flatten(after)
    return tuple(
        Change(key, old.get(key), new.get(key))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )


def _compare_files(old: Archive, new: Archive) -> Iterator[FileChange]:
    before, after = _list_files(old), _list_files(new)
    shared = before.keys() & after.keys()
    # Only zip files state checksums of every member.
    unclear = {name for name in shared if None in (before[name].crc32, after[name].crc32)}
    digests = _list_digests(old, unclear), _list_digests(new, unclear)
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if one is None and other is not None:
            yield FileChange(name, "added", None, other.size_bytes)
        elif one is not None and other is None:
            yield FileChange(name, "removed", one.size_bytes, None)
        elif one is not None and other is not None:
            same = digests[0][name] == digests[1][name] if name in unclear else _is_same(one, other)
            if not same:
                yield FileChange(name, "changed", one.size_bytes, other.size_bytes)


def _list_files(archive: Archive) -> dict[str, Entry]:
    return {entry.name: entry for entry in archive.entries if entry.kind != "folder"}


def _is_same(one: Entry, other: Entry) -> bool:
    stated = (one.sha256, other.sha256) if one.sha256 and other.sha256 else (None, None)
    return (one.size_bytes, one.crc32, stated[0]) == (other.size_bytes, other.crc32, stated[1])


def _list_digests(archive: Archive, names: Collection[str]) -> dict[str, str]:
    """Return members' digests, computed where they are not stated.

    In the archive's own order: to go back in a tar file means to begin anew.
    """
    digests = {}
    for entry in archive.entries:
        if entry.name in names:
            digests[entry.name] = entry.sha256 or _digest(archive, entry)
    return digests


def _digest(archive: Archive, entry: Entry) -> str:
    if entry.kind != "file":
        return entry.kind
    with archive.container.open(entry) as stream:
        return digest_stream(stream)


def _is_weights(name: str, archives: Iterable[Archive]) -> bool:
    return PurePosixPath(name).suffix in WEIGHTS or any(
        name == archive.manifest.serialized_file for archive in archives
    )


def _compare_text(name: str, old: Archive, new: Archive) -> TextChange | None:
    """Return what differs between two short texts; None where they are something else."""
    before, after = _read_lines(name, old), _read_lines(name, new)
    if before is None or after is None:
        return None
    lines = tuple(
        difflib.unified_diff(before, after, f"{old.path}/{name}", f"{new.path}/{name}", lineterm="")
    )
    return TextChange(
        name,
        added=sum(line.startswith("+") for line in lines[2:]),
        removed=sum(line.startswith("-") for line in lines[2:]),
        lines=lines,
    )


def _read_lines(name: str, archive: Archive) -> list[str] | None:
    if archive.find(name).size_bytes > MAX_TEXT_BYTES:
        return None
    try:
        lines = archive.read(name).decode().split("\n")
    except UnicodeDecodeError:
        return None
    return lines if len(lines) <= MAX_LINES and not any("\0" in line for line in lines) else None


def _compare_tensors(name: str, old: Archive, new: Archive) -> WeightsChange:
    with (
        old.container.open_seekable(old.find(name)) as one,
        new.container.open_seekable(new.find(name)) as other,
    ):
        try:
            before, after = read_weights(one, name), read_weights(other, name)
        except ArchiveError as exc:
            return WeightsChange(name, "bytes", note=exc.found)
        return compare_weights(name, before, after)
