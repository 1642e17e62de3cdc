"""The Parquet files of a prediction log, by day: predictions, and labels that came late."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marwright.errors import StorageError
from marwright.monitor.spool import SCHEMA, arrow, list_spool, open_plain, parquet
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.monitor.ledger import Ledger

__all__ = [
    "hide",
    "LABEL_SCHEMA",
    "LABELS_NAME",
    "list_days",
    "list_parts",
    "measure_folder",
    "measure_part",
    "name_part",
    "open_part",
    "Part",
    "PLACE",
    "sweep",
    "tell_day",
    "write_part",
]

_log = logging.getLogger(__name__)

LABELS_NAME = "labels"
VERSIONS = 1000
LABEL_SCHEMA = arrow.schema(
    [
        ("request", arrow.string()),
        ("item", arrow.int32()),
        ("label", arrow.string()),
        ("time", arrow.timestamp("us", tz="UTC")),
    ]
)
_NOTE = b"marwright"
_DAY = re.compile(r"day=(\d{4}-\d\d-\d\d)")
_PART = re.compile(r"part-\d{8}T\d{12}Z-\d+\.parquet")
PLACE = re.compile(rf"(?:{LABELS_NAME}/)?{_DAY.pattern}/{_PART.pattern}")
"""Where a part may stand in the folder of a log."""


@dataclass(frozen=True)
class Part:
    """One Parquet file, open for reading."""

    path: Path
    file: Any
    versions: frozenset[tuple[str, str]] | None
    """Each model and version in it; None where they are too many to be listed."""

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return int(self.file.metadata.num_rows)

    def list_groups(self) -> list[tuple[float, int]]:
        """Return the latest time of each group of rows, and its number; the latest first."""
        metadata = self.file.metadata
        found = []
        for number in range(metadata.num_row_groups):
            known = metadata.row_group(number).column(0).statistics
            latest = known.max.timestamp() if known is not None and known.has_min_max else 1e12
            found.append((latest, number))
        return sorted(found, reverse=True)

    def read(self, number: int, columns: Collection[str] | None) -> Any:
        """Return one group of rows."""
        names = None if columns is None else list(columns)
        return self.file.read_row_group(number, columns=names)


@contextlib.contextmanager
def open_part(path: Path) -> Iterator[Part | None]:
    """Yield a part; None where it has gone, or is no Parquet file of ours."""
    with contextlib.ExitStack() as stack:
        part = None
        try:
            stream = open_plain(path) or open_plain(hide(path)) or open_plain(path)
            if stream is not None:
                stack.enter_context(stream)
                file = parquet.ParquetFile(stream)
                schema = file.schema_arrow
                if schema.remove_metadata() not in (SCHEMA, LABEL_SCHEMA):
                    raise ValueError("other columns")
                part = Part(path, file, _read_versions(schema.metadata))
        except (arrow.ArrowException, OSError, ValueError) as exc:
            _log.warning("%s is no part of the prediction log: %s", path, exc)
        yield part


def write_part(path: Path, tables: Iterable[Any], schema: Any, versions: Any) -> None:
    """Write a part under its hidden name; a commit gives it its own.

    `versions`: each model and version in it, or None.
    """
    listed = sorted(versions) if versions is not None and len(versions) <= VERSIONS else None
    note = {_NOTE: json.dumps(listed).encode()}
    buffer = arrow.BufferOutputStream()
    with parquet.ParquetWriter(buffer, schema.with_metadata(note), compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(note))
    with translate_os_errors(f"write {path}"):
        _make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        # Whole inputs may be in it: they are for this user alone.
        descriptor = os.open(hide(path), flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(buffer.getvalue())
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            hide(path).unlink(missing_ok=True)
            raise


def name_part(day: str, generation: int, *, labels: bool = False) -> str:
    """Return where a new part of a day is to stand in the folder; no other one ever had it."""
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ")
    return f"{f'{LABELS_NAME}/' if labels else ''}day={day}/part-{moment}-{generation}.parquet"


def tell_day(seconds: float) -> str:
    """Return the day of a moment, in UTC."""
    return (date(1970, 1, 1) + timedelta(days=int(seconds // 86400))).isoformat()


def list_days(folder: Path, *, labels: bool = False) -> list[str]:
    """Return the days that there is a folder for, the latest first."""
    names = _list_names(folder / LABELS_NAME if labels else folder, folders=True)
    days = [match[1] for name in names if (match := _DAY.fullmatch(name))]
    return sorted(filter(_is_date, days), reverse=True)


def list_parts(
    folder: Path, day: str, *, labels: bool = False, ledger: Ledger | None = None
) -> list[str]:
    """Return where the parts of a day stand, the oldest first.

    `ledger`: what a reader goes by, who may come between a change and its end.
    """
    parent = f"{f'{LABELS_NAME}/' if labels else ''}day={day}"
    names = {f"{parent}/{name}" for name in _list_names(folder / parent) if _PART.fullmatch(name)}
    if ledger is not None:
        names |= {place for place in ledger.adds if place.startswith(f"{parent}/")}
        names -= set(ledger.removes)
    return sorted(names)


def measure_folder(folder: Path) -> int:
    """Return the bytes of all that the log keeps: parts, labels, spool."""
    paths = list_spool(folder)
    for labels in (False, True):
        for day in list_days(folder, labels=labels):
            paths += [folder / place for place in list_parts(folder, day, labels=labels)]
    return sum(map(measure_part, paths))


def measure_part(path: Path) -> int:
    """Return the bytes of a part; 0 of one that has gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_size
    return 0


def hide(path: Path) -> Path:
    """Return the name that a part has before it counts."""
    return path.with_name(f".{path.name}")


def sweep(folder: Path) -> None:
    """Remove parts that were being written when their writer was killed."""
    for labels in (False, True):
        root = folder / LABELS_NAME if labels else folder
        for day in list_days(folder, labels=labels):
            for name in _list_names(root / f"day={day}"):
                if name.startswith(".") and _PART.fullmatch(name[1:]):
                    (root / f"day={day}" / name).unlink(missing_ok=True)


def _read_versions(metadata: Mapping[bytes, bytes] | None) -> frozenset[tuple[str, str]] | None:
    with contextlib.suppress(ValueError, TypeError):
        return frozenset(
            (str(model), str(version))
            for model, version in json.loads((metadata or {}).get(_NOTE, b"null"))
        )
    return None


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _make_folder(folder: Path) -> None:
    """Make a day's folder, for this user alone.

    Raises:
        StorageError: a link stands there, which would lead out of the log.
    """
    ours = [folder.parent, folder] if folder.parent.name == LABELS_NAME else [folder]
    for path in ours:
        if path.is_symlink():
            raise StorageError(
                f"{path} is a link",
                expected="a folder of the prediction log",
                remedy="remove the link",
            )
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _list_names(folder: Path, *, folders: bool = False) -> list[str]:
    """Return the names of files, or of folders, in a folder; none where that is a link."""
    if folder.is_symlink() or (folder.parent.name == LABELS_NAME and folder.parent.is_symlink()):
        return []
    with translate_os_errors(f"read {folder}"):
        try:
            with os.scandir(folder) as entries:
                is_wanted = os.DirEntry.is_dir if folders else os.DirEntry.is_file
                return [e.name for e in entries if is_wanted(e, follow_symlinks=False)]
        except FileNotFoundError:
            return []
