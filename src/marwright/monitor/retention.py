"""Which parts of a prediction log stay: those of its days that there is room for, merged."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from marwright.errors import StorageError
from marwright.monitor.ledger import Ledger
from marwright.monitor.parts import (
    Part,
    list_days,
    list_parts,
    measure_folder,
    measure_part,
    name_part,
    open_part,
    tell_day,
    write_part,
)
from marwright.monitor.spool import arrow
from marwright.storage import translate_os_errors

__all__ = ["merge_parts", "remove_old", "remove_surplus"]

_log = logging.getLogger(__name__)

TIER_PARTS = 8
"""So many parts of a day of about one size become one."""
LARGEST_PART = 64 << 20
ROWS_BYTES = 16 << 20
ROWS = 1 << 14
"""What one group of rows holds at most: readers take a group at once."""


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
            surplus -= sum(measure_part(folder / place) for place in batch)
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
                sizes = {place: measure_part(folder / place) for place in places}
                batch = _choose_batch({p: sizes[p] for p in places if p not in refused}, largest)
                if not batch:
                    break
                place = name_part(day, ledger.generation + 1, labels=labels)
                if _merge([folder / item for item in batch], folder / place):
                    ledger = ledger.advance(adds=[place], removes=batch).commit(folder)
                else:  # one of them is broken; the others of the day do not wait for it
                    refused |= set(batch)
    return ledger


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


def _remove(folder: Path, places: Iterable[str]) -> None:
    with translate_os_errors(f"write {folder}"):
        for place in places:
            path = folder / place
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others stand in it still
                path.parent.rmdir()
