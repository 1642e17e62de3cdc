"""What deploy.yaml says of a model's versions, changed as they are released and returned."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from marwright.release.target import Target
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.revision import find_entry, remove_entry, revise, set_default, set_entry

__all__ = ["is_listed", "read_entry", "remove_versions", "restore_default", "write_default"]


def is_listed(target: Target, archive: str) -> bool:
    """Whether deploy.yaml wants an archive served; without a list it wants all of the store."""
    if target.path is None:
        return False
    deployment, _ = Deployment.parse(target.path)
    return any(entry.archive == archive for entry in deployment.list_entries())


def read_entry(target: Target, archive: str, *, like: str) -> ModelEntry:
    """Return what deploy.yaml says of an archive, or else of another one, but for workers."""
    entries = {}
    if target.path is not None:
        deployment, _ = Deployment.parse(target.path)
        entries = {entry.archive: entry for entry in deployment.list_entries()}
    found = entries.get(archive) or entries.get(like)
    values = found.model_dump(exclude_unset=True) if found else {}
    kept = {key: value for key, value in values.items() if key not in {"default", "workers"}}
    return ModelEntry(**{**kept, "archive": archive})


def write_default(
    target: Target, entry: ModelEntry, versions: Collection[str], *, workers: int
) -> None:
    """Make an archive the default one, with an entry of its own if it has none, and apply that.

    `versions`: the archives of all versions of its model.
    """

    def change(document: dict[str, Any]) -> None:
        if find_entry(document, entry.archive) is None:
            values = entry.model_dump(mode="json", exclude_unset=True, exclude={"archive"})
            set_entry(document, entry.archive, {"workers": workers, **values})
        set_default(document, entry.archive, versions)

    _revise(target, change)


def restore_default(
    target: Target, archive: str, candidate: str, versions: Collection[str], *, keep: bool
) -> None:
    """Give an archive the default back, where a candidate got it, and apply that.

    The candidate's entry goes, unless it is to be kept: then it was there before.
    """

    def change(document: dict[str, Any]) -> None:
        place = find_entry(document, candidate)
        if place is None:
            return
        entry = document["models"][place]
        was_default = isinstance(entry, dict) and bool(entry.get("default"))
        if not keep:
            remove_entry(document, candidate)
        if was_default:
            set_default(document, archive, versions)

    _revise(target, change)


def remove_versions(target: Target, archives: Collection[str]) -> None:
    """Take archives out, and apply that."""

    def change(document: dict[str, Any]) -> None:
        for archive in archives:
            remove_entry(document, archive)

    if archives:
        _revise(target, change)


def _revise(target: Target, change: Any) -> None:
    if target.path is not None:
        revise(target.path, change)
        target.apply()
