"""The store: archives under names that say their content, beside the plain ones that servers read.

`cnn.mar` is whatever was added last; `.archives/cnn-1.0-0123456789ab.mar` never changes, so that
there is always something to go back to. The folder is hidden, because TorchServe takes every other
one in its store for a model (`load_models=all`). A plain name is a copy and no link: who writes
through a link, as `cp` and torch-model-archiver do, changes what it leads to
(docs/decisions/0009-store.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from marwright.archive.digests import digest_stream
from marwright.archive.reader import Archive
from marwright.archive.signature import signature_path
from marwright.errors import ArchiveError, StorageError, UsageError
from marwright.storage import translate_os_errors, write_file

__all__ = ["Store", "Stored"]

FOLDER = ".archives"
LOCK = ".lock"
SUFFIXES = {"zip": ".mar", "tgz": ".tar.gz"}
KEY_DIGITS = 12
TAIL_BYTES = 1 << 20
"""At a zip file's end stand the checksums of all its members, at a gzip file's end its own."""

_NAME = re.compile(rf"(?P<label>[^.].*)-(?P<key>[0-9a-f]{{{KEY_DIGITS}}})(\.mar|\.tar\.gz)")


@dataclass(frozen=True)
class Stored:
    """One archive under the name of its content."""

    path: Path
    model: str
    version: str
    key: str
    """The first 12 digits of the file's SHA-256."""
    size_bytes: int
    added: float
    """When it was added last, in epoch seconds."""
    names: tuple[str, ...]
    """Plain names with the same content."""
    signed: bool
    """Whether a signature stands beside it."""

    def is_whole(self) -> bool:
        """Return whether the content is still what the name says; reads all of it."""
        return _digest(self.path).startswith(self.key)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as `--json` prints them."""
        return asdict(self)


class Store:
    """A folder of archives; one process at a time changes it, any number may read it.

    Models in use are told as pairs of name and version: whoever asks servers is not this module.
    """

    def __init__(self, folder: Path) -> None:
        """Raise StorageError where there is no such folder."""
        with translate_os_errors(f"read {folder}"):
            if not folder.is_dir():
                raise StorageError(
                    f"there is no store {folder}",
                    found="a file" if folder.exists() else "",
                    remedy="create the folder, or pass another --store",
                )
        self.folder = folder
        self._kept = folder / FOLDER

    def list(self) -> tuple[Stored, ...]:
        """Return what is stored, sorted by model, the newest first."""
        plain = self.list_plain()
        found = []
        for path in self._list_kept():
            names = tuple(name for name, copy in plain.items() if copy == path)
            with contextlib.suppress(FileNotFoundError):  # removed since
                found.append(_describe(path, names))
        return tuple(sorted(found, key=lambda item: (item.model, -item.added, item.path.name)))

    def list_plain(self) -> dict[str, Path | None]:
        """Return the plain names, each with the stored archive of the same content, if any."""
        kept = self._list_kept()
        with translate_os_errors(f"read {self.folder}"):
            paths = sorted(path for path in self.folder.iterdir() if _is_plain(path))
            return {
                path.name: next((copy for copy in kept if _is_copy(path, copy)), None)
                for path in paths
            }

    def find(self, key: str) -> Stored:
        """Return what is stored under a file name, `MODEL-VERSION`, or the beginning of a digest.

        Raises:
            StorageError: nothing is, or several are.
        """
        found = [
            item
            for item in self.list()
            if key in (item.path.name, f"{item.model}-{item.version}")
            or (len(key) >= 4 and item.key.startswith(key))
        ]
        if len(found) == 1:
            return found[0]
        raise StorageError(
            f"{self.folder} holds {'several archives' if found else 'no archive'} {key}",
            found=", ".join(item.path.name for item in found),
            remedy=f"marwright store list --store {self.folder} shows them",
        )

    def add(self, archive: Path, *, name: str | None = None, force: bool = False) -> Stored:
        """Store an archive, and give its content the plain name `name`; `MODEL.mar` by default.

        What has stood under that name is stored too, if it was not.

        Raises:
            ArchiveError: it is no archive, or the store's policy does not bear it.
            UsageError: no archive can have that plain name.
            StorageError: another model has it and `force` is false, or the store cannot be
                written; nothing half-written is left.
        """
        from marwright.archive.admission import admit, find_policy

        admit(archive, find_policy(self.folder))
        model, _, suffix = _identify(archive)
        name = name or f"{model}{suffix}"
        _check_name(name, suffix)
        plain = self.folder / name
        with self._lock():
            before = _find_model(plain)
            if before not in (None, model) and not force:
                raise StorageError(
                    f"{plain} holds another model",
                    expected=model,
                    found=before or "something else than an archive",
                    remedy="choose another name with --as, or pass --force",
                )
            path = self._keep(archive)
            if not (before and plain.samefile(archive)):
                if before:
                    self._keep(plain)
                _copy(path, plain)
            _copy_signature(path, plain)
            os.utime(path)  # the newest, also where _keep took another one after it
        return next(item for item in self.list() if item.path == path)

    def remove(
        self, key: str, *, in_use: Collection[tuple[str, str]] = (), force: bool = False
    ) -> Path:
        """Remove what `find` finds, or a plain name; return the file that is gone.

        Raises:
            StorageError: there is no such archive, or it is needed and `force` is false: a plain
                name has the same content, it is the last of its model, a server uses it.
        """
        with self._lock():
            plain = self.list_plain()
            if key in plain:
                path = self.folder / key
                reasons = [] if plain[key] else ["its content is not stored"]
                model = _name_model(path)
            else:
                item = self.find(key)
                path, model = item.path, (item.model, item.version)
                reasons = [f"{name} has the same content" for name in item.names]
                if sum(other.model == item.model for other in self.list()) == 1:
                    reasons.append(f"it is the last of {item.model}")
            if model in in_use:
                reasons.append("a server uses it")
            if reasons and not force:
                raise StorageError(
                    f"{path} is needed",
                    found="; ".join(reasons),
                    remedy="pass --force if it shall go all the same",
                )
            _remove(path)
        return path

    def gc(
        self, *, keep: int, in_use: Collection[tuple[str, str]] = (), dry_run: bool = False
    ) -> tuple[Stored, ...]:
        """Remove all but the newest `keep` archives of each model, and what is needed; return it.

        Needed is what a plain name has the content of, and every version in use. With `dry_run`
        nothing is removed.
        """
        with contextlib.nullcontext() if dry_run else self._lock():
            surplus = [
                item
                for _, group in groupby(self.list(), key=lambda item: item.model)
                for item in tuple(group)[keep:]
                if not item.names and (item.model, item.version) not in in_use
            ]
            if not dry_run:
                for item in surplus:
                    _remove(item.path)
                self._remove_leftovers()
        return tuple(surplus)

    def _list_kept(self) -> tuple[Path, ...]:
        with translate_os_errors(f"read {self._kept}"):
            paths = self._kept.iterdir() if self._kept.is_dir() else ()
            return tuple(sorted(path for path in paths if _NAME.fullmatch(path.name)))

    def _keep(self, archive: Path) -> Path:
        """Store an archive's content, if it is not; return where."""
        model, version, suffix = _identify(archive)
        digest = _digest(archive)
        path = self._kept / f"{model}-{version}-{digest[:KEY_DIGITS]}{suffix}"
        found = _digest(path) if path.exists() else None
        if found is not None and found != digest and found.startswith(digest[:KEY_DIGITS]):
            raise StorageError(
                f"two archives would be {path.name}", found=f"{archive} and another one"
            )
        if found != digest:  # not there, or damaged
            _copy(archive, path, mode=0o444)
            if _digest(path) != digest:
                _remove(path)
                raise StorageError(f"{archive} changed while it was copied", remedy="add it again")
        with translate_os_errors(f"write {path}"):
            os.utime(path)
        if signature_path(archive).is_file():
            _copy_signature(archive, path)
        return path

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Wait until no other process changes the store, and keep others waiting meanwhile."""
        with translate_os_errors(f"write {self._kept}"):
            self._kept.mkdir(exist_ok=True)
            with (self._kept / LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    def _remove_leftovers(self) -> None:
        """Remove temporary files of a process that was killed: under the lock nobody writes."""
        for path in self._kept.iterdir():
            if path.name.startswith(".") and path.name != LOCK:
                path.unlink(missing_ok=True)


def _describe(path: Path, names: tuple[str, ...]) -> Stored:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # _list_kept took no other
    status = path.stat()
    model, version = _name_model(path)
    return Stored(
        path=path,
        model=model,
        version=version,
        key=match["key"],
        size_bytes=status.st_size,
        added=status.st_mtime,
        names=names,
        signed=signature_path(path).is_file(),
    )


def _identify(path: Path) -> tuple[str, str, str]:
    """Return an archive file's model, version, and how its name must end."""
    with Archive.open(path) as archive:
        if archive.container.format not in SUFFIXES:
            raise UsageError(f"{path} is a folder", expected="a .mar or .tar.gz file")
        return (
            archive.manifest.name,
            archive.manifest.version,
            SUFFIXES[archive.container.format],
        )


def _name_model(path: Path) -> tuple[str, str]:
    """Return an archive's model and version, or a damaged one's file name."""
    try:
        return _identify(path)[:2]
    except ArchiveError:
        match = _NAME.fullmatch(path.name)
        return (match["label"] if match else path.name), ""


def _is_plain(path: Path) -> bool:
    suffixes = tuple(SUFFIXES.values())
    return path.name.endswith(suffixes) and not path.name.startswith(".") and path.is_file()


def _check_name(name: str, suffix: str) -> None:
    if Path(name).name != name or name.startswith(".") or not name.endswith(suffix):
        raise UsageError(
            "no archive of a store can have this name",
            expected=f"a file name that ends in {suffix}",
            found=repr(name),
        )


def _find_model(plain: Path) -> str | None:
    """Return the model that a plain name holds, "" for something else, None for nothing."""
    if not os.path.lexists(plain):
        return None
    try:
        return _identify(plain)[0]
    except (ArchiveError, UsageError):
        return ""


def _is_copy(path: Path, other: Path) -> bool:
    """Whether two archives state the same content; a damaged one passes for what it was."""
    if not path.exists() or not other.exists() or path.stat().st_size != other.stat().st_size:
        return False
    return _read_tail(path) == _read_tail(other)


def _read_tail(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return stream.read()


def _digest(path: Path) -> str:
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        return digest_stream(stream)


def _copy(source: Path, target: Path, *, mode: int | None = None) -> None:
    """Copy a file; where the file system can, both share their blocks (copy_file_range(2))."""
    with write_file(target) as stream, source.open("rb") as origin:
        with contextlib.suppress(OSError, AttributeError):  # not everywhere
            while os.copy_file_range(origin.fileno(), stream.fileno(), 1 << 30):
                pass
        if os.fstat(stream.fileno()).st_size != os.fstat(origin.fileno()).st_size:
            origin.seek(0)
            stream.seek(0)
            stream.truncate()
            shutil.copyfileobj(origin, stream, 1 << 20)
    if mode is not None:
        with translate_os_errors(f"write {target}"):
            target.chmod(target.stat().st_mode & mode)


def _copy_signature(archive: Path, copy: Path) -> None:
    """Let the copy's signature be the archive's: an old one would not fit."""
    source, target = signature_path(archive), signature_path(copy)
    if source.is_file():
        _copy(source, target)
    else:
        with translate_os_errors(f"remove {target}"):
            target.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    with translate_os_errors(f"remove {path}"):
        path.unlink()
        signature_path(path).unlink(missing_ok=True)
