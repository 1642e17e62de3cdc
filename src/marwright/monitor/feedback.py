"""Labels that come late: read from a CSV file, and joined with predictions by request.

A request of one item needs no item to be named. Where a label is said twice, the later one counts.
"""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from marwright.errors import ArchiveError, DataError, StorageError
from marwright.monitor.reference import Reference
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.server.deployment import Deployment

__all__ = [
    "Change",
    "count_items",
    "index_labels",
    "join_labels",
    "Joined",
    "Label",
    "list_classes",
    "parse_time",
    "read_labels",
]

COLUMNS = ("request", "label", "item", "time")
NEEDED = ("request", "label")
LISTED = 1000
"""So many malformed rows are listed; a file with more is no file of labels."""
CELL = 4096
"""Characters of a request's id or of a label."""
DAY_SECONDS = 86400.0

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

Key: TypeAlias = "tuple[str, int | None]"
Items: TypeAlias = Mapping[str, Mapping[tuple[str, str], set[int]]]
Said: TypeAlias = tuple[int, str]
"""When a label was said, in microseconds since the epoch, and the label."""


@dataclass(frozen=True)
class Label:
    """What one item of a request truly was."""

    request: str
    label: str
    item: int | None = None
    """Which of the request's items; None for the only one."""
    time: float | None = None
    """When it was found out, in seconds since the epoch; None for now."""
    line: int = 0
    """Where it stands in its file."""


@dataclass(frozen=True)
class Change:
    """An item of which two labels were said."""

    request: str
    item: int | None
    line: int
    before: str
    """What was said first."""
    label: str
    """What was said then."""
    counts: str
    """The one of them that is later, and counts."""


@dataclass(frozen=True)
class Joined:
    """What became of some labels; each of them is matched, unmatched or ambiguous."""

    matched: int = 0
    """Their predictions are in the log."""
    unmatched: int = 0
    """Kept until their predictions come, if ever: most requests may not have been sampled."""
    doubled: int = 0
    """Said before with the same label."""
    changed: tuple[Change, ...] = ()
    ambiguous: tuple[Label, ...] = ()
    """Of requests with several items, and none is named; not kept."""
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Labels that no model is known to have, and how often; kept."""


def read_labels(path: Path) -> list[Label]:
    """Read a CSV file of labels: a header with request and label, perhaps item and time.

    Raises:
        DataError: all rows that cannot be used, with their lines; or no such header.
        StorageError: it cannot be read.
    """
    labels: list[Label] = []
    problems: list[str] = []
    latest = time.time() + DAY_SECONDS
    with (
        translate_os_errors(f"read {path}"),
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream,
    ):
        rows = _number_rows(stream, problems)
        names = _read_header(path, next(rows, None), problems)
        for line, cells in rows:
            try:
                labels.append(_read_row(names, cells, line, latest))
            except ValueError as exc:
                problems.append(f"line {line}: {exc}")
    if problems:
        more = len(problems) - LISTED
        listed = [*problems[:LISTED], *([f"and {more:,} more"] if more > 0 else [])]
        raise DataError(
            f"{path}: {len(problems):,} rows cannot be used",
            remedy="mend them and run the same again; no label was kept",
            detail="\n".join(listed),
        )
    return labels


def join_labels(
    labels: Iterable[Label], records: Any, kept: Any, *, classes: Collection[str]
) -> tuple[Joined, list[dict[str, Any]]]:
    """Return what becomes of labels, and the rows that are to be kept.

    `records`: the log's, of these requests; `kept`: labels that are there already; `classes`: what
    a label may be, where that is known.
    """
    items = count_items(records)
    latest = index_labels(kept, items)
    counts: Counter[str] = Counter()
    changed: list[Change] = []
    ambiguous: list[Label] = []
    unknown: Counter[str] = Counter()
    fresh: dict[Key, Said] = {}
    now = time.time()
    for label in labels:
        if label.item is None and _has_several(items, label.request):
            ambiguous.append(label)
            continue
        key = _find_key(items, label.request, label.item)
        counts["matched" if _has(items, key) else "unmatched"] += 1
        if classes and label.label not in classes:
            unknown[label.label] += 1
        micro = int((now if label.time is None else label.time) * 1000) * 1000
        before = latest.get(key)
        if before is not None and before[1] == label.label:
            counts["doubled"] += 1
            continue
        if before is not None:
            # Said again for the same millisecond: whoever says it last knows better.
            micro = before[0] + 1 if micro // 1000 == before[0] // 1000 else micro
            counting = label.label if micro > before[0] else before[1]
            changed.append(
                Change(label.request, key[1], label.line, before[1], label.label, counting)
            )
            if counting != label.label:
                continue
        latest[key] = fresh[key] = (micro, label.label)
    joined = Joined(
        matched=counts["matched"],
        unmatched=counts["unmatched"],
        doubled=counts["doubled"],
        changed=tuple(changed),
        ambiguous=tuple(ambiguous),
        unknown=dict(unknown.most_common()),
    )
    return joined, [_make_row(key, *said) for key, said in fresh.items()]


def count_items(records: Any) -> Items:
    """Return the items of each request, by model and version."""
    found: dict[str, dict[tuple[str, str], set[int]]] = {}
    names = ("request", "model", "version", "item")
    for request, model, version, item in zip(
        *(records[name].to_pylist() for name in names), strict=True
    ):
        if request is not None:
            found.setdefault(request, {}).setdefault((model, version), set()).add(item)
    return found


def index_labels(kept: Any, items: Items) -> dict[Key, Said]:
    """Return the label that counts for each item of a request, with its time."""
    found: dict[Key, Said] = {}
    micros = kept["time"].cast("int64").to_pylist()
    columns = (kept[name].to_pylist() for name in ("request", "item", "label"))
    for request, item, label, micro in zip(*columns, micros, strict=True):
        key = _find_key(items, request, item)
        said = (micro, label)
        if key not in found or found[key] < said:
            found[key] = said
    return found


def list_classes(deployment: Deployment) -> set[str]:
    """Return the classes that the references in a deployment's archives know."""
    found: set[str] = set()
    for entry in deployment.list_entries():
        # One that cannot be read is for others to tell.
        with contextlib.suppress(ArchiveError, StorageError):
            reference = Reference.read(deployment.store / entry.archive)
            if reference is not None:
                found.update(map(str, reference.prediction))
    return found


def _find_key(items: Items, request: str, item: int | None) -> Key:
    """Return which item a label is of: the only one where none is named."""
    if item is None:
        only = set().union(*items.get(request, {}).values())
        if len(only) == 1:
            return request, only.pop()
    return request, item


def _has_several(items: Items, request: str) -> bool:
    return any(len(numbers) > 1 for numbers in items.get(request, {}).values())


def _has(items: Items, key: Key) -> bool:
    request, item = key
    found = items.get(request, {})
    return bool(found) and (item is None or any(item in numbers for numbers in found.values()))


def _make_row(key: Key, micro: int, label: str) -> dict[str, Any]:
    when = EPOCH + timedelta(microseconds=micro)
    return {"request": key[0], "item": key[1], "label": label, "time": when}


def _number_rows(stream: Iterable[str], problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the line on which it begins."""
    reader = csv.reader(stream, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            problems.append(f"line {line}: {exc}")
            continue
        if cells:
            yield line, cells


def _read_header(path: Path, first: tuple[int, list[str]] | None, problems: list[str]) -> list[str]:
    """Return the columns' names."""
    names = [name.strip() for name in first[1]] if first else []
    doubled = [name for name in COLUMNS if names.count(name) > 1]
    if problems or doubled or not set(NEEDED) <= set(names):
        raise DataError(
            f"{path} has no header of labels",
            expected="request,label and perhaps item,time in its first line",
            found=problems[0] if problems else repr(",".join(names)[:200]) if names else "nothing",
        )
    return names


def _read_row(names: list[str], cells: list[str], line: int, latest: float) -> Label:
    """Return a row's label.

    Raises:
        ValueError: it says none.
    """
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells, and the header has {len(names)}")
    row = dict(zip(names, cells, strict=True))
    request, label, item, moment = (row.get(name, "") for name in COLUMNS)
    for name, text in (("request", request), ("label", label)):
        _check_text(name, text)
    return Label(
        request,
        label,
        _read_item(item) if item.strip() else None,
        _read_time(moment.strip(), latest) if moment.strip() else None,
        line,
    )


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"no {name}")
    if len(text) > CELL:
        raise ValueError(f"a {name} of {len(text):,} characters")
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        raise ValueError(f"the {name} is no UTF-8")


def _read_item(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and len(text) < 10):
        raise ValueError(f"no item: {text[:40]!r}, expected a number from 0")
    return int(text)


def _read_time(text: str, latest: float) -> float:
    try:
        moment = parse_time(text)
    except (ValueError, OverflowError):
        moment = math.nan
    if not 0 <= moment <= latest:
        raise ValueError(
            f"no time: {text[:40]!r}, expected ISO 8601 or seconds since the epoch, and not ahead"
        )
    return moment


def parse_time(text: str) -> float:
    """Return seconds since the epoch; a time without a zone is in UTC."""
    try:
        return float(text)
    except ValueError:
        # Python 3.10 knows no Z.
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
