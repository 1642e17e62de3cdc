"""Model archives (`.mar` files): what goes in, how they are written, how they are read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marwright.archive.archiver import Arguments
    from marwright.archive.handler import HandlerSource
    from marwright.archive.manifest import Manifest
    from marwright.archive.pack import Packed, Preflight, pack_arguments, pack_run, pack_spec
    from marwright.archive.reader import Archive
    from marwright.archive.run import Run
    from marwright.archive.settings import HandlerSettings, ModelSettings
    from marwright.archive.spec import Spec

__all__ = [
    "Archive",
    "Arguments",
    "HandlerSettings",
    "HandlerSource",
    "Manifest",
    "ModelSettings",
    "pack_arguments",
    "pack_run",
    "pack_spec",
    "Packed",
    "Preflight",
    "Run",
    "Spec",
]

_MODULES = {
    "Archive": "reader",
    "Arguments": "archiver",
    "HandlerSettings": "settings",
    "HandlerSource": "handler",
    "Manifest": "manifest",
    "ModelSettings": "settings",
    "pack_arguments": "pack",
    "pack_run": "pack",
    "pack_spec": "pack",
    "Packed": "pack",
    "Preflight": "pack",
    "Run": "run",
    "Spec": "spec",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for (PEP 562): a reader needs nothing of what packs."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
