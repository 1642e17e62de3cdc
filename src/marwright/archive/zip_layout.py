"""Where things stand in a zip file, by its own records (PKWARE APPNOTE 6.3.10)."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from typing import IO

from marwright.archive.limits import MAX_DIRECTORY_BYTES, MAX_MEMBERS
from marwright.errors import ArchiveError

__all__ = ["data_offset", "Directory", "find_directory", "LocalHeader", "read_header"]


@dataclass(frozen=True)
class Directory:
    """The list of members at the end of a zip file, as its last record states it."""

    offset: int
    size_bytes: int
    count: int
    shift_bytes: int
    """How much further on than stated the list lies: 0 in a sound file."""
    trailing_bytes: int
    """Behind the zip file's own end."""


def find_directory(stream: IO[bytes], name: str) -> Directory:
    """Find a zip file's list of members, before zipfile reads the whole of it.

    Raises:
        ArchiveError: it would fill the memory; `name` is what the error calls the file.
        zipfile.BadZipFile: there is none, or the file is cut off.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - (76 + 22 + 0xFFFF)))
    tail = stream.read()
    start = tail.rfind(b"PK\x05\x06", max(0, len(tail) - (22 + 0xFFFF)))
    if start < 0 or start + 22 > len(tail):
        raise zipfile.BadZipFile("File is not a zip file")
    # PKWARE APPNOTE 4.3.16: entries on all disks, bytes and offset of the list, comment's length.
    count, listed, offset, comment = struct.unpack("<HIIH", tail[start + 10 : start + 22])
    trailing = len(tail) - (start + 22 + comment)
    if trailing < 0:
        raise zipfile.BadZipFile(f"the last {-trailing:,} bytes are missing")
    end = size - len(tail) + start
    if tail[max(0, start - 20) : start].startswith(b"PK\x06\x07"):
        record = tail[max(0, start - 76) : start - 20]
        if record[:4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("the zip64 record does not stand before its locator")
        count, listed, offset = struct.unpack("<QQQ", record[32:56])  # 4.3.14
        end -= 76
    shift = end - listed - offset
    if listed <= MAX_DIRECTORY_BYTES and end >= listed:
        stream.seek(end - listed)
        count = max(count, stream.read(listed).count(b"PK\x01\x02"))
    if count > MAX_MEMBERS or listed > MAX_DIRECTORY_BYTES:
        raise ArchiveError(
            f"{name} lists more than a model needs",
            expected=f"at most {MAX_MEMBERS:,} members",
            found=f"{count:,} members in a list of {listed:,} bytes",
        )
    return Directory(offset, listed, count, shift, trailing)


@dataclass(frozen=True)
class LocalHeader:
    """What a zip file states of a member before its data (4.3.7)."""

    name: bytes
    flags: int
    method: int
    crc32: int
    compressed_bytes: int
    size_bytes: int
    data_offset: int


def read_header(stream: IO[bytes], offset: int) -> LocalHeader:
    """Read the header before a member.

    Raises:
        zipfile.BadZipFile: there is none.
    """
    stream.seek(offset)
    fixed = stream.read(30)
    if len(fixed) < 30 or fixed[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no header where the list of members says it is")
    flags, method, _, _, crc, compressed, size, name_bytes, extra_bytes = struct.unpack(
        "<HHHHIIIHH", fixed[6:]
    )
    name, extra = stream.read(name_bytes), stream.read(extra_bytes)
    if 0xFFFFFFFF in (compressed, size):
        size, compressed = _read_zip64(extra, size, compressed)
    data_offset = offset + 30 + name_bytes + extra_bytes
    return LocalHeader(name, flags, method, crc, compressed, size, data_offset)


def data_offset(stream: IO[bytes], header_offset: int) -> int:
    """Return where a member's data begins; raises zipfile.BadZipFile where there is no header."""
    return read_header(stream, header_offset).data_offset


def _read_zip64(extra: bytes, size: int, compressed: int) -> tuple[int, int]:
    """Return both sizes, taken from the extra field where the header has no room (4.5.3)."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            values = [int.from_bytes(field[at : at + 8], "little") for at in (0, 8)]
            size = values.pop(0) if size == 0xFFFFFFFF else size
            compressed = values.pop(0) if compressed == 0xFFFFFFFF else compressed
            break
    return size, compressed
