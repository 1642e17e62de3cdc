"""The spool: what workers have written of their predictions, and nobody has collected yet.

Each worker appends lines of JSON to files of its own and keeps the last one locked. All that is
read here is hostile until checked: a line that breaks a rule is no record, whatever it holds.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from marwright.errors import UsageError
from marwright.storage import translate_os_errors

try:
    import pyarrow as arrow
    from pyarrow import compute, parquet
except ImportError as exc:
    raise UsageError(
        "the prediction log needs the package pyarrow", remedy="pip install 'marwright[parquet]'"
    ) from exc

__all__ = [
    "arrow",
    "build_table",
    "compute",
    "list_spool",
    "open_plain",
    "parquet",
    "Piece",
    "read_record",
    "Record",
    "SCHEMA",
    "SPOOL_NAME",
    "SpoolFile",
    "stamp",
]

Record: TypeAlias = tuple[Any, ...]
"""The values of one line, in the order of the schema's columns."""

SPOOL_NAME = "spool"
LINE_BYTES = 32 << 20
"""A longer line is no record: the largest input that is kept whole takes 22 MiB of one."""
HEAD_BYTES = 1 << 16
NEW_SECONDS = 60.0
"""How long an empty file may still be one that its worker is about to lock."""

_LARGEST = 3.4e38
"""What a float32 holds."""
_TEXT = 512
_LABEL = 4096
_FEATURES = 4096
_EMBEDDING = 1 << 16

SCHEMA = arrow.schema(
    [
        ("time", arrow.timestamp("us", tz="UTC")),
        ("request", arrow.string()),
        ("item", arrow.int32()),
        ("model", arrow.string()),
        ("version", arrow.string()),
        ("status", arrow.int16()),
        ("seconds", arrow.float32()),
        ("digest", arrow.string()),
        ("input", arrow.binary()),
        ("content_type", arrow.string()),
        ("features", arrow.map_(arrow.string(), arrow.float32())),
        ("prediction", arrow.string()),
        ("confidence", arrow.float32()),
        ("score", arrow.float32()),
        ("embedding", arrow.list_(arrow.float32())),
    ]
)


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a spool file."""

    lines: list[bytes]
    end: int
    """Where the next one begins, in bytes."""


class SpoolFile:
    """One file of the spool, open for reading."""

    def __init__(self, name: str, stream: IO[bytes], *, is_whole: bool) -> None:
        self.name = name
        self.is_whole = is_whole
        """Whether nobody writes it any more; nobody else takes it while it is open here."""
        self._stream = stream
        self.size = os.fstat(stream.fileno()).st_size
        self.head = _digest_head(stream)
        """Tells this file from another one that had its name: the digest of its first line."""

    @classmethod
    def open(cls, path: Path, *, take: bool) -> SpoolFile | None:
        """Return a file; None where it is gone, is no plain file, or there is nothing in it yet.

        `take`: also lock it where its worker has ended, as who is going to remove it has to.
        """
        stream = open_plain(path)
        if stream is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            facts = os.fstat(stream.fileno())
            # Its worker may not have come to lock an empty file that is new.
            if not facts.st_size and not (take and time.time() - facts.st_mtime > NEW_SECONDS):
                return None
            is_whole = take and _lock(stream)
            file = cls(path.name, stream, is_whole=is_whole)
            stack.pop_all()
        return file

    def read(self, start: int, most_bytes: int) -> Iterator[Piece]:
        """Yield what stands from `start` on, some `most_bytes` at once.

        Half a line at the end comes only where nobody is going to complete it.
        """
        place = min(start, self.size)
        self._stream.seek(place)
        rest = b""
        while block := self._stream.read(min(most_bytes, self.size - place)):
            place += len(block)
            cut = block.rfind(b"\n") + 1
            if cut:
                yield Piece((rest + block[:cut]).split(b"\n")[:-1], place - len(block) + cut)
                rest = block[cut:]
            else:
                # What is left of a line that is too long is no JSON, and is counted as one.
                rest = rest + block if len(rest) + len(block) <= LINE_BYTES else b"\0"
        if self.is_whole and rest:
            yield Piece([rest], place)

    def close(self) -> None:
        """Close it, and let others take it."""
        self._stream.close()


def list_spool(folder: Path) -> list[Path]:
    """Return the files of a log's spool, the ones that were written last at the end."""
    spool = folder / SPOOL_NAME
    found = []
    with translate_os_errors(f"read {spool}"), contextlib.suppress(FileNotFoundError):
        if spool.is_symlink():
            return []
        for entry in os.scandir(spool):
            if entry.name.endswith(".jsonl") and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    written = entry.stat(follow_symlinks=False).st_mtime_ns
                    found.append((written, Path(entry.path)))
    return [path for _, path in sorted(found)]


def open_plain(path: Path) -> IO[bytes] | None:
    """Return a file open for reading; None where it is gone, a link, or no plain file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        if path.is_symlink():
            return None
        raise
    stream = io.FileIO(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        return None
    return io.BufferedReader(stream)


def read_record(line: bytes) -> Record | None:
    """Return what a line says; None where it breaks a rule. Keys that are not known are let be."""
    try:
        value = _DECODER.decode(line.decode())
        return tuple([check(value.get(name)) for name, check in _CHECKS.items()])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def stamp(record: Record, seconds: float) -> Record:
    """Return a record with another time."""
    return (seconds, *record[1:])


def build_table(records: Sequence[Record]) -> Any:
    """Return records as a table of the schema."""
    if not records:
        return SCHEMA.empty_table()
    columns = dict(zip(SCHEMA.names, zip(*records, strict=True), strict=True))
    micros = np.rint(np.array(columns.pop("time"), dtype=np.float64) * 1e6).astype(np.int64)
    arrays = {"time": arrow.array(micros).cast(SCHEMA.field("time").type)}
    arrays["features"] = _build_map(columns.pop("features"))
    arrays["embedding"] = _build_lists(columns.pop("embedding"))
    for name, values in columns.items():
        arrays[name] = arrow.array(values, SCHEMA.field(name).type)
    return arrow.Table.from_arrays([arrays[name] for name in SCHEMA.names], schema=SCHEMA)


def _build_map(items: Sequence[dict[str, float] | None]) -> Any:
    """Return features; records mostly have the same names, which are looked up once."""
    numbers: dict[str, int] = {}
    shapes: dict[tuple[str, ...], Any] = {}
    codes = [np.empty(0, np.int32)]
    for item in filter(None, items):
        names = tuple(item)
        if names not in shapes:
            known = (numbers.setdefault(name, len(numbers)) for name in names)
            shapes[names] = np.fromiter(known, np.int32, len(names))
        codes.append(shapes[names])
    keys = arrow.array(list(numbers), arrow.string()).take(arrow.array(np.concatenate(codes)))
    values = chain.from_iterable(item.values() for item in items if item)
    return arrow.MapArray.from_arrays(_count_offsets(items), keys, _build_floats(values))


def _build_lists(items: Sequence[list[float] | None]) -> Any:
    values = _build_floats(chain.from_iterable(item for item in items if item))
    return arrow.ListArray.from_arrays(_count_offsets(items), values)


def _build_floats(values: Iterator[float]) -> Any:
    return arrow.array(np.fromiter(values, np.float64).astype(np.float32))


def _count_offsets(items: Sequence[Any]) -> Any:
    """Return where each item begins in the values of all; null for one that is not there."""
    lengths = np.fromiter((len(item or ()) for item in items), np.int64, len(items))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    absent = np.array([*(item is None for item in items), False])
    return arrow.array(offsets, mask=absent)


def _digest_head(stream: IO[bytes]) -> str:
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    end = head.find(b"\n")
    return hashlib.sha256(head[:end] if end >= 0 else head).hexdigest()[:16]


def _lock(stream: IO[bytes]) -> bool:
    """Return whether the file is this process's until it is closed."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reject(word: str) -> float:
    raise ValueError(f"{word} is no number")


_DECODER = json.JSONDecoder(parse_constant=_reject)


def _make_text(most: int, *, needed: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is None and not needed:
            return None
        if type(value) is not str or len(value) > most or (needed and not value):
            raise ValueError("no such text")
        if not value.isascii():
            value.encode()  # half of a surrogate pair is none
        return value

    return check


def _make_number(low: float, high: float) -> Callable[[Any], float | None]:
    def check(value: Any) -> float | None:
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError("no such number")
        return float(value)

    return check


def _make_count(most: int, default: int | None) -> Callable[[Any], int | None]:
    def check(value: Any) -> int | None:
        if value is None:
            return default
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError("no such count")
        return value

    return check


def _check_time(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e11:
        raise ValueError("no such time")
    return float(value)


def _check_input(value: Any) -> bytes | None:
    return None if value is None else base64.b64decode(value, validate=True)


def _check_features(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if type(value) is not dict or len(value) > _FEATURES:
        raise ValueError("no such features")
    if value:
        _check_floats(value.values())
        if max(map(len, value)) > _TEXT:
            raise ValueError("no such name of a feature")
        if not (names := "".join(value)).isascii():
            names.encode()
    return value


def _check_embedding(value: Any) -> list[float] | None:
    if value is None:
        return None
    if type(value) is not list or len(value) > _EMBEDDING:
        raise ValueError("no such embedding")
    if value:
        _check_floats(value)
    return value


def _check_floats(values: Any) -> None:
    if not set(map(type, values)) <= {int, float}:
        raise ValueError("no numbers")
    if not (min(values) >= -_LARGEST and max(values) <= _LARGEST):
        raise ValueError("no finite numbers")


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "time": _check_time,
    "request": _make_text(_TEXT),
    "item": _make_count((1 << 31) - 1, 0),
    "model": _make_text(_TEXT, needed=True),
    "version": _make_text(_TEXT, needed=True),
    "status": _make_count(999, None),
    "seconds": _make_number(0, _LARGEST),
    "digest": _make_text(_TEXT),
    "input": _check_input,
    "content_type": _make_text(_TEXT),
    "features": _check_features,
    "prediction": _make_text(_LABEL),
    "confidence": _make_number(-_LARGEST, _LARGEST),
    "score": _make_number(-_LARGEST, _LARGEST),
    "embedding": _check_embedding,
}
