"""A member: one file of an archive, by its name inside and where its bytes come from."""

from __future__ import annotations

import contextlib
import filecmp
import io
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from marwright.archive.streams import Window
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["collect", "Member", "name_problem", "Stretch"]

MAR_INF = "MAR-INF/"
"""The folder that belongs to the archive's own description.

Its files are named here, so that a reader knows them without what it takes to write them.
"""
SPEC_NAME = "MAR-INF/spec.json"
SAMPLES_NAME = "MAR-INF/samples.json"
SAMPLES_FOLDER = "MAR-INF/samples/"
PROVENANCE_NAME = "MAR-INF/provenance.json"
BOM_NAME = "MAR-INF/bom.cdx.json"

BLOCK_BYTES = 1 << 20

# A backslash is a folder's end to some unpackers and a letter to others; control characters would
# write to the terminal of whoever lists the archive.
_FORBIDDEN = frozenset("\\") | {chr(code) for code in range(32)} | {chr(127)}


@dataclass(frozen=True)
class Stretch:
    """Bytes that stand in another archive as they are to stand in the new one."""

    path: Path
    offset: int
    """Where the member's data begins in that file."""
    compressed_bytes: int
    size_bytes: int
    crc32: int
    method: int
    """0 stored, 8 deflated."""
    sha256: str | None
    """Of the content, where that archive states it."""

    def open(self) -> IO[bytes]:
        """Return a seekable stream of the content; what is compressed is unpacked for it."""
        if self.method == 0:
            return self._open_packed()
        with translate_os_errors("write a temporary file"), contextlib.ExitStack() as stack:
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            unpacked.writelines(self.read_blocks())
            unpacked.seek(0)
            stack.pop_all()  # whoever reads it closes it
            return unpacked

    def read_blocks(self) -> Iterator[bytes]:
        """Yield the content, never more of it than the archive states.

        Raises:
            ArchiveError: it is damaged; known at its end.
        """
        crc32, left = 0, self.size_bytes
        with self._open_packed() as packed, translate_os_errors(f"read {self.path}"):
            for block in (
                _inflate(packed) if self.method else iter(lambda: packed.read(BLOCK_BYTES), b"")
            ):
                part = block[:left]
                crc32, left = zlib.crc32(part, crc32), left - len(part)
                yield part
                if not left:
                    break
        if left or crc32 != self.crc32:
            raise ArchiveError(
                f"a member of {self.path} is damaged", remedy="get the archive again"
            )

    def _open_packed(self) -> IO[bytes]:
        with translate_os_errors(f"read {self.path}"):
            return io.BufferedReader(_OwnWindow(self.path, self.offset, self.compressed_bytes))


def _inflate(packed: IO[bytes]) -> Iterator[bytes]:
    """Yield what a stream unpacks to, in blocks of a bounded size; ends where it is damaged."""
    inflate = zlib.decompressobj(-15)
    with contextlib.suppress(zlib.error):
        while block := inflate.unconsumed_tail or packed.read(BLOCK_BYTES):
            yield inflate.decompress(block, BLOCK_BYTES)
        yield inflate.flush()


class _OwnWindow(Window):
    """A window that closes the file it looks at."""

    def __init__(self, path: Path, offset: int, size_bytes: int) -> None:
        super().__init__(path.open("rb"), offset, size_bytes)

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class Member:
    """One file of an archive to be written."""

    name: str
    """Relative, with `/` between folders."""
    source: Path | bytes | Stretch

    def __post_init__(self) -> None:
        """Refuse a name that could leave the folder an archive is unpacked to."""
        if problem := name_problem(self.name):
            raise ArchiveError(
                f"{self.name!r} cannot be a name inside an archive",
                found=problem,
                remedy="rename the file, or say another place for it",
            )

    @property
    def origin(self) -> str:
        """What an error calls it: the file, or the part of marwright that wrote it."""
        if isinstance(self.source, Path):
            return str(self.source)
        if isinstance(self.source, Stretch):
            return f"{self.name} of {self.source.path}"
        return "the file that marwright writes"

    def open(self) -> IO[bytes]:
        """Return a seekable stream of the content."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        if isinstance(self.source, Stretch):
            return self.source.open()
        with translate_os_errors(f"read {self.source}"):
            return self.source.open("rb")


def name_problem(name: str) -> str:
    """Return why a name may not stand in an archive, or "" where it may."""
    if not name:
        return "an empty name"
    if name.startswith("/") or re.match(r"[A-Za-z]:[/\\]", name):
        return "an absolute name"
    parts = name.removesuffix("/").split("/")
    if ".." in parts:
        return "a name with '..', which leaves the folder it is unpacked to"
    if "" in parts or "." in parts:
        return "a name with an empty or '.' part"
    if bad := sorted(set(name) & _FORBIDDEN):
        return f"the character {bad[0]!r} in the name"
    if any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        return "a part of more than 255 bytes"
    return ""


def collect(members: Iterable[Member]) -> list[Member]:
    """Return the members sorted by name; the same content given twice for one name is one member.

    Raises:
        ArchiveError: two different files would be one member, or a file stands where a folder must.
    """
    found: dict[str, Member] = {}
    for member in members:
        other = found.get(member.name)
        if other is None:
            found[member.name] = member
        elif not _is_same(other, member):
            raise ArchiveError(
                f"two files would be {member.name} inside the archive",
                found=f"{other.origin} and {member.origin}",
                remedy="rename one of them",
            )
    _check_folders(found.values())
    return sorted(found.values(), key=lambda member: member.name)


def _is_same(one: Member, other: Member) -> bool:
    if not (isinstance(one.source, Path) and isinstance(other.source, Path)):
        return False
    with translate_os_errors(f"read {one.source} and {other.source}"):
        return filecmp.cmp(one.source, other.source, shallow=False)


def _check_folders(members: Iterable[Member]) -> None:
    names = {member.name: member for member in members}
    for member in names.values():
        for folder in PurePosixPath(member.name).parents:
            if (other := names.get(str(folder))) is not None:
                raise ArchiveError(
                    f"{other.name} would be a file and a folder inside the archive",
                    found=f"{other.origin} and {member.origin}",
                    remedy="rename one of them",
                )
