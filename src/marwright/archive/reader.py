"""Reading archives: what a file says of itself, checked before anything trusts it."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from marwright.archive.manifest import MANIFEST_NAME, Manifest
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["Archive"]

MAX_MANIFEST_BYTES = 1 << 20

# What zipfile raises for bytes that are no zip file, or one that it cannot read: damaged deflate
# streams (zlib.error), names that are no UTF-8 (ValueError), encryption (RuntimeError).
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Archive:
    """A `.mar` file that has a readable manifest."""

    path: Path
    manifest: Manifest
    names: tuple[str, ...]
    """Names of the members, as the archive lists them."""

    @classmethod
    def open(cls, path: Path) -> Archive:
        """Read an archive's manifest and member list; nothing is unpacked.

        Raises:
            ArchiveError: no such file, no zip, no manifest, or a manifest naming absent members.
        """
        with translate_os_errors(f"read {path}"):
            found = path.is_file()
        if not found:
            raise ArchiveError(
                f"there is no archive {path}", remedy="pack one: marwright pack RUN --out STORE"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                names = tuple(archive.namelist())
                if MANIFEST_NAME not in names:
                    raise ArchiveError(
                        f"{path} is no model archive",
                        expected=f"a member {MANIFEST_NAME}",
                        found=f"{len(names)} members without it",
                        remedy="pack the model with marwright pack",
                    )
                with archive.open(MANIFEST_NAME) as member:
                    text = member.read(MAX_MANIFEST_BYTES + 1)
        except ArchiveError:
            raise
        except _UNREADABLE as exc:
            raise ArchiveError(
                f"{path} is no model archive",
                expected="a zip file",
                found=f"{exc}",
                remedy="pack the model again",
            ) from exc
        if len(text) > MAX_MANIFEST_BYTES:
            raise ArchiveError(f"{path} has a manifest of more than {MAX_MANIFEST_BYTES:,} bytes")
        manifest = Manifest.parse(text, source=str(path))
        _check_members(path, manifest, names)
        return cls(path, manifest, names)


def _check_members(path: Path, manifest: Manifest, names: tuple[str, ...]) -> None:
    # A handler is "file.py" or "file.py:function"; without ".py" it is one of TorchServe's own.
    handler = manifest.handler.split(":")[0]
    named = (
        handler if handler.endswith(".py") else None,
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
            found=f"no {', '.join(absent)}",
            remedy="pack the model again",
        )
