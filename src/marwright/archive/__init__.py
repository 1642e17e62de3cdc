"""Model archives (`.mar` files): what goes in, how they are written, how they are read."""

from __future__ import annotations

from marwright.archive.handler import HandlerSource
from marwright.archive.manifest import Manifest
from marwright.archive.pack import Packed, pack_files, pack_run
from marwright.archive.reader import Archive
from marwright.archive.run import Run
from marwright.archive.settings import HandlerSettings, ModelSettings

__all__ = [
    "Archive",
    "HandlerSettings",
    "HandlerSource",
    "Manifest",
    "ModelSettings",
    "pack_files",
    "pack_run",
    "Packed",
    "Run",
]
