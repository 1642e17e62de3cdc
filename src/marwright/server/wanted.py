"""The wanted models: what deploy.yaml says, joined with what the archives say of themselves."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marwright.archive.manifest import Manifest
from marwright.archive.reader import Archive
from marwright.archive.summary import read_settings
from marwright.errors import ArchiveError, MarwrightError
from marwright.server.deployment import Deployment, ModelEntry

__all__ = ["find_setting", "list_wanted", "read_wanted", "sort_versions", "Wanted"]

# What TorchServe 0.12 takes where neither archive nor configuration says (ModelManager, Model). Its
# timeouts are not among them: default_response_timeout and default_startup_timeout are properties.
_DEFAULTS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 100}
_NUMBERS = (*_DEFAULTS, "responseTimeout", "startupTimeout", "jobQueueSize")


@dataclass(frozen=True)
class Wanted:
    """One version of a model as it is to be."""

    name: str
    version: str
    path: Path
    """The archive in the store."""
    entry: ModelEntry
    changes: Mapping[str, Any]
    """Settings, by dotted key, that are to differ from the archive's own."""
    settings: Mapping[str, Any]
    """What holds in the end: the keys of model-config.yaml."""
    default: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Model and version."""
        return self.name, self.version

    @property
    def workers(self) -> int:
        """How many workers it starts with."""
        return int(self.settings["minWorkers"])


def list_wanted(
    deployment: Deployment, *, refused: dict[str, MarwrightError] | None = None
) -> list[Wanted]:
    """Return the wanted versions, of each model the default one first: as TorchServe loads them.

    With `refused`, what is wrong with an archive is put there, under its file name.

    Raises:
        ArchiveError: an archive is missing or broken, or two are of one version.
    """
    wanted: dict[tuple[str, str], Wanted] = {}
    for entry in deployment.list_entries():
        try:
            item = read_wanted(deployment, entry)
            if item.key in wanted:
                raise ArchiveError(
                    f"{wanted[item.key].path.name} and {entry.archive} are both"
                    f" {' '.join(item.key)}",
                    remedy="pack one of them with another --version",
                )
        except MarwrightError as exc:
            if refused is None:
                raise
            refused[entry.archive] = exc
        else:
            wanted[item.key] = item
    items = list(wanted.values())
    return _mark_defaults(sort_versions(items) if deployment.models is None else items)


def read_wanted(deployment: Deployment, entry: ModelEntry) -> Wanted:
    """Return one entry joined with its archive; no version of it is marked as the default."""
    path = deployment.store / entry.archive
    manifest, own = _read_archive(path, _read_stamp(path))
    given = entry.to_settings()
    changes = {key: value for key, value in given.items() if find_setting(own, key) != value}
    flat = {key: value for key, value in given.items() if "." not in key}
    settings = {**_DEFAULTS, **_clean(own), **flat}
    settings["maxWorkers"] = max(settings["minWorkers"], settings["maxWorkers"])
    return Wanted(manifest.name, manifest.version, path, entry, changes, settings)


def _read_stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file; nothing where it cannot be looked at, as its reader says."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


@functools.lru_cache(maxsize=1024)
def _read_archive(path: Path, stamp: tuple[int, ...]) -> tuple[Manifest, Mapping[str, Any]]:
    """Return what an archive says; read once, however often it is asked, until `stamp` changes."""
    del stamp
    with Archive.open(path) as archive:
        return archive.manifest, _read_own(archive)


def _read_own(archive: Archive) -> dict[str, Any]:
    """Return an archive's settings; none where they cannot be read, as TorchServe does."""
    with contextlib.suppress(ArchiveError):
        return read_settings(archive)
    return {}


def sort_versions(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Return them by model, the lowest version first."""
    return sorted(wanted, key=lambda item: (item.name, *_split_version(item.version)))


def _split_version(version: str) -> list[tuple[bool, int, str]]:
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"[._-]", version)
    ]


def _mark_defaults(wanted: list[Wanted]) -> list[Wanted]:
    """Mark of each model the entry that says so, or the first one, and put it first."""
    chosen: dict[str, Wanted] = {}
    for item in wanted:
        if item.name not in chosen or (item.entry.default and not chosen[item.name].entry.default):
            chosen[item.name] = item
    marked = [replace(item, default=chosen[item.name] is item) for item in wanted]
    names = list(dict.fromkeys(item.name for item in wanted))
    return sorted(marked, key=lambda item: (names.index(item.name), not item.default))


def find_setting(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting by its dotted key; None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _clean(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return an archive's settings without the numbers that TorchServe takes for unset."""
    return {
        key: value
        for key, value in own.items()
        if value is not None
        and not (key in _DEFAULTS and (not isinstance(value, int) or value <= 0))
    }
