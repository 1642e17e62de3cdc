"""Writing archives: the bytes depend on names and content only.

Names are sorted by whoever collected the members, times and modes are fixed, and nothing is
compressed: weights hardly shrink, and deflate differs between zlib builds
(docs/decisions/0002-archive-bytes.md). Digests stand in comments, where they change nothing of what
TorchServe unpacks (docs/decisions/0005-digests.md).

Formats: PKWARE APPNOTE 6.3.10 for zip (sizes in the local headers, no data descriptors: TorchServe
reads with java.util.zip.ZipInputStream, which knows no stored member without them), POSIX pax for
tar, RFC 1951 and 1952 for gzip.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from marwright.archive.container import PAX_ROOT, PAX_SHA256, SHA256
from marwright.archive.digests import root_digest
from marwright.archive.member import Member, Stretch
from marwright.archive.streams import StoredGzip
from marwright.errors import ArchiveError, StorageError, UsageError
from marwright.storage import translate_os_errors, write_file, write_folder

__all__ = ["Format", "read_epoch", "suffix_of", "write_archive", "Written"]

Format = Literal["zip", "tgz", "folder"]

FIXED_TIME = 315_532_800
"""1980-01-01 00:00:00 UTC in epoch seconds: the earliest time that a zip file can state."""
LATEST_TIME = 4_354_819_199
"""2107-12-31 23:59:59 UTC: the latest."""
BLOCK_BYTES = 1 << 20
ZIP64_BYTES = 0xFFFFFFFF
ZIP64_MEMBERS = 0xFFFF
MODE = 0o644
ALIGNMENT_BYTES = 1 << 15
"""The largest power of two that an extra field, of at most 65,535 bytes, can always pad to."""
ALIGNED_BYTES = 16 << 20
"""Data of this size begins at a multiple of that: the kernel then copies runs of pages into another
archive (1 GiB: 0.30 s, at any byte 0.48 s), and whoever maps the file gets aligned tensors."""
ALIGNMENT_FIELD = 0xD935
"""The id that Android's zipalign and apksig give such padding; unknown ones are skipped (4.5.1)."""


@dataclass(frozen=True)
class Written:
    """An archive that was written."""

    path: Path
    size_bytes: int
    root_digest: str
    """Over all members' names and digests: the same for the same content in any format."""


def suffix_of(format: Format) -> str:
    """Return how a file of this format ends."""
    return {"zip": ".mar", "tgz": ".tar.gz", "folder": ""}[format]


def read_epoch() -> int:
    """Return SOURCE_DATE_EPOCH where it is set (reproducible-builds.org), else one fixed time."""
    value = os.environ.get("SOURCE_DATE_EPOCH")
    if value is None:
        return FIXED_TIME
    if not (value.isascii() and value.isdigit() and len(value) <= 10) or int(value) > LATEST_TIME:
        raise UsageError(
            "SOURCE_DATE_EPOCH cannot be used",
            expected=f"seconds since 1970, up to {LATEST_TIME}, the last in a zip file",
            found=repr(value[:40]),
        )
    return max(int(value), FIXED_TIME)


def write_archive(
    target: Path, members: Sequence[Member], *, format: Format = "zip", top: str = ""
) -> Written:
    """Write members, in their order, to a temporary file that then takes the target's name.

    `top` is the folder that holds everything in a tar file.

    Raises:
        ArchiveError: a file changed while it was read.
        StorageError: a file cannot be read or the target cannot be written; the old one stays.
    """
    if format == "folder":
        return _write_folder(target, members)
    with write_file(target, durable=False) as stream:
        write = _write_zip if format == "zip" else _write_tar
        digests = write(stream, members, top)
    return Written(target, target.stat().st_size, root_digest(digests))


def _write_zip(stream: IO[bytes], members: Sequence[Member], _: str) -> dict[str, str]:
    headers = [_write_entry(stream, member) for member in members]
    digests = {header.name: header.sha256 for header in headers}
    start = stream.tell()
    for header in headers:
        stream.write(header.central())
    comment = f"marwright {SHA256}{root_digest(digests)}".encode()
    stream.write(_end_of_directory(len(headers), start, stream.tell() - start, comment))
    return digests


@dataclass
class _Header:
    """What a zip file states twice of a member: before its data, and in the list at the end."""

    name: str
    offset: int
    method: int = 0
    crc32: int = 0
    compressed_bytes: int = 0
    size_bytes: int = 0
    sha256: str = ""

    def local(self) -> bytes:
        """Return the header before the data (4.3.7)."""
        extra = b""
        sizes = self.compressed_bytes, self.size_bytes
        if max(sizes) >= ZIP64_BYTES:
            extra = struct.pack("<HHQQ", 1, 16, self.size_bytes, self.compressed_bytes)  # 4.5.3
            sizes = ZIP64_BYTES, ZIP64_BYTES
        name = self.name.encode()
        version = 45 if extra else 20
        if self.compressed_bytes >= ALIGNED_BYTES:
            extra += _pad(self.offset + 30 + len(name) + len(extra))
        return (
            b"PK\x03\x04"
            + struct.pack("<H", version)
            + self._common(*sizes)
            + struct.pack("<HH", len(name), len(extra))
            + name
            + extra
        )

    def central(self) -> bytes:
        """Return the entry of the list at the end (4.3.12)."""
        sizes = [self.size_bytes, self.compressed_bytes]
        large = max(sizes) >= ZIP64_BYTES
        values = (sizes if large else []) + ([self.offset] if self.offset >= ZIP64_BYTES else [])
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        shown = [ZIP64_BYTES, ZIP64_BYTES] if large else sizes[::-1]
        name, comment = self.name.encode(), f"{SHA256}{self.sha256}".encode()
        return (
            b"PK\x01\x02"
            + struct.pack("<BBH", 45 if extra else 20, 3, 45 if extra else 20)  # 3: made on Unix
            + self._common(*shown)
            + struct.pack("<HHHHHI", len(name), len(extra), len(comment), 0, 0, 0o100644 << 16)
            + struct.pack("<I", min(self.offset, ZIP64_BYTES))
            + name
            + extra
            + comment
        )

    def _common(self, compressed: int, size: int) -> bytes:
        flags = 0 if self.name.isascii() else 0x800  # the name is UTF-8
        year, month, day, hour, minute, second = time.gmtime(read_epoch())[:6]
        clock = hour << 11 | minute << 5 | second // 2
        calendar = (year - 1980) << 9 | month << 5 | day
        return struct.pack(
            "<HHHHIII", flags, self.method, clock, calendar, self.crc32, compressed, size
        )


def _pad(position: int) -> bytes:
    """Return the extra field that, standing at `position`, lets data begin aligned."""
    length = -(position + 6) % ALIGNMENT_BYTES
    return struct.pack("<HHH", ALIGNMENT_FIELD, 2 + length, ALIGNMENT_BYTES) + bytes(length)


def _end_of_directory(count: int, start: int, size: int, comment: bytes) -> bytes:
    record = b""
    if count >= ZIP64_MEMBERS or max(start, size) >= ZIP64_BYTES:
        here = start + size
        record = b"PK\x06\x06" + struct.pack(
            "<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start
        )  # 4.3.14
        record += b"PK\x06\x07" + struct.pack("<IQI", 0, here, 1)  # 4.3.15
    shown = min(count, ZIP64_MEMBERS)
    return (
        record
        + b"PK\x05\x06"
        + struct.pack("<HHHH", 0, 0, shown, shown)
        + struct.pack("<II", min(size, ZIP64_BYTES), min(start, ZIP64_BYTES))
        + struct.pack("<H", len(comment))
        + comment
    )


def _write_entry(stream: IO[bytes], member: Member) -> _Header:
    """Write one member; its header is written twice, since checksums are known at its end."""
    header = _Header(member.name, stream.tell())
    if isinstance(member.source, Stretch):
        return _copy_stretch(stream, member.source, header)
    with member.open() as source:
        header.size_bytes = header.compressed_bytes = _measure(source)
        stream.write(header.local())
        sums = _copy(source, stream)
    if sums.size_bytes != header.size_bytes:
        raise ArchiveError(
            f"{member.origin} changed while it was packed",
            expected=f"{header.size_bytes:,} bytes",
            found=f"{sums.size_bytes:,}",
            remedy="pack again once nothing writes to it",
        )
    header.crc32, header.sha256 = sums.crc32, sums.sha256
    end = stream.tell()
    stream.seek(header.offset)
    stream.write(header.local())
    stream.seek(end)
    return header


def _copy_stretch(stream: IO[bytes], source: Stretch, header: _Header) -> _Header:
    """Copy a member of another archive as it stands there, compressed or not."""
    header.method, header.crc32 = source.method, source.crc32
    header.size_bytes, header.compressed_bytes = source.size_bytes, source.compressed_bytes
    header.sha256 = source.sha256 or _digest_stretch(source)
    stream.write(header.local())
    stream.flush()  # what follows goes to the file itself, past the stream's buffer
    with translate_os_errors(f"read {source.path}"):
        origin = source.path.open("rb")
    with origin:
        copied = _copy_range(origin.fileno(), source.offset, stream, source.compressed_bytes)
    if copied != source.compressed_bytes:
        raise ArchiveError(
            f"{source.path} is not whole",
            expected=f"{source.compressed_bytes:,} bytes of {header.name}",
            found=f"{copied:,}",
        )
    return header


def _copy_range(origin: int, offset: int, stream: IO[bytes], count: int) -> int:
    """Copy bytes inside the kernel where it can (copy_file_range(2)); return how many it were."""
    left, target = count, stream.fileno()
    while left:
        try:
            done = os.copy_file_range(origin, target, min(left, 1 << 30), offset_src=offset)
        except OSError:  # another file system, or one without the call
            block = os.pread(origin, min(left, BLOCK_BYTES), offset)
            done = os.write(target, block)
        if not done:
            break
        left, offset = left - done, offset + done
    stream.seek(0, os.SEEK_END)
    return count - left


def _digest_stretch(source: Stretch) -> str:
    digest = hashlib.sha256()
    for block in source.read_blocks():
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Sums:
    size_bytes: int
    crc32: int
    sha256: str


class _Digesting(threading.Thread):
    """Takes the digest in a thread of its own; hashing releases the lock that threads share.

    It takes 1 s for 1 GiB, as long as reading, CRC-32 and writing take together.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._blocks: queue.Queue[bytes] = queue.Queue(maxsize=8)
        self._digest = hashlib.sha256()
        self.start()

    def add(self, block: bytes) -> None:
        """Take the next block; waits while the thread is eight blocks behind."""
        self._blocks.put(block)

    def run(self) -> None:
        while block := self._blocks.get():
            self._digest.update(block)

    def finish(self) -> str:
        """Return the digest over all blocks, in hex."""
        self._blocks.put(b"")
        self.join()
        return self._digest.hexdigest()


def _copy(source: IO[bytes], target: IO[bytes] | None) -> _Sums:
    block = source.read(BLOCK_BYTES)
    size, crc = len(block), 0
    if size < BLOCK_BYTES:  # all of it: not worth a thread
        if target is not None:
            target.write(block)
        return _Sums(size, zlib.crc32(block), hashlib.sha256(block).hexdigest())
    digesting = _Digesting()
    try:
        while block:
            digesting.add(block)
            crc = zlib.crc32(block, crc)
            if target is not None:
                target.write(block)
            block = source.read(BLOCK_BYTES)
            size += len(block)
    finally:
        digest = digesting.finish()
    return _Sums(size, crc, digest)


def _measure(source: IO[bytes]) -> int:
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    return size


def _write_tar(stream: IO[bytes], members: Sequence[Member], top: str) -> dict[str, str]:
    """Write a `.tar.gz`; a member's digest stands before it, so each is read twice."""
    digests = {}
    for member in members:
        with member.open() as source:
            digests[member.name] = _copy(source, None).sha256
    with (
        contextlib.closing(StoredGzip(stream, epoch=read_epoch())) as gzip,
        tarfile.open(
            fileobj=gzip,
            mode="w|",
            format=tarfile.PAX_FORMAT,
            pax_headers={PAX_ROOT: root_digest(digests)},
        ) as tar,
    ):
        for member in members:
            with member.open() as source:
                info = tarfile.TarInfo(f"{top}/{member.name}")
                info.size, info.mtime, info.mode = _measure(source), read_epoch(), MODE
                info.pax_headers = {PAX_SHA256: digests[member.name]}
                tar.addfile(info, source)
    return digests


def _write_folder(target: Path, members: Sequence[Member]) -> Written:
    """Write a folder; one that is there is replaced only where it holds an archive, or nothing."""
    with translate_os_errors(f"write {target}"):
        if target.exists() and not _is_replaceable(target):
            raise StorageError(
                f"{target} is something else than an archive",
                expected="a folder with MAR-INF/MANIFEST.json, an empty one, or none",
                remedy="choose another folder or model name",
            )
    digests, size = {}, 0
    with write_folder(target, replace=True) as folder:
        for member in members:
            path = folder / member.name
            with translate_os_errors(f"write {target / member.name}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as source, path.open("xb") as stream:
                    sums = _copy(source, stream)
            digests[member.name] = sums.sha256
            size += sums.size_bytes
    return Written(target, size, root_digest(digests))


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / "MAR-INF/MANIFEST.json").is_file() or not any(folder.iterdir())
    )
