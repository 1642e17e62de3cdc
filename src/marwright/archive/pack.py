"""Packing: a run, or explicit files, becomes one `.mar` file.

The bytes depend on the content only: sorted names, one fixed time and mode, nothing compressed
(weights hardly shrink, and deflate differs between zlib builds).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marwright.archive.handler import HandlerSource
from marwright.archive.manifest import MANIFEST_NAME, Manifest, format_creation_time
from marwright.archive.run import CLASSES_NAME, Run
from marwright.archive.settings import SETTINGS_NAME, ModelSettings
from marwright.archive.weights import check_torchscript
from marwright.errors import ArchiveError, UsageError
from marwright.storage import translate_os_errors, write_file

__all__ = ["pack_files", "pack_run", "Packed"]

FIXED_TIME = 315_532_800
"""1980-01-01 00:00:00 UTC in epoch seconds: the earliest time that a zip file can state."""
LATEST_TIME = 4_354_819_199
"""2107-12-31 23:59:59 UTC: the latest."""


@dataclass(frozen=True)
class Packed:
    """An archive that was written."""

    path: Path
    name: str
    version: str
    size_bytes: int
    sha256: str
    """Of the whole file."""


def pack_run(
    run: Run,
    *,
    out: Path,
    name: str = "cnn",
    version: str = "1.0",
    handler: str = "image_classifier",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Packed:
    """Pack a run's model with its classes and a handler.

    `out` is the store folder, or the `.mar` file itself. `settings` override ModelSettings.
    """
    values = dict(settings or {})
    own = values.get("handler") or {}
    if isinstance(own, Mapping):  # else ModelSettings says what is wrong with it
        values["handler"] = {"image_size": list(run.image_size), **own}
    return pack_files(
        name=name,
        version=version,
        handler=handler,
        serialized_file=run.model_path,
        extra_files=[run.path / CLASSES_NAME],
        settings=ModelSettings.create(values, source="the model's settings"),
        out=out,
        force=force,
    )


def pack_files(
    *,
    name: str,
    version: str,
    handler: str,
    serialized_file: Path,
    extra_files: Sequence[Path] = (),
    settings: ModelSettings | None = None,
    out: Path,
    force: bool = False,
) -> Packed:
    """Pack explicit files; everything is checked before the first byte is written.

    Raises:
        UsageError: a name or version that no URL can carry, or `out` exists and `force` is false.
        HandlerError: no worker could load the handler.
        ArchiveError: weights that do not load, a missing file, or two files of one name.
        StorageError: the archive cannot be written; nothing half-written is left.
    """
    manifest = Manifest(
        name=name,
        version=version,
        handler="",  # known once the handler is found; name and version are refused before that
        serialized_file=serialized_file.name,
        config_file=SETTINGS_NAME,
        created_on=format_creation_time(_read_time()),
    )
    target = out if out.suffix == ".mar" else out / f"{name}.mar"
    with translate_os_errors(f"write {target}"):
        taken = target.exists()
    if taken and not force:
        other = target.with_name(f"{name}-{version}.mar")
        raise UsageError(
            f"{target} exists",
            remedy="pass --force to replace it"
            + (f", or --out {other} to keep both" if other != target else ""),
        )
    source = HandlerSource.find(handler)
    check_torchscript(serialized_file)
    files = _gather(source, [serialized_file, *extra_files])
    texts = {
        SETTINGS_NAME: (settings or ModelSettings()).to_yaml(),
        MANIFEST_NAME: replace(manifest, handler=source.path.name).to_json(),
    }
    _write(target, files, texts)
    return Packed(target, name, version, target.stat().st_size, _digest(target))


def _read_time() -> int:
    """Return SOURCE_DATE_EPOCH where it is set (reproducible-builds.org), else one fixed time."""
    value = os.environ.get("SOURCE_DATE_EPOCH")
    if value is None:
        return FIXED_TIME
    if not re.fullmatch("[0-9]{1,10}", value) or int(value) > LATEST_TIME:
        raise UsageError(
            "SOURCE_DATE_EPOCH cannot be used",
            expected=f"seconds since 1970, up to {LATEST_TIME}, the last in a zip file",
            found=repr(value),
        )
    return max(int(value), FIXED_TIME)


def _gather(source: HandlerSource, others: Sequence[Path]) -> dict[str, Path]:
    """Map names inside the archive to files, and refuse two files of one name."""
    files: dict[str, Path] = {}
    reserved = {SETTINGS_NAME, MANIFEST_NAME}
    for name, path in [*source.files(), *((path.name, path) for path in others)]:
        if not path.is_file():
            raise ArchiveError(
                f"there is no file {path}", remedy="pass the files to pack as they are"
            )
        if name in files or name in reserved:
            first = files.get(name, "the file that marwright writes")
            raise ArchiveError(
                f"two files would be {name} inside the archive",
                found=f"{first} and {path}",
                remedy="rename one of them",
            )
        files[name] = path
    return files


def _write(target: Path, files: Mapping[str, Path], texts: Mapping[str, bytes]) -> None:
    moment = time.gmtime(_read_time())[:6]
    with write_file(target) as stream, zipfile.ZipFile(stream, "w") as archive:
        for name in sorted({*files, *texts}):
            entry = zipfile.ZipInfo(name, date_time=moment)
            entry.create_system = 3  # Unix, also when packed elsewhere
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            if name in texts:
                archive.writestr(entry, texts[name])
            else:
                _copy(archive, entry, files[name])


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _copy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    with translate_os_errors(f"read {path}"), path.open("rb") as source:
        entry.file_size = os.fstat(source.fileno()).st_size
        with archive.open(entry, "w", force_zip64=entry.file_size >= 1 << 31) as member:
            shutil.copyfileobj(source, member, 1 << 20)
