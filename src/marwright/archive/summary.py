"""A summary: what an archive says of itself, read without its large members."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from marwright.archive.container import Entry, printable
from marwright.archive.manifest import Manifest
from marwright.archive.member import BOM_NAME, PROVENANCE_NAME, SAMPLES_NAME, SPEC_NAME
from marwright.archive.reader import Archive
from marwright.errors import ArchiveError, MarwrightError

__all__ = ["flatten", "parse_settings", "read_json", "read_settings", "Summary"]

Document = TypeVar("Document", dict[str, Any], list[Any])
MAX_TEXT_BYTES = 1 << 20
MAX_NAME = 1_000
MAX_VALUES = 10_000
"""Of one document: a few lines of YAML can name more than a memory holds (CVE-2003-1564)."""


@dataclass(frozen=True)
class Summary:
    """What an archive says of itself; nothing of it is verified."""

    path: Path
    format: str
    """`zip`, `tgz` or `folder`."""
    size_bytes: int
    """Of the file, or of all files of a folder."""
    manifest: Manifest
    members: tuple[Entry, ...]
    """Sorted by name, without folders."""
    settings: dict[str, Any]
    """Of model-config.yaml."""
    spec: dict[str, Any]
    """Schema, labels, licence; empty where the archive was not packed from a run or a spec."""
    provenance: dict[str, Any]
    samples: int
    """How many requests travel with it."""
    has_bom: bool
    """Whether a bill of materials does."""
    root_digest: str | None
    """Over the digests of all members, where the archive states it."""
    is_signed: bool
    """Whether a signature stands beside it."""
    signer: str
    """Whom that names; empty where it cannot be read."""
    problems: tuple[str, ...]
    """What could not be read."""

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Summarise an archive of any format.

        Raises:
            ArchiveError: it is no archive. What else is damaged is among `problems`.
        """
        problems: list[str] = []

        def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return read(*arguments)
            except MarwrightError as exc:
                problems.append(str(exc))

        with Archive.open(path) as archive:
            entries = [entry for entry in archive.entries if entry.kind != "folder"]
            return cls(
                path=path,
                format=archive.container.format,
                size_bytes=path.stat().st_size
                if path.is_file()
                else sum(entry.size_bytes for entry in entries),
                manifest=archive.manifest,
                members=tuple(sorted(entries, key=lambda entry: entry.name)),
                settings=attempt(read_settings, archive) or {},
                spec=attempt(read_json, archive, SPEC_NAME, {}) or {},
                provenance=attempt(read_json, archive, PROVENANCE_NAME, {}) or {},
                samples=len(attempt(read_json, archive, SAMPLES_NAME, []) or ()),
                has_bom=BOM_NAME in archive.names,
                root_digest=archive.container.root_digest,
                is_signed=_signature_of(path).is_file(),
                signer=attempt(_find_signer, path) or "",
                problems=tuple(problems),
            )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as `--json` prints them."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        members = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "size_bytes": entry.size_bytes,
                "compressed_bytes": entry.compressed_bytes,
                "sha256": entry.sha256,
            }
            for entry in self.members
        ]
        return {
            **fields,
            "manifest": asdict(self.manifest),
            "members": members,
            "settings": _to_plain(self.settings),
        }


def read_settings(archive: Archive) -> dict[str, Any]:
    """Return what the archive's configuration file holds; empty where there is none.

    Raises:
        ArchiveError: it is no YAML mapping, or one without an end.
    """
    name = archive.manifest.config_file
    if name is None:
        return {}
    text = archive.read(name, limit=MAX_TEXT_BYTES)
    return parse_settings(text, source=f"{printable(name)} of {archive.path}")


def parse_settings(text: bytes, *, source: str) -> dict[str, Any]:
    """Return the mapping of a YAML text; see read_settings."""
    try:
        values = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(values or {}, dict):
            raise TypeError(f"{type(values).__name__} instead of a mapping")
        flatten(values)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as exc:
        raise _broken(source, "YAML", exc) from exc
    return values or {}


def read_json(archive: Archive, name: str, default: Document) -> Document:
    """Return a JSON document of the default's type; the default where there is none.

    Raises:
        ArchiveError: it is no JSON, or of another type.
    """
    if name not in archive.names:
        return default
    text = archive.read(name, limit=MAX_TEXT_BYTES)
    try:
        value = json.loads(text)
        if not isinstance(value, type(default)):
            raise TypeError(f"{type(value).__name__} instead of {type(default).__name__}")
        flatten(value)
    except (ValueError, TypeError, RecursionError) as exc:
        raise _broken(f"{name} of {archive.path}", "JSON", exc) from exc
    return value


def flatten(value: Any) -> dict[str, Any]:
    """Return the values of nested mappings and lists by their dotted names.

    Raises:
        ValueError: they are nested without an end, or more than any document has.
    """
    found: dict[str, Any] = {}
    for count, (name, leaf) in enumerate(_list_leaves(value, "")):
        if count >= MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        found[name] = leaf
    return found


def _list_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of more than {MAX_NAME:,} letters")
    if not isinstance(value, (dict, list)) or not value:
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _list_leaves(item, f"{name}.{key}" if name else str(key))


def _to_plain(value: Any) -> Any:
    """Return a document as JSON can state it: YAML also knows dates, and keys of any kind."""
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_to_plain(item) for item in value]
    return value


def _broken(source: str, kind: str, exc: Exception) -> ArchiveError:
    found = printable(" ".join(str(exc).split())[:200]) or type(exc).__name__
    return ArchiveError(f"{source} cannot be read", expected=kind, found=found)


def _signature_of(path: Path) -> Path:
    # As signature_path does; to import that takes 0.1 s, for pydantic.
    return path.with_name(f"{path.name}.sig")


def _find_signer(path: Path) -> str:
    if not _signature_of(path).is_file():
        return ""
    from marwright.archive.signature import Signature

    return printable(Signature.read(_signature_of(path)).signer)
