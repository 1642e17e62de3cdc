"""The folder of archives that TorchServe reads: exactly the wanted ones, with the wanted settings.

TorchServe 0.12 takes an archive's own model-config.yaml over what a registration or its
configuration says, and takes away what it unregisters. So it never sees the store itself: it sees
links into it, and a rewritten copy where deploy.yaml wants other settings.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marwright.archive.admission import admit
from marwright.archive.reader import Archive
from marwright.archive.signature import signature_path
from marwright.server.wanted import Wanted
from marwright.storage import translate_os_errors, write_file

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = ["Staging"]


STAMPS = ".stamps.json"
"""What each staged file was made from; hidden, so that TorchServe passes over it."""

Stamp = dict[str, Any]


class Staging:
    """A private folder of archives; what it holds was admitted by the policy when it came in."""

    def __init__(self, folder: Path, policy: Policy | None) -> None:
        self.folder = folder
        self._policy = policy

    def stage(self, wanted: Wanted) -> str:
        """Bring one version in, in place of what has its name; return its file name.

        Raises:
            ArchiveError: it is broken, the policy refuses it, or its settings cannot be changed.
        """
        file = wanted.path.name
        if self.is_current(wanted):
            return file
        stamp = _read_stamp(wanted)  # before it is judged: a change meanwhile shows next time
        admit(wanted.path, self._policy)
        _check_digests(wanted.path)
        target = self.folder / file
        with translate_os_errors(f"write {target}"):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            fresh = self.folder / f".new-{file}"
            fresh.unlink(missing_ok=True)
            if wanted.changes:
                _rewrite(wanted, fresh)
            else:
                _link(wanted.path, fresh)
            self._stage_signature(wanted)
            fresh.replace(target)
            self._write_stamps({**self._read_stamps(), file: stamp})
        return file

    def _stage_signature(self, wanted: Wanted) -> None:
        """Bring in what `check` needs besides; a rewritten archive has no signature."""
        target = signature_path(self.folder / wanted.path.name)
        target.unlink(missing_ok=True)
        source = signature_path(wanted.path)
        if not wanted.changes and source.exists():
            _link(source, target)

    @contextlib.contextmanager
    def try_stage(self, wanted: Wanted) -> Iterator[str]:
        """Do as `stage` does, and yield the file name; if the block fails, all is as it was."""
        file = wanted.path.name
        if self.is_current(wanted):
            yield file
            return
        stamp = self._read_stamps().get(file)
        target, kept = self.folder / file, self.folder / f".kept-{file}"
        pairs = ((target, kept), (signature_path(target), signature_path(kept)))
        for path, aside in pairs:
            with contextlib.suppress(FileNotFoundError):
                path.replace(aside)
        try:
            yield self.stage(wanted)
        except BaseException:
            self.unstage(file)
            for path, aside in pairs:
                with contextlib.suppress(FileNotFoundError):
                    aside.replace(path)
            if target.exists():
                self._write_stamps({**self._read_stamps(), **({file: stamp} if stamp else {})})
            raise
        for _, aside in pairs:
            aside.unlink(missing_ok=True)

    def check(self, file: str) -> None:
        """Look again at what is staged under a name.

        Raises:
            ArchiveError: it is broken by now, or the policy refuses it.
        """
        admit(self.folder / file, self._policy)
        _check_digests(self.folder / file)

    def unstage(self, file: str) -> None:
        """Take one out, where it is there; the store keeps its archive."""
        stamps = self._read_stamps()
        stamps.pop(file, None)
        with translate_os_errors(f"remove {file}"):
            self._write_stamps(stamps)
            (self.folder / file).unlink(missing_ok=True)
            signature_path(self.folder / file).unlink(missing_ok=True)

    def is_current(self, wanted: Wanted, *, besides: Collection[str] = ()) -> bool:
        """Whether what is staged still is what the store holds, with the wanted settings.

        `besides` are settings that may differ.
        """
        staged, now = self._find_stamps(wanted)
        return staged is not None and _drop(staged, besides) == _drop(now, besides)

    def list_unchanged(self, wanted: Iterable[Wanted]) -> list[str]:
        """Return the file names of those that need not be judged again, whatever their settings."""
        pairs = [(item.path.name, self._find_stamps(item)) for item in wanted]
        return [
            file for file, (staged, now) in pairs if staged and staged["archive"] == now["archive"]
        ]

    def _find_stamps(self, wanted: Wanted) -> tuple[Stamp | None, Stamp]:
        """Return the stamp of what is staged, where it is there, and of what is in the store."""
        staged = self._read_stamps().get(wanted.path.name)
        if not (self.folder / wanted.path.name).exists():
            staged = None
        return staged, _read_stamp(wanted)

    def _read_stamps(self) -> dict[str, Stamp]:
        try:
            stamps: dict[str, Stamp] = json.loads((self.folder / STAMPS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return stamps

    def _write_stamps(self, stamps: dict[str, Stamp]) -> None:
        with write_file(self.folder / STAMPS, durable=False) as stream:
            stream.write(json.dumps(stamps).encode())


def _read_stamp(wanted: Wanted) -> Stamp:
    """Return what tells one state of an archive and its settings from another."""
    with translate_os_errors(f"read {wanted.path}"):
        status = wanted.path.stat()
    identity = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    return {"archive": identity, "changes": json.loads(json.dumps(dict(wanted.changes)))}


def _drop(stamp: Stamp, settings: Collection[str]) -> Stamp:
    changes = {key: value for key, value in stamp["changes"].items() if key not in settings}
    return {**stamp, "changes": changes}


def _check_digests(path: Path) -> None:
    """Refuse an archive of which a member is not what the archive says it is."""
    from marwright.archive.checks.findings import refuse
    from marwright.archive.checks.integrity import verify_digests

    with Archive.open(path) as archive:
        refuse(verify_digests(archive), path)


def _rewrite(wanted: Wanted, target: Path) -> None:
    """Write the archive with other settings; its other members are copied as they stand."""
    from marwright.archive.repack import Changes, repack

    repack(wanted.path, Changes(settings=wanted.changes), out=target, preflight=None)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name: it then outlives the first one; a symbolic one across disks."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())
