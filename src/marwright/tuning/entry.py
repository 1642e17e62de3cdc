"""The entry of one archive in a deploy.yaml, set to what was found the best."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marwright.errors import UsageError
from marwright.server.deployment import Deployment
from marwright.server.revision import revise, set_entry

__all__ = ["check_entry", "write_entry"]


def check_entry(path: Path, archive: Path) -> Deployment | None:
    """Return the deployment at `path`, or None where there is none yet.

    Raises:
        ConfigurationError: it cannot be used as it is.
        UsageError: its store is not the archive's folder.
    """
    if not path.exists():
        return None
    deployment = Deployment.read(path)
    if deployment.store.resolve() != archive.resolve().parent:
        raise UsageError(
            f"{archive} is not in the store of {path}",
            expected=f"an archive in {deployment.store}",
            remedy="name another file: --write FILE, or pass --no-write",
        )
    return deployment


def write_entry(path: Path, archive: Path, values: Mapping[str, int]) -> str:
    """Set keys of an archive's entry, and return what else there is to say of it, or "".

    The file is made where there is none. Of one that is there only these keys change.

    Raises:
        ConfigurationError: it could not be used; the file is as it was before.
    """
    store = ""
    if check_entry(path, archive) is None:
        store = os.path.relpath(archive.resolve().parent, path.resolve().parent)

    def change(document: dict[str, Any]) -> None:
        if store:
            document["store"] = store
        set_entry(document, archive.name, values)

    revise(path, change)
    has_others = store and len(list(archive.parent.glob("*.mar"))) > 1
    return f"other archives of {store} are not served by it" if has_others else ""
