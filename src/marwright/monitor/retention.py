"""The Parquet files of a prediction log: which there are by day, and which of them stay.

What is added and what is removed at once stands in one small file, the ledger, together with how
far the spool has been collected. Its rename is the moment at which all of it has happened: files
that it adds are whole under a hidden name before, and take their own name after it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from marwright.errors import StorageError
from marwright.monitor.spool import SCHEMA, arrow, list_spool, open_plain, parquet
from marwright.storage import translate_os_errors, write_file

__all__ = [
    "LABEL_SCHEMA",
    "LABELS_NAME",
    "Ledger",
    "LEDGER_NAME",
    "list_days",
    "list_parts",
    "measure_folder",
    "merge_parts",
    "name_part",
    "open_part",
    "Part",
    "remove_old",
    "remove_surplus",
    "sweep",
    "tell_day",
    "write_part",
]

_log = logging.getLogger(__name__)

LEDGER_NAME = "collected.json"
LABELS_NAME = "labels"
TIER_PARTS = 8
"""So many parts of a day of about one size become one."""
LARGEST_PART = 64 << 20
ROWS_BYTES = 16 << 20
ROWS = 1 << 14
"""What one group of rows holds at most: readers take a group at once."""
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
_PLACE = re.compile(rf"(?:{LABELS_NAME}/)?{_DAY.pattern}/{_PART.pattern}")


@dataclass(frozen=True)
class Ledger:
    """What has been collected, and the change that was made last."""

    generation: int = 0
    """How many changes there were: whoever reads the same one before and after saw none."""
    offsets: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """For each spool file its head, and how many bytes of it are collected."""
    adds: tuple[str, ...] = ()
    """Parts that have taken their names since, or are about to."""
    removes: tuple[str, ...] = ()
    """Parts that have gone since, or are about to."""

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Return a log's ledger; one of nothing where there is none.

        Raises:
            StorageError: it is not one of ours.
        """
        path = folder / LEDGER_NAME
        with translate_os_errors(f"read {path}"):
            stream = open_plain(path)
            if stream is None:
                return cls()
            with stream:
                text = stream.read()
        try:
            item = json.loads(text)
            offsets = {name: (str(head), int(end)) for name, (head, end) in item["offsets"].items()}
            adds, removes = tuple(item["adds"]), tuple(item["removes"])
            if not all(_PLACE.fullmatch(place) for place in (*adds, *removes)):
                raise ValueError("a place outside the log")
            return cls(int(item["generation"]), offsets, adds, removes)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StorageError(
                f"{path} cannot be used",
                found=f"{type(exc).__name__}: {exc}",
                remedy="remove it; what the spool holds may be kept twice then",
            ) from exc

    def advance(
        self,
        *,
        offsets: Mapping[str, tuple[str, int]] | None = None,
        adds: Iterable[str] = (),
        removes: Iterable[str] = (),
    ) -> Ledger:
        """Return the ledger after one more change."""
        return replace(
            self,
            generation=self.generation + 1,
            offsets=self.offsets if offsets is None else offsets,
            adds=tuple(adds),
            removes=tuple(removes),
        )

    def commit(self, folder: Path) -> Ledger:
        """Make the change, whole or not at all."""
        try:
            with write_file(folder / LEDGER_NAME) as stream:
                facts = ("generation", "offsets", "adds", "removes")
                stream.write(json.dumps({key: getattr(self, key) for key in facts}).encode())
        except BaseException:
            self.discard(folder)
            raise
        self.settle(folder)
        return self

    def discard(self, folder: Path) -> None:
        """Remove what was to be added, unless it counts already: a signal may come at any time."""
        if Ledger.read(folder).generation < self.generation:
            for place in self.adds:
                hide(folder / place).unlink(missing_ok=True)

    def settle(self, folder: Path) -> None:
        """Bring the folder to what the ledger says; after a kill, what was left to be done."""
        with translate_os_errors(f"write {folder}"):
            for place in self.adds:
                with contextlib.suppress(FileNotFoundError):
                    hide(folder / place).rename(folder / place)
            for place in self.removes:
                (folder / place).unlink(missing_ok=True)


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
    return sum(map(_measure, paths))


def sweep(folder: Path) -> None:
    """Remove parts that were being written when their writer was killed."""
    for labels in (False, True):
        root = folder / LABELS_NAME if labels else folder
        for day in list_days(folder, labels=labels):
            for name in _list_names(root / f"day={day}"):
                if name.startswith(".") and _PART.fullmatch(name[1:]):
                    (root / f"day={day}" / name).unlink(missing_ok=True)


def remove_old(folder: Path, keep_days: int) -> None:
    """Remove the days that are older than those which are kept."""
    first = tell_day(time.time() - keep_days * 86400)
    for labels in (False, True):
        for day in list_days(folder, labels=labels):
            if day < first:
                _remove(folder, list_parts(folder, day, labels=labels))


def remove_surplus(folder: Path, most_bytes: int) -> int:
    """Remove the oldest parts until the folder holds no more than it may; return their rows.

    The oldest day is removed whole before the next one is begun; of the last one the latest parts
    stay as long as there is room.
    """
    surplus = measure_folder(folder) - most_bytes
    rows = 0
    days = sorted({*list_days(folder), *list_days(folder, labels=True)})
    for day in days:
        places = [*list_parts(folder, day), *list_parts(folder, day, labels=True)]
        places.sort(key=lambda place: place.rpartition("/")[2])
        for batch in [places] if day != days[-1] else [[place] for place in places]:
            if surplus <= 0:
                return rows
            surplus -= sum(_measure(folder / place) for place in batch)
            for place in batch:
                with open_part(folder / place) as part:
                    rows += part.rows if part else 0
            _remove(folder, batch)
    return rows


def merge_parts(folder: Path, ledger: Ledger, *, most_bytes: int) -> Ledger:
    """Make one part of several small ones of a day, until no day has many; return the ledger.

    Parts are merged with those of their own size, so that a row is written again some five times
    at most, however often a day is collected.
    """
    largest = min(LARGEST_PART, most_bytes // 16)
    for labels in (False, True):
        for day in list_days(folder, labels=labels):
            refused: set[str] = set()
            while True:
                places = list_parts(folder, day, labels=labels)
                sizes = {place: _measure(folder / place) for place in places}
                batch = _choose_batch({p: sizes[p] for p in places if p not in refused}, largest)
                if not batch:
                    break
                place = name_part(day, ledger.generation + 1, labels=labels)
                if _merge([folder / item for item in batch], folder / place):
                    ledger = ledger.advance(adds=[place], removes=batch).commit(folder)
                else:  # one of them is broken; the others of the day do not wait for it
                    refused |= set(batch)
    return ledger


def hide(path: Path) -> Path:
    """Return the name that a part has before it counts."""
    return path.with_name(f".{path.name}")


def _choose_batch(sizes: Mapping[str, int], largest: int) -> list[str]:
    """Return parts of about one size that are many and small enough to be merged, or none."""
    tiers: dict[int, list[str]] = {}
    for place, size in sizes.items():
        tier = tiers.setdefault(size.bit_length() // 3, [])
        tier.append(place)
        if len(tier) == TIER_PARTS:
            if sum(sizes[item] for item in tier) <= largest:
                return tier
            tier.pop(0)
    return []


def _merge(paths: list[Path], target: Path) -> bool:
    """Write the rows of parts into one; return whether all of them could be read."""
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(open_part(path)) for path in paths]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return False
        schema = whole[0].file.schema_arrow.remove_metadata()
        versions: set[tuple[str, str]] | None = set()
        for part in whole:
            if not part.file.schema_arrow.remove_metadata().equals(schema):
                return False
            known = part.versions
            versions = None if versions is None or known is None else versions | known
        try:
            write_part(target, _regroup(whole), schema, versions)
        except StorageError:
            raise
        except (arrow.ArrowException, OSError) as exc:
            _log.warning("parts beside %s cannot be merged: %s", target, exc)
            return False
    return True


def _regroup(parts: Iterable[Part]) -> Iterator[Any]:
    """Yield the rows of parts in groups that are neither small nor large."""
    held: list[Any] = []
    rows = size = 0
    for part in parts:
        for number in range(part.file.metadata.num_row_groups):
            table = part.read(number, None).replace_schema_metadata(None)
            if held and (rows + table.num_rows > ROWS or size + table.nbytes > ROWS_BYTES):
                yield arrow.concat_tables(held).combine_chunks()
                held, rows, size = [], 0, 0
            held.append(table)
            rows += table.num_rows
            size += table.nbytes
    if held:
        yield arrow.concat_tables(held).combine_chunks()


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


def _remove(folder: Path, places: Iterable[str]) -> None:
    with translate_os_errors(f"write {folder}"):
        for place in places:
            path = folder / place
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others stand in it still
                path.parent.rmdir()


def _measure(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_size
    return 0


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
