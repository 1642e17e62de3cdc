"""Streams over parts of a file: a stretch of it, or what its compressed bytes unpack to."""

from __future__ import annotations

import errno
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import IO

from marwright.archive.limits import MAX_HEADER_BYTES, check_expansion, expansion_limit
from marwright.storage import translate_os_errors

__all__ = ["CarefulWindow", "copy_at_most", "Gunzip", "StoredGzip", "Window"]


def copy_at_most(source: IO[bytes], target: IO[bytes], limit: int, *, doing: str) -> None:
    """Copy a stream's content, but no more than `limit` bytes of it.

    Raises:
        StorageError: the target cannot be written; `doing` completes "cannot ...".
    """
    left = limit
    while left and (block := source.read(min(left, 1 << 20))):
        with translate_os_errors(doing):
            target.write(block)
        left -= len(block)


class Window(io.RawIOBase):
    """A stretch of a stream, as a stream of its own."""

    def __init__(self, stream: IO[bytes], offset: int, size_bytes: int) -> None:
        self._stream = stream
        self._offset = offset
        self._size = size_bytes
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Move without reading; a position before the start is refused."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + position < 0:
            raise OSError(errno.EINVAL, "a position before the start")
        self._position = base + position
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill the buffer, as far as the stretch goes."""
        view = memoryview(buffer)  # type: ignore[arg-type]  # any buffer, as io wants it
        wanted = max(0, min(len(view), self._size - self._position))
        self._stream.seek(self._offset + self._position)
        block = self._stream.read(wanted)
        view[: len(block)] = block
        self._position += len(block)
        return len(block)


class CarefulWindow(Window):
    """A stretch for tarfile, which asks for a whole extended header at once."""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; refuses to return very many."""
        check_read(size)
        return super().read(size) or b""


def check_read(size: int) -> None:
    """Refuse a read that would fill the memory; raises tarfile.ReadError."""
    if not 0 <= size <= MAX_HEADER_BYTES:
        raise tarfile.ReadError(f"a header of {size:,} bytes")


class Gunzip(io.RawIOBase):
    """A gzip file's content, unpacked while it is read.

    TorchServe reads a file's first gzip member only (commons-compress, GzipCompressorInputStream),
    and so does this; gzip.GzipFile would go on.
    """

    BLOCK_BYTES = 1 << 16

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb")
        self._limit = expansion_limit(path)
        self._rewind()

    def _rewind(self) -> None:
        self._stream.seek(0)
        self._inflate = zlib.decompressobj(31)  # a gzip header, and its checksum at the end
        self._block = memoryview(b"")
        self._position = 0

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()

    def tell(self) -> int:
        """Return how much was read."""
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position from the start; backwards means to begin anew."""
        if position < self._position:
            self._rewind()
        while self._position < position and self._take(position - self._position):
            pass
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; tarfile asks for a whole extended header at once."""
        check_read(size)
        parts = []
        while size and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _take(self, size: int) -> memoryview:
        """Return up to `size` bytes of the next block; none at the end."""
        if not self._block:
            self._block = memoryview(self._unpack())
        part, self._block = self._block[:size], self._block[size:]
        self._position += len(part)
        if self._position > self._limit:
            check_expansion(self._path, self._position)
        return part

    def _unpack(self) -> bytes:
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._stream.read(self.BLOCK_BYTES)
            if not packed:
                raise EOFError("the file is cut off")
            if block := self._inflate.decompress(packed, self.BLOCK_BYTES):
                return block
        return b""

    def measure_rest(self) -> int:
        """Read to the end; return how many bytes stand behind it."""
        while self._take(self.BLOCK_BYTES):
            pass
        rest = len(self._inflate.unused_data)
        return rest + os.fstat(self._stream.fileno()).st_size - self._stream.tell()


class StoredGzip(io.RawIOBase):
    """A gzip file of stored blocks, whose bytes no zlib build decides (RFC 1951, 3.2.4)."""

    BLOCK = 0xFFFF

    def __init__(self, stream: IO[bytes], *, epoch: int) -> None:
        self._stream = stream
        self._pending = bytearray()
        self._crc = self._size = 0
        stream.write(b"\x1f\x8b\x08\x00" + struct.pack("<IBB", epoch, 0, 3))

    def writable(self) -> bool:
        """Return that it can be written to, as io asks."""
        return True

    def write(self, data: object) -> int:
        """Take bytes, and pass on every full block."""
        content = bytes(data)  # type: ignore[call-overload]  # any buffer, as io wants it
        self._crc = zlib.crc32(content, self._crc)
        self._size += len(content)
        self._pending += content
        while len(self._pending) > self.BLOCK:
            self._put(bytes(self._pending[: self.BLOCK]), last=False)
            del self._pending[: self.BLOCK]
        return len(content)

    def close(self) -> None:
        """Write the last block and the checksums; the stream below stays open."""
        if not self.closed:
            self._put(bytes(self._pending), last=True)
            self._stream.write(struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
        super().close()

    def _put(self, block: bytes, *, last: bool) -> None:
        self._stream.write(struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block)
