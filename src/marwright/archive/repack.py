"""Repacking: an archive with some of it changed, the rest copied as it stands.

Members that stay are neither unpacked nor compressed again, and keep the digests that the archive
states. Of an archive that marwright packed comes, byte for byte, what packing the changed inputs
anew would give.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from marwright.archive.checks.modules import Closure
from marwright.archive.container import Entry, printable, translate_zip_errors
from marwright.archive.draft import Draft
from marwright.archive.handler import HandlerSource, find_ours
from marwright.archive.manifest import MANIFEST_NAME, format_creation_time
from marwright.archive.member import (
    BOM_NAME,
    MAR_INF,
    PROVENANCE_NAME,
    SPEC_NAME,
    Member,
    Stretch,
    collect,
)
from marwright.archive.pack import Packed, Preflight, pack_draft
from marwright.archive.provenance import Provenance, Source
from marwright.archive.reader import Archive
from marwright.archive.settings import SETTINGS_NAME, change_settings
from marwright.archive.signature import signature_path
from marwright.archive.spec import Spec
from marwright.archive.summary import flatten, parse_settings, read_json
from marwright.archive.writer import Format, read_epoch
from marwright.archive.zip_layout import data_offset
from marwright.errors import ArchiveError, UsageError
from marwright.storage import translate_os_errors

__all__ = ["Changes", "repack"]

MAX_TEXT_BYTES = 16 << 20
_TRIAL = Preflight()
_DESCRIPTION = (SPEC_NAME, PROVENANCE_NAME, BOM_NAME)
_CARD = ("metadata", "component", "modelCard", "modelParameters")


@dataclass(frozen=True)
class Changes:
    """What is to be another than it was; without any, the archive is rewritten with digests."""

    handler: str | None = None
    """A file, or the name of a handler that comes with marwright."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by dotted key, such as handler.top_k; None takes a setting away."""
    add: Mapping[str, Path] = field(default_factory=dict)
    """Files by their names inside; one that is there is replaced."""
    remove: tuple[str, ...] = ()
    version: str | None = None


def repack(
    path: Path,
    changes: Changes,
    *,
    out: Path | None = None,
    force: bool = False,
    preflight: Preflight | None = _TRIAL,
) -> Packed:
    """Write an archive again with changes; into its own place, which takes `force`, or to `out`.

    Raises:
        ArchiveError: a change that cannot be made, or what pack_spec raises it for.
        HandlerError: no worker could load the new handler.
        StorageError: the archive cannot be written; the old one stays as it was.
    """
    with Archive.open(path) as archive, tempfile.TemporaryDirectory(prefix="marwright-") as name:
        draft = _Repacking(archive, Path(name)).make_draft(changes)
        if (signature := signature_path(out or path)).is_file():
            note = f"{signature} is a signature of the old archive: sign the new one"
            draft = replace(draft, notes=(*draft.notes, note))
        return pack_draft(draft, out=out or path, force=force, preflight=preflight)


class _Repacking:
    """The members of an archive while they are changed."""

    def __init__(self, archive: Archive, scratch: Path) -> None:
        self._archive = archive
        self._scratch = scratch
        self._manifest = replace(archive.manifest, created_on=format_creation_time(read_epoch()))
        self._members = _keep_all(archive, scratch / "members")
        self._changed: set[str] = set()
        """Names of files that did not stand in the archive as they are."""
        self._notes: list[str] = []

    def make_draft(self, changes: Changes) -> Draft:
        """Return the changed archive, not written yet."""
        if changes.version is not None:
            self._manifest = replace(self._manifest, version=changes.version)
        for name, file in changes.add.items():
            self._add(name, file)
        collect(self._members.values())  # else a file may stand where a folder must
        if changes.handler is not None:
            self._replace_handler(changes.handler)
        for name in changes.remove:
            self._remove(name)
        if changes.settings:
            self._set(changes.settings)
        draft = Draft(
            self._manifest,
            tuple(collect(self._members.values())),
            cast("Format", self._archive.container.format),
        )
        if self._members.keys() >= {*_DESCRIPTION}:
            draft = self._describe(draft)
        before = flatten(read_json(self._archive, MANIFEST_NAME, {})).keys()
        if lost := sorted(before - flatten(json.loads(self._manifest.to_json())).keys()):
            self._notes.append(f"left out of the manifest: {printable(', '.join(lost))}")
        return replace(draft, notes=tuple(self._notes))

    def _replace_handler(self, handler: str) -> None:
        """Take another handler with its closure, and leave out what only the old one reached."""
        source = HandlerSource.find(handler)
        old = self._manifest.handler_file
        reached = self._list_closure(old) | {old} if old else set()
        for name, file in source.files():
            if name in self._members and name not in reached:
                self._check_same(name, file)
            self._members[name] = Member(name, file)
            if file.parent != find_ours():
                self._changed.add(name)
        self._manifest = replace(self._manifest, handler=source.path.name)
        needed = self._list_closure(source.path.name) | {source.path.name}
        if self._manifest.model_file:
            needed |= self._list_closure(self._manifest.model_file)
        left_out = sorted((reached & self._members.keys()) - needed - self._list_named())
        for name in left_out:
            del self._members[name]
        if left_out:
            self._notes.append(
                f"left out, since only the old handler used it: {printable(', '.join(left_out))}"
            )

    def _list_closure(self, name: str) -> set[str]:
        """Return the members that a Python file of the archive reaches by imports."""
        if not name.endswith(".py") or name not in self._members:
            return set()
        with (
            translate_os_errors("write a temporary file"),
            tempfile.TemporaryDirectory(dir=self._scratch) as place,
        ):
            folder = Path(place)
            for member in self._members.values():
                if member.name.endswith(".py"):
                    (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / member.name).write_bytes(_read(member))
            siblings = Closure.follow(folder / name).siblings
            reached = tuple(path.relative_to(folder).as_posix() for path in siblings)
        folders = tuple(f"{item}/" for item in reached)
        return {item for item in self._members if item in reached or item.startswith(folders)}

    def _check_same(self, name: str, file: Path) -> None:
        """Refuse a module of the new handler in place of a file that others may use."""
        if _read(self._members[name]) != _read(Member(name, file)):
            raise ArchiveError(
                f"two files would be {name} inside the archive",
                found=f"{self._members[name].origin} and {file}",
                remedy=f"rename one of them, or replace it: --add {file}={name}",
            )

    def _add(self, name: str, file: Path) -> None:
        if name.startswith(MAR_INF):
            raise UsageError(f"{name} cannot be added", found=f"a name in {MAR_INF}")
        if not file.is_file():
            raise ArchiveError(
                f"there is no file {file}",
                found="a folder" if file.is_dir() else "",
                remedy="pass the files to add as they are",
            )
        self._members[name] = Member(name, file)
        self._changed.add(name)

    def _remove(self, name: str) -> None:
        if name == MANIFEST_NAME or name in self._list_named():
            raise ArchiveError(f"{name} cannot be removed", found="a manifest that names it")
        if name not in self._members:
            raise ArchiveError(
                f"{self._archive.path} has no member {name}",
                remedy=f"marwright inspect {self._archive.path} lists what it has",
            )
        del self._members[name]

    def _list_named(self) -> set[str]:
        """Return the members that the manifest names."""
        manifest = self._manifest
        named = (
            manifest.handler_file,
            manifest.serialized_file,
            manifest.model_file,
            manifest.config_file,
            manifest.requirements_file,
        )
        return {name for name in named if name}

    def _set(self, settings: Mapping[str, Any]) -> None:
        name = self._manifest.config_file or SETTINGS_NAME
        before = {}
        if name in self._members:
            before = parse_settings(
                _read(self._members[name]), source=f"{name} of {self._archive.path}"
            )
        values = change_settings(before, settings)
        self._members[name] = Member(name, yaml.safe_dump(values, sort_keys=False).encode())
        self._manifest = replace(self._manifest, config_file=name)

    def _describe(self, draft: Draft) -> Draft:
        """Write spec, provenance and bill of materials anew, as pack does."""
        from marwright.archive.description import describe

        spec, provenance = self._read_spec(), self._read_provenance()
        card = _dig(read_json(self._archive, BOM_NAME, {}), *_CARD)
        kept = (member for member in draft.members if member.name not in _DESCRIPTION)
        members = collect([*kept, Member(SPEC_NAME, spec.describe())])
        return describe(
            replace(draft, members=tuple(members), python=spec.python),
            spec,
            report=_dig(provenance.training, "report"),
            provenance=provenance,
            task=card.get("task"),
            architecture=card.get("modelArchitecture"),
        )

    @property
    def _has_other_weights(self) -> bool:
        return self._manifest.serialized_file in self._changed

    def _read_spec(self) -> Spec:
        values = {**read_json(self._archive, SPEC_NAME, {}), "version": self._manifest.version}
        if self._has_other_weights:
            values.pop("dataset", None)
        return Spec.create(**values)

    def _read_provenance(self) -> Provenance:
        """Return what the archive says of its origin, as far as that still holds."""
        document = read_json(self._archive, PROVENANCE_NAME, {})
        source = _parse_source(document.get("source"), self._changed)
        training = _dig(document, "training") or None
        if training and self._has_other_weights:
            self._notes.append("the provenance tells no training: the weights are other ones")
            training = None
        return Provenance(source, training)


def _keep_all(archive: Archive, scratch: Path) -> dict[str, Member]:
    """Return the members as they stand; those of a tar file have to be unpacked first."""
    if archive.container.format == "folder":
        raise UsageError(f"{archive.path} is a folder", remedy="change the files in it")
    scratch.mkdir()
    members = []
    for number, entry in enumerate(archive.entries):
        if entry.kind == "folder" or entry.name == MANIFEST_NAME:
            continue
        if entry.kind != "file" or entry.encrypted or entry.method not in (0, 8):
            raise ArchiveError(
                f"{archive.path} is not packed again",
                expected="plain files, stored or deflated",
                found=f"{printable(entry.name)}: {entry.kind}, method {entry.method}",
                remedy=f"marwright check {archive.path} lists all that is wrong",
            )
        members.append(Member(entry.name, _keep(archive, entry, scratch / str(number))))
    return {member.name: member for member in collect(members)}


def _keep(archive: Archive, entry: Entry, scratch: Path) -> Stretch | Path:
    if archive.container.format == "tgz":
        with translate_os_errors(f"unpack {archive.path}"), scratch.open("xb") as stream:
            archive.copy(entry, stream)
        return scratch
    with translate_zip_errors(archive.path, entry.name), archive.path.open("rb") as file:
        offset = data_offset(file, entry.header_offset)
    return Stretch(
        path=archive.path,
        offset=offset,
        compressed_bytes=entry.compressed_bytes,
        size_bytes=entry.size_bytes,
        crc32=entry.crc32 or 0,
        method=entry.method,
        sha256=entry.sha256 if re.fullmatch("[0-9a-f]{64}", entry.sha256 or "") else None,
    )


def _parse_source(value: Any, changed: Collection[str]) -> Source | None:
    """Return the commit of an archive, other files told as such that it does not hold."""
    if value is None:
        return None
    other = {Path(name).name for name in changed}
    try:
        lists = [
            {str(name) for name in value[key] if Path(str(name)).name not in other}
            for key in ("modified", "untracked", "outside")
        ]
        lists[-1] |= other
        return Source(str(value["commit"]), *(tuple(sorted(names)) for names in lists))
    except (TypeError, KeyError) as exc:
        raise ArchiveError(f"{PROVENANCE_NAME} cannot be read", found=repr(exc)) from exc


def _dig(document: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping under nested keys; an empty one where there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _read(member: Member) -> bytes:
    """Return a text that is a member."""
    with translate_os_errors(f"read {member.origin}"), member.open() as stream:
        content = stream.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ArchiveError(f"{member.origin} is too long", expected=f"at most {MAX_TEXT_BYTES:,}")
    return content
