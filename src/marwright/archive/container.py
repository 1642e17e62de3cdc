"""What holds an archive's members: a zip file (`.mar`), a tar file (`.tar.gz`), or a folder.

Nothing is unpacked or trusted here; a container lists its entries as the file itself states them.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from marwright.archive.limits import MAX_HEADERS_BYTES, MAX_MEMBERS
from marwright.archive.member import BLOCK_BYTES, name_problem
from marwright.archive.streams import Gunzip, Window, copy_at_most
from marwright.archive.zip_layout import data_offset, find_directory
from marwright.errors import ArchiveError, MarwrightError
from marwright.storage import translate_os_errors

__all__ = [
    "Container",
    "Entry",
    "open_container",
    "printable",
    "translate_zip_errors",
]

SHA256 = "sha256:"
"""How a digest begins in the comment of a zip file's entry."""
PAX_SHA256 = "MARWRIGHT.sha256"
"""The same in the extended header of a tar file's entry."""
PAX_ROOT = "MARWRIGHT.root"
"""The digest over all members, in a tar file's global header."""

# What zipfile, tarfile and zlib raise for bytes that they cannot read: damaged deflate streams
# (zlib.error), names that are no UTF-8 (ValueError), encryption (RuntimeError), bzip2 and LZMA.
_UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Entry:
    """One member as the container lists it."""

    name: str
    size_bytes: int
    compressed_bytes: int
    """The same as size_bytes where nothing is compressed, and in tar files and folders."""
    method: int = 0
    """Of a zip file: 0 stored, 8 deflated, others are not read."""
    crc32: int | None = None
    sha256: str | None = None
    """Of the content, where the archive states it."""
    mode: int = 0
    """Unix type and permission bits; 0 where the file does not say."""
    kind: str = "file"
    """`file`, `folder`, `link` (symbolic or hard), `device` (pipe or socket), or `other`."""
    encrypted: bool = False
    header_offset: int = 0
    """Of a zip or tar file: where the member's own header begins."""
    flags: int = 0
    """Of a zip file: the general purpose bits (PKWARE APPNOTE 4.4.4)."""


class Container(ABC):
    """An opened archive file or folder; use it in a `with` block."""

    path: Path
    format: str
    """`zip`, `tgz` or `folder`."""
    entries: tuple[Entry, ...]
    """Every entry, folders and doubles included, in the container's own order."""
    root_digest: str | None = None
    """The digest over all members' names and digests, where the archive states it."""
    trailing_bytes: int = 0
    """Of a tar file: what stands behind the gzip file's own end."""

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @abstractmethod
    def open(self, entry: Entry) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Return a stream of one member's content, for a `with` block.

        Raises:
            ArchiveError: in the block, where the bytes cannot be read.
        """

    def is_in_place(self, entry: Entry) -> bool:
        """Tell whether a member's bytes stand in the file as they are."""
        return False

    def open_seekable(self, entry: Entry) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Return a stream of one member's content in which seeking costs nothing.

        What is not stored as it is goes to a temporary file first, never more than the archive
        states.

        Raises:
            ArchiveError: in the block, where the bytes cannot be read.
            StorageError: the temporary file cannot be written.
        """
        return self._spool(entry)

    @contextlib.contextmanager
    def _spool(self, entry: Entry) -> Iterator[IO[bytes]]:
        with translate_os_errors("write a temporary file"):
            spool = tempfile.TemporaryFile()  # noqa: SIM115 closed below
        with spool:
            with self.open(entry) as source:
                copy_at_most(source, spool, entry.size_bytes, doing="write a temporary file")
            spool.seek(0)
            yield spool

    def read(self, entry: Entry, *, limit: int) -> bytes:
        """Return a member's content.

        Raises:
            ArchiveError: it is longer than `limit` bytes, whatever the archive states, or damaged.
        """
        content = bytearray()
        with self.open(entry) as stream:
            # By blocks: the stream below refuses to return very much at once.
            while block := stream.read(min(BLOCK_BYTES, limit + 1 - len(content))):
                content += block
        if len(content) > limit:
            raise ArchiveError(
                f"{printable(entry.name)} of {self.path} is too long",
                expected=f"at most {limit:,} bytes",
            )
        return bytes(content)


def open_container(path: Path) -> Container:
    """Open a `.mar` or `.tar.gz` file, or a folder with an unpacked archive.

    Raises:
        ArchiveError: no such file, neither zip nor tar, or more members than any model needs.
    """
    with translate_os_errors(f"read {path}"):
        if path.is_dir():
            return _Folder(path)
        if not path.is_file():
            raise ArchiveError(
                f"there is no archive {path}", remedy="pack one: marwright pack RUN --out STORE"
            )
        with path.open("rb") as stream:
            magic = stream.read(2)
    with translate_zip_errors(path):
        return _Tar(path) if magic == b"\x1f\x8b" else _Zip(path)


@contextlib.contextmanager
def translate_zip_errors(path: Path, member: str = "") -> Iterator[None]:
    """Raise ArchiveError for bytes that are no zip or tar file, or cannot be read."""
    try:
        yield
    except MarwrightError:  # some of ours are OSErrors too
        raise
    except _UNREADABLE as exc:
        raise ArchiveError(
            f"{printable(member)} of {path} cannot be read"
            if member
            else f"{path} is no model archive",
            expected="a member whose bytes are whole" if member else "a zip file",
            found=printable(" ".join(str(exc).split())[:200]) or type(exc).__name__,
            remedy="pack the model again",
        ) from exc


def printable(text: str) -> str:
    """Return text of an archive as it may be shown: control characters would rule a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


class _Zip(Container):
    """A `.mar` file."""

    format = "zip"

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            find_directory(stream, str(path))  # refuses a list of members that fills the memory
        self._zip = zipfile.ZipFile(path)
        comment = self._zip.comment.decode("ascii", "replace")
        self.root_digest = comment.split(SHA256, 1)[1][:64] if SHA256 in comment else None
        self.entries = tuple(self._describe(info) for info in self._zip.infolist())
        self._infos = dict(zip(self.entries, self._zip.infolist(), strict=True))

    def close(self) -> None:
        self._zip.close()

    @contextlib.contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        with translate_zip_errors(self.path, entry.name):
            if entry.method not in (0, 8):
                # zipfile reads LZMA as well, whose header may ask for gigabytes of memory.
                raise NotImplementedError(f"compression method {entry.method}")
            with self._zip.open(self._infos[entry]) as stream:
                yield stream

    def is_in_place(self, entry: Entry) -> bool:
        return entry.method == 0 and not entry.encrypted

    def open_seekable(self, entry: Entry) -> contextlib.AbstractContextManager[IO[bytes]]:
        return self._open_in_place(entry) if self.is_in_place(entry) else self._spool(entry)

    @contextlib.contextmanager
    def _open_in_place(self, entry: Entry) -> Iterator[IO[bytes]]:
        # A stream of its own: members are read in several threads.
        with translate_zip_errors(self.path, entry.name), self.path.open("rb") as stream:
            offset = data_offset(stream, entry.header_offset)
            yield io.BufferedReader(Window(stream, offset, entry.compressed_bytes))

    @staticmethod
    def _describe(info: zipfile.ZipInfo) -> Entry:
        comment = info.comment.decode("ascii", "replace")
        mode = info.external_attr >> 16 if info.create_system == 3 else 0
        # orig_filename: zipfile cuts a name at its first NUL, others do not.
        name = info.orig_filename
        kind = _kind_of_mode(mode)
        if kind in ("file", "folder"):
            # To TorchServe the name alone decides; a mode that disagrees would hide the content.
            kind = "folder" if name.endswith("/") else "other" if kind == "folder" else "file"
        return Entry(
            name=name,
            size_bytes=info.file_size,
            compressed_bytes=info.compress_size,
            method=info.compress_type,
            crc32=info.CRC,
            sha256=comment.removeprefix(SHA256) if comment.startswith(SHA256) else None,
            mode=mode,
            kind=kind,
            encrypted=bool(info.flag_bits & 1),
            header_offset=info.header_offset,
            flags=info.flag_bits,
        )


def _kind_of_mode(mode: int) -> str:
    kinds = {0: "file", 0o100000: "file", 0o040000: "folder", 0o120000: "link"}
    return kinds.get(mode & 0o170000, "device")


class _Tar(Container):
    """A `.tar.gz` file: everything stands below one folder, which is left out of the names.

    Reading a member means to read the whole file up to it.
    """

    format = "tgz"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = Gunzip(path)
        self._infos: dict[Entry, tarfile.TarInfo] = {}
        try:
            self._tar = tarfile.open(fileobj=self._stream, mode="r:")  # noqa: SIM115 see close()
            self.entries = tuple(self._list())
        except BaseException:
            self._stream.close()
            raise
        self.trailing_bytes = self._stream.measure_rest()

    def close(self) -> None:
        self._tar.close()
        self._stream.close()

    @contextlib.contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        with translate_zip_errors(self.path, entry.name):
            stream = self._tar.extractfile(self._infos[entry]) if entry.kind == "file" else None
            yield stream if stream is not None else io.BytesIO()

    def _list(self) -> Iterator[Entry]:
        headers_bytes = 0
        for count, info in enumerate(self._tar):
            headers_bytes += sum(len(key) + len(text) for key, text in info.pax_headers.items())
            if count >= MAX_MEMBERS or headers_bytes > MAX_HEADERS_BYTES:
                raise ArchiveError(
                    f"{self.path} lists more than a model needs",
                    expected=f"at most {MAX_MEMBERS:,} members",
                    found=f"{count:,} and more, {headers_bytes:,} bytes of extended headers",
                )
            entry = self._describe(info)
            self._infos[entry] = info
            self.root_digest = info.pax_headers.get(PAX_ROOT, self.root_digest)
            yield entry

    @staticmethod
    def _describe(info: tarfile.TarInfo) -> Entry:
        # TorchServe drops the first folder (ZipUtils.decompressTarGzipFile).
        top, slash, rest = info.name.partition("/")
        name = rest if slash and top not in ("", "..") else info.name
        kinds = {
            "folder": info.isdir(),
            "link": info.issym() or info.islnk(),
            "device": info.ischr() or info.isblk() or info.isfifo(),
            # TorchServe writes whatever is no folder as a file, and a name's "/" makes a folder.
            "file": info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not name.endswith("/"),
        }
        if info.issparse():
            kinds["file"] = False  # to Python with holes, to others their description
        return Entry(
            name=name,
            size_bytes=info.size,
            compressed_bytes=info.size,
            sha256=info.pax_headers.get(PAX_SHA256),
            mode=info.mode,
            kind=next((kind for kind, is_it in kinds.items() if is_it), "other"),
            header_offset=info.offset,
        )


class _Folder(Container):
    """An unpacked archive, as `--archive-format no-archive` leaves it."""

    format = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = tuple(sorted(self._list(), key=lambda entry: entry.name))

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def open(self, entry: Entry) -> Iterator[IO[bytes]]:
        shown = printable(entry.name)
        if problem := name_problem(entry.name):
            raise ArchiveError(f"{shown} of {self.path} is not read", found=problem)
        with translate_os_errors(f"read {self.path / shown}"):
            if entry.kind != "file":
                raise ArchiveError(
                    f"{self.path / shown} is not read", expected="a file", found=f"a {entry.kind}"
                )
            with (self.path / entry.name).open("rb") as stream:
                yield stream

    def is_in_place(self, entry: Entry) -> bool:
        return True

    def open_seekable(self, entry: Entry) -> contextlib.AbstractContextManager[IO[bytes]]:
        return self.open(entry)

    def _list(self) -> Iterator[Entry]:
        """Yield what is below the folder; links are told, and not followed."""
        waiting, count = [""], 0
        while waiting:
            folder = waiting.pop()
            with os.scandir(self.path / folder) as found:
                for file in found:
                    name = folder + file.name
                    status = file.stat(follow_symlinks=False)
                    kind = _kind_of_mode(status.st_mode)
                    if (count := count + 1) > MAX_MEMBERS:
                        raise ArchiveError(f"{self.path} has more than {MAX_MEMBERS:,} members")
                    if kind == "folder":
                        waiting.append(f"{name}/")
                        continue
                    size = status.st_size if kind == "file" else 0
                    yield Entry(name, size, size, mode=status.st_mode, kind=kind)
