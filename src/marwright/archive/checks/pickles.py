"""Pickles and TorchScript in an archive: what loading them would do, told without loading them.

Members are told by how they begin, not by their names: torch.save's zip files and what is inside
them, pickles of any protocol, NumPy's and joblib's files, compressed or not. What is stored in the
archive is read in place, and only where its structure stands; anything else is unpacked to a
temporary file.

A handler is code, and may do all that is reported here. Weights come from further away, and nobody
expects them to run.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import itertools
import lzma
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from marwright.archive import limits
from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.imports import Verdict, judge
from marwright.archive.checks.opcodes import (
    JOBLIB_ARRAY,
    PICKLE_STARTS,
    UNKNOWN,
    Followed,
    follow_all,
)
from marwright.archive.container import (
    Container,
    Entry,
    open_container,
    printable,
    translate_zip_errors,
)
from marwright.archive.limits import MAX_MEMBERS
from marwright.archive.streams import CarefulWindow, Window
from marwright.archive.zip_layout import find_directory, read_header
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["RULES", "scan_pickles"]

RUNS = Rule(
    "P201",
    Severity.DANGER,
    "a pickle that would do more than make a model",
    "do not load it, and ask where it comes from; weights belong into a state dict",
)
OBJECTS = Rule(
    "P202",
    Severity.WARNING,
    "a pickle of more than tensors",
    "save model.state_dict() or TorchScript; torch.load takes this only with weights_only=False",
)
BROKEN = Rule(
    "P203",
    Severity.ERROR,
    "a pickle that breaks off; a loader would do what stands before",
    "save the file again",
)
UNSEEN = Rule(
    "P204",
    Severity.ERROR,
    "a member that could not be looked into",
    "pack the file itself, not compressed, encrypted or inside other files",
)
SCRIPT = Rule(
    "P205",
    Severity.DANGER,
    "TorchScript that reads or writes files",
    "do not load it, and ask where it comes from; a model needs no files",
)

RULES: tuple[Rule, ...] = (RUNS, OBJECTS, BROKEN, UNSEEN, SCRIPT)

MAX_DEPTH = 6
"""Of files in files: the pickle of a torch file in a zip file in an archive is at 2."""
MAX_OPCODES = 50_000_000
"""Of all pickles together; some minutes."""
TRIAL_OPCODES = 100_000
"""Of what might be a pickle of the oldest kind, which begins like nothing in particular."""
BLOCK_BYTES = 1 << 16
MAX_CODE_BYTES = 16 << 20

TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")
PICKLE_ENDINGS = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")

_ZIP, _NUMPY, _TAR = b"PK\x03\x04", b"\x93NUMPY", b"ustar"
_XZ_MEMORY = 256 << 20


def _make_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)


_PACKED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": _make_xz,
    b"\x5d\0\0": _make_xz,
    **dict.fromkeys((b"x\x01", b"x\x5e", b"x\x9c", b"x\xda"), zlib.decompressobj),
}
"""How compressed files begin that joblib, NumPy or people make, and what unpacks them."""

_DOUBTFUL = (b"x", b"\x5d")
"""Of these beginnings, those that text may have too."""

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_SCRIPT_MODULE = re.compile(r"__torch__\b|torch\.jit\._pickle$")
"""Names in TorchScript's pickles; torch's C++ side reads them, to which they are no modules."""
_FILE_CALL = re.compile(rb"([\w.]*)\s*\.\s*(from_file|save|load_tensor)\s*\(")
# A pickle's ways to name an import: two lines, or two texts with the memo's opcodes between them.
_NAMES_STATED = re.compile(rb"c([A-Za-z_][\w.]{1,255})\n([A-Za-z_][\w.]{1,255})\n")
_NAMES_STACKED = re.compile(
    rb"\x8c.([A-Za-z_][\w.]{1,255})(?:\x94|q.|r.{4})?\x8c.([A-Za-z_][\w.]{1,255})(?:\x94|q.|r.{4})?\x93",
    re.DOTALL,
)


@dataclass(frozen=True)
class _Place:
    """Where in an archive a file lies, and in what company."""

    member: str
    inside: tuple[str, ...] = ()
    """Names from the member inwards."""
    is_torch: bool = False
    is_script: bool = False

    @property
    def name(self) -> str:
        return self.inside[-1] if self.inside else self.member

    @property
    def ending(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def is_code(self) -> bool:
        return self.is_script and "/code/" in f"/{self.name}" and self.ending == ".py"

    def inner(self, name: str) -> _Place:
        return replace(self, inside=(*self.inside, name))


def scan_pickles(source: Path | Container) -> list[Finding]:
    """Look into every member of an archive whose structure is sound.

    Raises:
        ArchiveError: no such file, or one that no reader could list.
        StorageError: there is no room for a temporary file.
    """
    with open_container(source) if isinstance(source, Path) else source as container:
        packed = sum(entry.compressed_bytes for entry in container.entries)
        search = _Search(limits.FREE_BYTES + limits.MAX_RATIO * packed)
        for entry in container.entries:
            if entry.kind == "file":
                search.look_at(container, entry)
    return search.findings


class _Search:
    """One scan: what it found, and how much it may still do."""

    def __init__(self, max_bytes: int) -> None:
        self.findings: list[Finding] = []
        self._members = MAX_MEMBERS
        self._bytes = self._max_bytes = max_bytes
        self._opcodes = MAX_OPCODES

    def look_at(self, container: Container, entry: Entry) -> None:
        """Look into one member of the archive itself."""
        place = _Place(entry.name, is_torch=entry.name.lower().endswith(TORCH_ENDINGS))
        with self._reporting(place):
            if container.is_in_place(entry):
                with container.open_seekable(entry) as stream:
                    self._look(stream, place)
            else:
                with container.open(entry) as stream:
                    self._look_through(iter(lambda: stream.read(BLOCK_BYTES), b""), place)

    def _report(
        self, rule: Rule, place: _Place, text: str, *, severity: Severity | None = None
    ) -> None:
        found = "".join(f"{printable(name)}: " for name in place.inside) + text
        self.findings.append(rule.at(found, member=printable(place.member), severity=severity))

    @contextlib.contextmanager
    def _reporting(self, place: _Place) -> Iterator[None]:
        """Report what cannot be read; that is grave where a loader may try to."""
        try:
            with translate_zip_errors(Path(place.member)):
                yield
        except ArchiveError as exc:
            grave = place.ending in PICKLE_ENDINGS or place.is_torch
            severity = Severity.ERROR if grave else Severity.WARNING
            self._report(UNSEEN, place, exc.found or exc.message, severity=severity)

    def _look(self, stream: IO[bytes], place: _Place) -> None:
        """Look into a file, whatever it is."""
        if len(place.inside) > MAX_DEPTH:
            raise ArchiveError("too deep", found=f"more than {MAX_DEPTH} files inside one another")
        head = stream.read(512)
        stream.seek(0)
        if place.is_code:
            self._read_code(stream, place)
        elif head.startswith(_ZIP):
            self._look_into_zip(stream, place)
        elif head[257:262] == _TAR:
            self._look_into_tar(stream, place)
        elif not self._look_into_packed(stream, head, place):
            stream.seek(_measure_numpy_header(head))
            self._follow(stream, place)
            # pickle reads from a file's start, torch.jit.load from its end.
            if place.ending in PICKLE_ENDINGS and zipfile.is_zipfile(stream):
                self._look_into_zip(stream, place)

    def _look_through(self, blocks: Iterator[bytes], place: _Place) -> None:
        """Look into what can only be read once: at its start, and at all where that is worth it."""
        head = next(blocks, b"")
        if not (_is_known(head) or place.is_code or place.ending in PICKLE_ENDINGS):
            self._look(io.BytesIO(head), place)
            return
        doing = "write a temporary file"
        with translate_os_errors(doing):
            spool = tempfile.TemporaryFile()  # noqa: SIM115 closed below
        with spool:
            for block in itertools.chain([head], blocks):
                self._bytes -= len(block)
                if self._bytes < 0:
                    raise ArchiveError("too large", found=f"over {self._max_bytes:,} bytes")
                with translate_os_errors(doing):
                    spool.write(block)
            spool.seek(0)
            self._look(spool, place)

    def _count_member(self) -> None:
        self._members -= 1
        if self._members < 0:
            raise ArchiveError("too many", found=f"more than {MAX_MEMBERS:,} files in files")

    def _look_into_zip(self, stream: IO[bytes], place: _Place) -> None:
        """Look into each member as torch reads it, whatever checksums, flags and headers say."""
        if find_directory(stream, place.member).shift_bytes:
            raise zipfile.BadZipFile("a zip file with two ends, which its readers take apart")
        infos = [info for info in zipfile.ZipFile(stream).infolist() if info.compress_size]
        names = [f"/{info.orig_filename}" for info in infos]
        is_torch = any(name.endswith("/data.pkl") for name in names)
        is_script = any("/code/" in name or name.endswith("/constants.pkl") for name in names)
        place = replace(place, is_torch=is_torch, is_script=is_script)
        for info in infos:
            self._count_member()
            inner = place.inner(info.orig_filename)
            with self._reporting(inner):
                header = read_header(stream, info.header_offset)
                window = Window(stream, header.data_offset, info.compress_size)
                self._look_into_entry(io.BufferedReader(window), info.compress_type, inner)

    def _look_into_entry(self, stream: IO[bytes], method: int, place: _Place) -> None:
        if method == zipfile.ZIP_STORED:
            self._look(stream, place)
        elif method == zipfile.ZIP_DEFLATED:
            self._look_through(_unpack(stream, lambda: zlib.decompressobj(-15)), place)
        else:
            raise NotImplementedError(f"compression method {method}")

    def _look_into_tar(self, stream: IO[bytes], place: _Place) -> None:
        careful = CarefulWindow(stream, 0, stream.seek(0, os.SEEK_END))
        with tarfile.open(fileobj=careful, mode="r:") as tar:
            for info in tar:
                self._count_member()
                if info.isreg() and not info.issparse():
                    inner = place.inner(info.name)
                    window = Window(stream, info.offset_data, info.size)
                    with self._reporting(inner):
                        self._look(io.BufferedReader(window), inner)

    def _look_into_packed(self, stream: IO[bytes], head: bytes, place: _Place) -> bool:
        """Look into a compressed file; return whether it is one."""
        make = next((_PACKED[start] for start in _PACKED if head.startswith(start)), None)
        blocks = _unpack(stream, make) if make else iter(())
        first = next(blocks, b"")
        if first:
            self._look_through(itertools.chain([first], blocks), place.inner("unpacked"))
        elif make and (place.ending in PICKLE_ENDINGS or not head.startswith(_DOUBTFUL)):
            raise ArchiveError("packed", found="compressed bytes that cannot be unpacked")
        else:
            stream.seek(0)
        return bool(first)

    def _read_code(self, stream: IO[bytes], place: _Place) -> None:
        """Look for the functions with which TorchScript reaches files."""
        code = stream.read(MAX_CODE_BYTES + 1)
        if len(code) > MAX_CODE_BYTES:
            raise ArchiveError("too long", found=f"over {MAX_CODE_BYTES:,} bytes of TorchScript")
        calls = sorted(
            f"{base.decode()}.{function.decode()}"
            for base, function in set(_FILE_CALL.findall(code))
            if not base.startswith((b"self", b"__torch__"))
        )
        if calls:
            self._report(SCRIPT, place, _enumerate(calls))

    def _follow(self, stream: IO[bytes], place: _Place) -> None:
        """Follow the pickles that a file may consist of, and report what they would import."""
        head = stream.read(2)
        stream.seek(-len(head), os.SEEK_CUR)
        is_likely = head in PICKLE_STARTS or place.ending in PICKLE_ENDINGS
        limit = self._opcodes if is_likely else min(self._opcodes, TRIAL_OPCODES)
        pickles = list(follow_all(stream, max_opcodes=limit))
        self._opcodes -= sum(pickle.opcodes for pickle in pickles)
        verdicts: dict[tuple[str, str], Verdict] = {}
        for pickle in pickles:
            verdicts |= _judge(pickle, place)
        first = pickles[0]
        if JOBLIB_ARRAY in first.imports and first.problem:
            verdicts |= _search_names(stream, first.end)
            self._report(OBJECTS, place, "arrays of joblib; what is behind them is only searched")
        elif first.is_marked and first.problem and (verdicts or place.ending in PICKLE_ENDINGS):
            rule = UNSEEN if first.problem.startswith("more than") else BROKEN
            self._report(rule, place, first.problem)
        self._report_imports(verdicts, place)
        for pickle in pickles:
            for offset, length in pickle.nested:
                inner = place.inner(f"bytes at {offset:,}")
                self._look(io.BufferedReader(Window(stream, offset, length)), inner)

    def _report_imports(self, verdicts: dict[tuple[str, str], Verdict], place: _Place) -> None:
        dangers, objects = [], []
        for (module, name), verdict in verdicts.items():
            shown = printable(f"{module}.{name}")
            if verdict is Verdict.DANGER:
                dangers.append("a name that it computes" if (module, name) == UNKNOWN else shown)
            elif verdict is Verdict.OBJECTS or (verdict is Verdict.VALUES and place.is_torch):
                objects.append(shown)
        if dangers:
            self._report(RUNS, place, _enumerate(dangers))
        if objects:
            self._report(OBJECTS, place, _enumerate(objects))


def _is_known(head: bytes) -> bool:
    """Tell whether a file begins like one that may hold pickles."""
    return head.startswith((_ZIP, _NUMPY, *PICKLE_STARTS, *_PACKED)) or head[257:262] == _TAR


def _measure_numpy_header(head: bytes) -> int:
    """Return where a .npy file's numbers or pickled objects begin; 0 for other files."""
    if not head.startswith(_NUMPY):
        return 0
    width = 2 if head[6:7] == b"\x01" else 4  # bytes of the length behind the version
    return 8 + width + int.from_bytes(head[8 : 8 + width], "little")


def _unpack(source: IO[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Yield what compressed bytes unpack to, in blocks, as far as they are whole.

    bz2 and lzma keep what they were given and did not use yet, zlib gives it back.
    """
    unpack, packed = make(), source.read(BLOCK_BYTES)
    with contextlib.suppress(zlib.error, lzma.LZMAError, OSError, EOFError):
        while packed or not getattr(unpack, "needs_input", True):
            if block := unpack.decompress(packed, BLOCK_BYTES):
                yield block
            if unpack.eof:  # some readers go on with the next compressed file behind this one
                unpack, packed = make(), unpack.unused_data
            else:
                packed = getattr(unpack, "unconsumed_tail", b"")
            if not packed and getattr(unpack, "needs_input", True):
                packed = source.read(BLOCK_BYTES)


def _judge(pickle: Followed, place: _Place) -> dict[tuple[str, str], Verdict]:
    """Judge a pickle's imports; where it may be text by chance, those that are named and used."""
    verdicts = {}
    for module, name in pickle.imports:
        if place.is_script and _SCRIPT_MODULE.match(module):
            verdict = Verdict.TENSORS
        elif (module, name) == ("torch.storage", "_load_from_bytes") and pickle.nested:
            verdict = Verdict.OBJECTS  # those bytes are looked into
        else:
            verdict = judge(module, name, protocol=pickle.protocol)
        verdicts[module, name] = verdict
    if pickle.is_marked:
        return verdicts
    named = {
        names: verdict
        for names, verdict in verdicts.items()
        if all(_NAME.fullmatch(part) for part in names)
    }
    if pickle.problem:
        named = {names: verdict for names, verdict in named.items() if verdict is Verdict.DANGER}
    return (named if pickle.problem else verdicts) if named and pickle.calls else {}


def _search_names(stream: IO[bytes], start: int) -> dict[tuple[str, str], Verdict]:
    """Look for dangerous imports in bytes that are partly a pickle and partly numbers."""
    verdicts = {}
    stream.seek(start)
    block = b""
    while more := stream.read(1 << 20):
        block = block[-1024:] + more
        for pattern in (_NAMES_STATED, _NAMES_STACKED):
            for module, name in pattern.findall(block):
                names = module.decode("ascii", "replace"), name.decode("ascii", "replace")
                if judge(*names) is Verdict.DANGER:
                    verdicts[names] = Verdict.DANGER
    return verdicts


def _enumerate(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
