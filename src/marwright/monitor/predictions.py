"""The prediction log: what models answered, sampled by workers and kept in Parquet by day."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from marwright.errors import ConfigurationError, NoServerError, StorageError, UsageError
from marwright.monitor.feedback import Joined, Label, join_labels
from marwright.monitor.ledger import LEDGER_NAME, Ledger
from marwright.monitor.parts import (
    LABEL_SCHEMA,
    Part,
    list_days,
    list_parts,
    measure_folder,
    name_part,
    open_part,
    sweep,
    tell_day,
    write_part,
)
from marwright.monitor.retention import merge_parts, remove_old, remove_surplus
from marwright.monitor.spool import (
    SCHEMA,
    SPOOL_NAME,
    Record,
    SpoolFile,
    arrow,
    build_table,
    compute,
    list_spool,
    read_record,
    stamp,
)
from marwright.server.deployment import Deployment
from marwright.server.registry import DEPLOYMENT_NAME, find_record
from marwright.storage import lock_file, translate_os_errors

__all__ = ["Collected", "find_log", "PredictionLog"]

_log = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""How long one process waits for another that collects."""
TRIES = 4
PIECE_BYTES = 8 << 20
"""How much of the spool becomes one change: what is in memory at once."""
OPEN_FILES = 64
KNOWN_PARTS = 20_000
DAY_SECONDS = 86400.0
AHEAD_SECONDS = 60.0
"""How far a worker's clock may be ahead of this one's: more would own the last window till then."""

_Result = TypeVar("_Result")


@dataclass
class Collected:
    """What one collection did."""

    rows: int = 0
    """Predictions that are in Parquet now."""
    skipped: int = 0
    """Lines that were no record."""
    skewed: int = 0
    """Predictions from a clock that was ahead, which have the time of their collection now."""
    expired: int = 0
    """Predictions older than the days that are kept."""
    dropped: int = 0
    """Rows, perhaps of earlier collections, for which the log had no room."""
    size: int = 0
    """Bytes of the log after it."""


@dataclass
class _Batch:
    """What one change of the log is going to take from the spool."""

    offsets: dict[str, tuple[str, int]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    files: list[SpoolFile] = field(default_factory=list)
    """Files that are read to their end."""
    size: int = 0


class PredictionLog:
    """A folder of predictions: the spool that workers write, Parquet by day, labels by day.

    Any number of processes may collect and read it at once, and each may be killed at any moment:
    no record is lost or doubled by that.
    """

    def __init__(self, folder: Path, *, keep_days: int = 30, most_bytes: int = 1 << 30) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.keep_days = keep_days
        self.most_bytes = most_bytes
        self._versions: dict[str, frozenset[tuple[str, str]] | None] = {}
        """What is in each part that was opened; parts never change."""

    def collect(self) -> Collected:
        """Move what stands in whole lines of the spool to Parquet, and let go of what is too much.

        Raises:
            StorageError: a full disk, missing rights; the spool has all that is not in Parquet.
        """
        done = Collected()
        with self._hold():
            ledger = self._settle()
            remove_old(self.folder, self.keep_days)
            done.dropped += remove_surplus(self.folder, self.most_bytes)
            ledger = self._collect_spool(ledger, done)
            try:
                merge_parts(self.folder, ledger, most_bytes=self.most_bytes)
            except StorageError as exc:  # all is there, in more files than it might be
                _log.warning("parts of %s are not merged: %s", self.folder, exc)
            done.dropped += remove_surplus(self.folder, self.most_bytes)
            done.size = measure_folder(self.folder)
        return done

    def read_window(
        self, model: str, version: str, rows: int, *, columns: Collection[str] | None = None
    ) -> Any:
        """Return a version's last predictions, newest last, from Parquet and spool.

        Requests that failed are none, nor what was kept while the clock was ahead of what it is
        now. `columns`: all but the inputs where not said.
        """
        latest = datetime.fromtimestamp(time.time() + AHEAD_SECONDS, timezone.utc)
        wanted = columns or [name for name in SCHEMA.names if name != "input"]
        needed = {*wanted, "time", "model", "version", "status"}

        def select(table: Any) -> Any:
            found = table.filter(_match(table, model, version))
            failed = compute.greater_equal(found["status"], 400).fill_null(False)
            return found.filter(compute.and_not(compute.less_equal(found["time"], latest), failed))

        table = self._read(
            lambda ledger: self._read_last(ledger, rows, needed, select, {(model, version)})
        )
        return table.take(compute.sort_indices(table["time"])).select(list(wanted))

    def read_recent(
        self,
        *,
        model: str | None = None,
        version: str | None = None,
        limit: int,
        failed: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the last records, newest first, `time` in seconds since the epoch.

        `failed`: only requests that were answered with an error status.
        """

        def select(table: Any) -> Any:
            found = table.filter(_match(table, model, version))
            if not failed:
                return found
            return found.filter(compute.greater_equal(found["status"], 400).fill_null(False))

        names, keys = SCHEMA.names, ("model", "version", "status") if failed else ()
        table = self._read(lambda ledger: self._read_last(ledger, limit, names, select, None, keys))
        rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
        rows.sort(key=lambda row: row["time"], reverse=True)
        return [{**row, "time": row["time"].timestamp()} for row in rows]

    def list_versions(self) -> list[tuple[str, str]]:
        """Return each model and version of which there is a record."""

        def find(ledger: Ledger) -> set[tuple[str, str]]:
            found: set[tuple[str, str]] = set()
            for place in self._list_places(ledger):
                if (known := self._versions.get(place)) is not None:
                    found |= known
                    continue
                with self._open(place) as part:
                    if part is None or part.versions is not None:
                        found |= part.versions if part and part.versions else set()
                        continue
                    for table in _read_groups(part, ["model", "version"]):
                        found |= _list_pairs(table)
            for table in self._read_spool(ledger):
                found |= _list_pairs(table)
            return found

        return sorted(self._read(find))

    def measure(self) -> int:
        """Return the bytes of the log."""
        return measure_folder(self.folder)

    def gather(self, columns: Collection[str], select: Callable[[Any], Any]) -> Any:
        """Return what `select` finds in the records, a table at once, in no order."""
        return self._read(lambda ledger: self._gather(ledger, columns, select))

    def gather_labels(self, requests: Any = None) -> Any:
        """Return the labels that came late; of some requests, or of all."""
        return self._read(lambda ledger: self._gather_labels(ledger, requests))

    def add_labels(self, labels: Collection[Label], *, classes: Collection[str] = ()) -> Joined:
        """Keep labels that came late, beside the predictions that they belong to.

        `classes`: labels that the models are known to have, beside those that they predicted.
        """
        requests = arrow.array({label.request for label in labels}, arrow.string())

        def select(table: Any) -> Any:
            return table.filter(compute.is_in(table["request"], value_set=requests))

        def list_predicted(table: Any) -> Any:
            return arrow.table({"prediction": compute.unique(table["prediction"])})

        with self._hold():
            ledger = self._settle()
            predicted = self._gather(ledger, ["prediction"], list_predicted)["prediction"]
            joined, rows = join_labels(
                labels,
                self._gather(ledger, ["request", "item", "model", "version"], select),
                self._gather_labels(ledger, requests),
                classes={*classes, *filter(None, predicted.to_pylist())},
            )
            if rows:
                place = name_part(tell_day(time.time()), ledger.generation + 1, labels=True)
                table = arrow.Table.from_pylist(rows, schema=LABEL_SCHEMA)
                write_part(self.folder / place, [table], LABEL_SCHEMA, None)
                ledger.advance(adds=[place]).commit(self.folder)
        return joined

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """Keep all others from changing the log while the block runs; wait for those who do.

        Raises:
            StorageError: they took too long, or the folder cannot be written.
        """
        path = self.folder / f".{LEDGER_NAME}.lock"
        deadline = time.monotonic() + WAIT_SECONDS
        with translate_os_errors(f"write {self.folder}"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while path.is_symlink() or (stream := lock_file(path)) is None:
                if path.is_symlink() or time.monotonic() > deadline:
                    raise StorageError(
                        f"{self.folder} is in use",
                        found=f"{path} {'is a link' if path.is_symlink() else 'is locked'}",
                        remedy="wait until whoever collects it has ended; remove a link",
                    )
                time.sleep(0.02)
        with stream:
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _settle(self) -> Ledger:
        """Bring what others were killed at to its end; return the ledger."""
        ledger = Ledger.read(self.folder)
        ledger.settle(self.folder)
        sweep(self.folder)
        return ledger

    def _collect_spool(self, ledger: Ledger, done: Collected) -> Ledger:
        most = min(PIECE_BYTES, max(1 << 18, self.most_bytes // 4))
        batch = _Batch()
        with contextlib.ExitStack() as opened:
            for path in list_spool(self.folder):
                file = SpoolFile.open(path, take=True)
                if file is None:
                    continue
                opened.callback(file.close)
                for piece in file.read(_find_start(ledger, file), most):
                    batch.records += self._sort_out(piece.lines, done)
                    batch.offsets[file.name] = (file.head, piece.end)
                    batch.size += sum(map(len, piece.lines))
                    if batch.size >= most:
                        ledger, batch = self._commit(ledger, batch, done), _Batch()
                batch.files.append(file)
                if len(batch.files) >= OPEN_FILES:
                    ledger, batch = self._commit(ledger, batch, done), _Batch()
            return self._commit(ledger, batch, done)

    def _sort_out(self, lines: Iterable[bytes], done: Collected) -> list[Record]:
        """Return the records in some lines, and count what is none, or has an absurd time."""
        now = time.time()
        oldest = _find_end(tell_day(now - self.keep_days * DAY_SECONDS)) - DAY_SECONDS
        records = []
        for line in lines:
            record = read_record(line)
            if record is None:
                done.skipped += 1
            elif record[0] > now + AHEAD_SECONDS:
                done.skewed += 1
                records.append(stamp(record, now))
            elif record[0] < oldest:
                done.expired += 1
            else:
                records.append(record)
        return records

    def _commit(self, ledger: Ledger, batch: _Batch, done: Collected) -> Ledger:
        """Make a batch's change, and remove the spool files that are collected whole."""
        if batch.offsets:
            records = sorted(batch.records, key=lambda record: record[0])
            days = {
                tell_day(number * DAY_SECONDS): list(group)
                for number, group in groupby(records, lambda record: record[0] // DAY_SECONDS)
            }
            ahead = ledger.generation + 1
            places = {name_part(day, ahead): records for day, records in days.items()}
            there = {path.name for path in list_spool(self.folder)}
            known = {name: at for name, at in ledger.offsets.items() if name in there}
            ledger = ledger.advance(offsets={**known, **batch.offsets}, adds=places)
            self._write_parts(ledger, places)
            ledger.commit(self.folder)
            done.rows += len(batch.records)
        for file in batch.files:
            if file.is_whole:
                (self.folder / SPOOL_NAME / file.name).unlink(missing_ok=True)
            file.close()
        return ledger

    def _write_parts(self, ledger: Ledger, places: dict[str, list[Record]]) -> None:
        try:
            for place, records in places.items():
                versions = {(record[3], record[4]) for record in records}
                write_part(self.folder / place, [build_table(records)], SCHEMA, versions)
        except BaseException:
            ledger.discard(self.folder)
            raise

    def _read(self, read: Callable[[Ledger], _Result]) -> _Result:
        """Return what is read of the log as it is at one moment, whoever changes it meanwhile."""
        for _ in range(TRIES):
            ledger = Ledger.read(self.folder)
            result = read(ledger)
            if Ledger.read(self.folder).generation == ledger.generation:
                return result
        with self._hold():
            return read(Ledger.read(self.folder))

    def _read_spool(self, ledger: Ledger) -> Iterator[Any]:
        """Yield what is not collected yet, a table at once."""
        for path in list_spool(self.folder):
            file = SpoolFile.open(path, take=False)
            if file is None:
                continue
            with contextlib.closing(file):
                for piece in file.read(_find_start(ledger, file), PIECE_BYTES):
                    yield build_table(self._sort_out(piece.lines, Collected()))

    def _list_places(self, ledger: Ledger) -> list[str]:
        days = list_days(self.folder)
        return [place for day in days for place in list_parts(self.folder, day, ledger=ledger)]

    @contextlib.contextmanager
    def _open(self, place: str) -> Iterator[Part | None]:
        """Yield a part, and remember what is in it; None where it has gone or is broken."""
        with open_part(self.folder / place) as part:
            if part is not None:
                if len(self._versions) > KNOWN_PARTS:
                    self._versions.clear()
                self._versions[place] = part.versions
            yield part

    def _may_have(self, place: str, wanted: set[tuple[str, str]] | None) -> bool:
        known = self._versions.get(place)
        return not wanted or known is None or bool(wanted & known)

    def _gather(
        self, ledger: Ledger, columns: Collection[str], select: Callable[[Any], Any]
    ) -> Any:
        names = list(columns)
        found = [select(table.select(names)) for table in self._read_spool(ledger)]
        for place in self._list_places(ledger):
            with self._open(place) as part:
                found += [select(table) for table in (_read_groups(part, names) if part else ())]
        if not found:
            return select(SCHEMA.empty_table().select(names))
        return arrow.concat_tables(table.replace_schema_metadata(None) for table in found)

    def _gather_labels(self, ledger: Ledger, requests: Any) -> Any:
        found = [LABEL_SCHEMA.empty_table()]
        for day in list_days(self.folder, labels=True):
            for place in list_parts(self.folder, day, labels=True, ledger=ledger):
                with open_part(self.folder / place) as part:
                    for table in _read_groups(part, LABEL_SCHEMA.names) if part else ():
                        found.append(
                            table
                            if requests is None
                            else table.filter(compute.is_in(table["request"], value_set=requests))
                        )
        return arrow.concat_tables(table.replace_schema_metadata(None) for table in found)

    def _read_last(
        self,
        ledger: Ledger,
        rows: int,
        columns: Collection[str],
        select: Callable[[Any], Any],
        wanted: set[tuple[str, str]] | None,
        keys: Collection[str] = (),
    ) -> Any:
        """Return the latest rows that `select` finds, in no order; the latest days are read first.

        `wanted`: models and versions that a part must have to be read. `keys`: columns by which
        `select` finds rows, where few are expected; the others are read only of groups with any.
        """
        names = [name for name in SCHEMA.names if name in columns]
        last = _Last(SCHEMA.empty_table().select(names), rows)
        for table in self._read_spool(ledger):
            last.add(select(table.select(names)))
        for day in list_days(self.folder):
            if last.is_after(_find_end(day)):
                break
            with contextlib.ExitStack() as opened:
                groups = []
                for place in list_parts(self.folder, day, ledger=ledger):
                    if self._may_have(place, wanted):
                        part = opened.enter_context(self._open(place))
                        if part and self._may_have(place, wanted):
                            groups += [(latest, n, part) for latest, n in part.list_groups()]
                for latest, number, part in sorted(groups, key=lambda group: -group[0]):
                    if last.is_after(latest):
                        break
                    sought = _read_groups(part, keys, [number]) if keys else ()
                    if not keys or any(select(table).num_rows for table in sought):
                        for table in _read_groups(part, names, [number]):
                            last.add(select(table))
        return last.take()


class _Last:
    """The latest of the rows that are added, so many of them."""

    def __init__(self, empty: Any, rows: int) -> None:
        self._tables = [empty]
        self._rows = rows
        self._count = 0
        self._oldest: float | None = None
        """The time of the last one that is among them, once there are enough."""

    def add(self, table: Any) -> None:
        """Add some rows, in any order."""
        self._tables.append(table.replace_schema_metadata(None))
        self._count += table.num_rows
        if self._count >= self._rows:
            self._tables = [self.take()]
            self._count = self._rows
            if self._rows:
                self._oldest = compute.min(self._tables[0]["time"]).as_py().timestamp()

    def is_after(self, seconds: float) -> bool:
        """Return whether no row of that time or before could be among them."""
        return not self._rows or (self._oldest is not None and self._oldest > seconds)

    def take(self) -> Any:
        """Return them, in no order."""
        table = arrow.concat_tables(self._tables).combine_chunks()
        order = compute.sort_indices(table, sort_keys=[("time", "descending")])
        return table.take(order[: self._rows])


def find_log(
    *, folder: Path | None = None, server: str | None = None
) -> tuple[PredictionLog, Deployment | None]:
    """Return the log in a folder, or of a server that runs here, or of ./deploy.yaml.

    With it comes the deployment that keeps it, where that is known.

    Raises:
        UsageError: none of them is there, or it is not clear which is meant.
        NoServerError: no server of this name runs.
        ConfigurationError: the deploy.yaml keeps no log, or cannot be used.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(
                f"there is no folder {folder}", remedy="name the folder of a prediction log"
            )
        return PredictionLog(folder), None
    path = _find_deployment(server)
    deployment = Deployment.parse(path)[0]
    settings = deployment.monitoring.predictions
    if settings is None:
        raise ConfigurationError(
            f"{path} keeps no prediction log",
            remedy="write into it: monitoring: {predictions: true}; or name a folder: --folder",
        )
    log = PredictionLog(
        settings.folder, keep_days=settings.keep_days, most_bytes=settings.most_bytes
    )
    return log, deployment


def _find_deployment(server: str | None) -> Path:
    """Return the deploy.yaml of a server, of the only one, or the one that stands here."""
    here = Path(DEPLOYMENT_NAME)
    try:
        record = find_record(server)
    except (NoServerError, UsageError):
        if server is None and here.is_file():
            return here
        raise
    if record.config:
        return Path(record.config)
    raise ConfigurationError(
        f"the server {record.name} was started without a deploy.yaml, and keeps no prediction log",
        remedy="name a folder: --folder",
    )


def _find_start(ledger: Ledger, file: SpoolFile) -> int:
    """Return how far a spool file has been collected."""
    head, end = ledger.offsets.get(file.name, ("", 0))
    return end if head == file.head else 0


def _find_end(day: str) -> float:
    """Return when a day ends, in seconds since the epoch."""
    return datetime.fromisoformat(day).replace(tzinfo=timezone.utc).timestamp() + DAY_SECONDS


def _match(table: Any, model: str | None, version: str | None) -> Any:
    """Return which rows are of a model and version; of any where not said."""
    mask = arrow.repeat(True, table.num_rows)
    for name, value in (("model", model), ("version", version)):
        if value is not None:
            mask = compute.and_(mask, compute.equal(table[name], value))
    return mask


def _list_pairs(table: Any) -> set[tuple[str, str]]:
    pairs = table.select(["model", "version"]).group_by(["model", "version"]).aggregate([])
    return {(row["model"], row["version"]) for row in pairs.to_pylist()}


def _read_groups(
    part: Part, columns: Collection[str], numbers: Iterable[int] | None = None
) -> Iterator[Any]:
    """Yield a part's groups of rows, as far as they can be read."""
    names = list(columns)
    try:
        for number in range(part.file.metadata.num_row_groups) if numbers is None else numbers:
            yield part.read(number, names).select(names)
    except (arrow.ArrowException, OSError) as exc:
        _log.warning("%s cannot be read to its end: %s", part.path, exc)
