"""Reading archives: what a file says of itself, checked before anything trusts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from marwright.archive.container import Container, Entry, open_container, printable
from marwright.archive.limits import check_expansion
from marwright.archive.manifest import MANIFEST_NAME, Manifest
from marwright.archive.member import name_problem
from marwright.archive.streams import copy_at_most
from marwright.errors import ArchiveError, StorageError
from marwright.storage import translate_os_errors, write_file, write_folder

if TYPE_CHECKING:
    from marwright.archive.worker import Model

__all__ = ["Archive", "read_manifest"]

MAX_MANIFEST_BYTES = 1 << 20
MAX_TEXT_BYTES = 16 << 20
"""Of any member that is read into memory: settings, handler, spec."""


@dataclass(frozen=True)
class Archive:
    """An archive that has a readable manifest; use it in a `with` block to read its members.

    Example:
        with Archive.open(Path("cnn.mar")) as archive, archive.load() as model:
            print(model.predict([Path("seven.png")])[0].json())
    """

    path: Path
    manifest: Manifest
    entries: tuple[Entry, ...]
    """Every entry as the file lists it."""
    container: Container

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Read an archive's manifest and member list; nothing is unpacked.

        `path` is a `.mar` or `.tar.gz` file, or a folder with an unpacked archive.

        Raises:
            ArchiveError: no such file, no zip, no manifest, or a manifest naming absent members.
        """
        container = open_container(path)
        try:
            found = [entry for entry in container.entries if entry.name == MANIFEST_NAME]
            if len(found) != 1:
                raise ArchiveError(
                    f"{path} is no model archive",
                    expected=f"a member {MANIFEST_NAME}",
                    found=f"{len(found)} of this name"
                    if found
                    else f"{len(container.entries)} members without it",
                    remedy="pack the model with marwright pack",
                )
            text = container.read(found[0], limit=MAX_MANIFEST_BYTES)
            manifest = Manifest.parse(text, source=str(path))
            archive = cls(path, manifest, container.entries, container)
            _check_members(path, manifest, archive.names)
            return archive
        except BaseException:
            container.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays known."""
        self.container.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members that are files."""
        return tuple(entry.name for entry in self.entries if entry.kind != "folder")

    def find(self, name: str) -> Entry:
        """Return the entry of a member.

        Raises:
            ArchiveError: there is none of this name.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ArchiveError(
            f"{self.path} has no member {name}",
            remedy=f"marwright inspect {self.path} lists what it has",
        )

    def read(self, name: str, *, limit: int = MAX_TEXT_BYTES) -> bytes:
        """Return a member's content; raises ArchiveError where it is longer than `limit` bytes."""
        return self.container.read(self.find(name), limit=limit)

    def extract(self, folder: Path, *, members: tuple[str, ...] = (), force: bool = False) -> Path:
        """Unpack into a new folder, or the named members into an existing one; return it.

        Only plain files with harmless names are written, with mode 0644 less the umask, and never
        more bytes than the archive states.

        Raises:
            ArchiveError: a name that leads outside, a link, a device, or damaged bytes; nothing is
                left behind.
            StorageError: `folder` is not empty and `force` is false, or it holds something else
                than an archive, or it cannot be written.
        """
        wanted = [self.find(name) for name in members] or [
            entry for entry in self.entries if entry.kind != "folder"
        ]
        _check_harmless(self.path, wanted)
        if self.path.is_file():
            check_expansion(self.path, sum(entry.size_bytes for entry in wanted))
        if members and folder.is_dir():
            self._extract_into(folder, wanted, force=force)
            return folder
        with write_folder(folder, replace=_may_replace(folder, force=force)) as fresh:
            for entry in wanted:
                target = fresh / entry.name
                with translate_os_errors(f"write {folder / entry.name}"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as stream:
                        self.copy(entry, stream)
        return folder

    def _extract_into(self, folder: Path, entries: Sequence[Entry], *, force: bool) -> None:
        for entry in entries:
            target = folder / entry.name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise StorageError(
                    f"{target} lies outside of {folder}", found="a link", remedy="remove the link"
                )
            if target.exists() and not force:
                raise StorageError(f"{target} exists", remedy="pass --force to replace it")
        for entry in entries:
            with write_file(folder / entry.name) as stream:
                self.copy(entry, stream)

    def copy(self, entry: Entry, target: IO[bytes]) -> None:
        """Write a member's content to a binary stream, never more than the archive states."""
        with self.container.open(entry) as source:
            doing = f"write a copy of {printable(entry.name)}"
            copy_at_most(source, target, entry.size_bytes, doing=doing)

    def load(self, **options: Any) -> Model:
        """Load the model in this process, as a worker would; for a `with` block."""
        from marwright.archive.worker import Model  # torch: only where a model is wanted

        return Model(self, **options)


def read_manifest(path: Path) -> Manifest:
    """Return an archive's manifest; see Archive.open for what is raised."""
    with Archive.open(path) as archive:
        return archive.manifest


def _may_replace(folder: Path, *, force: bool) -> bool:
    """Whether a folder may give way to an unpacked archive: an empty one, or an older one."""
    with translate_os_errors(f"write {folder}"):
        if not folder.is_dir():
            return False
        if not any(folder.iterdir()):
            return True
        if force and not (folder / MANIFEST_NAME).is_file():
            raise StorageError(
                f"{folder} holds something else than an unpacked archive",
                remedy="choose another folder",
            )
        return force


def _check_harmless(path: Path, entries: Sequence[Entry]) -> None:
    names: set[str] = set()
    for entry in entries:
        problem = name_problem(entry.name) or (f"a {entry.kind}" if entry.kind != "file" else "")
        if entry.encrypted:
            problem = problem or "encrypted"
        if entry.name in names:
            problem = problem or "a second member of this name"
        names.add(entry.name)
        if problem:
            raise ArchiveError(
                f"{path} is not unpacked",
                expected="plain files, each with a name of its own inside the folder",
                found=f"{entry.name!r}: {problem}",
                remedy=f"marwright check {path} lists all that is wrong",
            )


def _check_members(path: Path, manifest: Manifest, names: tuple[str, ...]) -> None:
    named = (
        manifest.handler_file,
        manifest.serialized_file,
        manifest.model_file,
        manifest.config_file,
        manifest.requirements_file,
    )
    absent = [name for name in named if name and name not in names]
    if absent:
        raise ArchiveError(
            f"{path} is not whole",
            expected="every file that its manifest names",
            found=f"no {printable(', '.join(absent))}",
            remedy="pack the model again",
        )
