"""A table of numbers with a label column: CSV, or Parquet with the extra `parquet`.

Columns are a model's inputs in the file's order, without the label; labels become classes.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marwright.errors import DataError, UsageError
from marwright.storage import translate_os_errors

from .data import FEWEST_OF_A_CLASS, DataSet

__all__ = ["load_table"]

_SEPARATORS = (",", ";", "\t")
_MOST_FLOAT_LABELS = 100
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Table:
    """A table's cells, features already numbers."""

    columns: tuple[str, ...]
    """Without the label."""
    rows: list[list[float]]
    labels: list[str]


def load_table(name: str, path: Path, *, label: str | None = None) -> DataSet:
    """Load a table as (N, columns) float32; `.parquet` and `.pq` are Parquet, all else is CSV.

    The label is the column `label` names; else the one called "label", else the last.

    Raises:
        DataError: no such file, or cells, columns or labels that no training can use.
        StorageError: the file may not be read.
        UsageError: Parquet without pyarrow.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder", expected="a CSV or Parquet file")
    if not path.exists():
        raise DataError(f"there is no file {path}", expected="a CSV or Parquet file")
    read = _read_parquet if path.suffix.lower() in (".parquet", ".pq") else _read_csv
    table = read(path, label)
    if not table.rows:
        raise DataError(f"{path} has no rows", expected="a header and rows below it")
    classes = _sort_classes(path, table.labels)
    _check_counts(path, Counter(table.labels), classes)
    inputs = np.array(table.rows, np.float32)
    indices = {text: index for index, text in enumerate(classes)}
    labels = np.array([indices[text] for text in table.labels], np.int64)
    return DataSet(
        name=name,
        inputs=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        classes=classes,
        digest=hashlib.sha256(inputs.tobytes() + labels.tobytes()).hexdigest(),
        open_sample=None,
        columns=table.columns,
    )


def _read_csv(path: Path, label: str | None) -> _Table:
    """Read CSV with a header; the separator is what splits the header most."""
    rows: list[list[float]] = []
    labels: list[str] = []
    reader: Any = None
    try:
        with (
            translate_os_errors(f"read {path}"),
            path.open(encoding="utf-8-sig", newline="") as stream,
        ):
            first = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=_find_separator(first))
            columns = [name.strip() for name in next(reader, [])]
            place = _place_label(path, columns, label)
            for cells in reader:
                if not cells:  # a blank line
                    continue
                where = f"{path}, line {reader.line_num}"
                _check_width(where, cells, columns)
                labels.append(_read_label(f"{where}, column {columns[place]}", cells[place]))
                rows.append(
                    [
                        _read_number(f"{where}, column {name}", text)
                        for index, (name, text) in enumerate(zip(columns, cells, strict=True))
                        if index != place
                    ]
                )
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not text in UTF-8", expected="CSV", found=str(exc)) from exc
    except csv.Error as exc:
        where = f"{path}, line {reader.line_num}"
        raise DataError(f"{where}: no CSV", found=str(exc)) from exc
    return _Table(tuple(columns[:place] + columns[place + 1 :]), rows, labels)


def _find_separator(header: str) -> str:
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))


def _place_label(path: Path, columns: Sequence[str], label: str | None) -> int:
    """Return the label column's index, after a look at all names."""
    if not columns:
        raise DataError(f"{path} has no rows", expected="a header and rows below it")
    doubles = [name for name, count in Counter(columns).items() if count > 1 and name]
    if doubles:
        raise DataError(f"{path} has columns of one name", found=", ".join(doubles))
    # pandas' index is the number of a row: in a sorted table it would give the label away.
    if "" in columns or "__index_level_0__" in columns:
        raise DataError(
            f"{path} has a column without a name",
            found=f"column {columns.index('') + 1}" if "" in columns else "an index of pandas",
            remedy="name it, or write the table with index=False",
        )
    if label is not None and label not in columns:
        raise DataError(f"{path} has no column {label!r}", expected=", ".join(columns))
    if len(columns) < 2:
        raise DataError(f"{path} has one column", expected="features and a label", found=columns[0])
    if label is None:
        label = "label" if "label" in columns else columns[-1]
    return columns.index(label)


def _check_width(where: str, cells: Sequence[str], columns: Sequence[str]) -> None:
    if len(cells) != len(columns):
        raise DataError(
            f"{where}: a row of another width",
            expected=f"{len(columns)} cells",
            found=str(len(cells)),
        )


def _read_label(where: str, text: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: no label", found="an empty cell")
    return text.strip()


def _read_number(where: str, text: str) -> float:
    """Return a finite number that float32 can hold; `1_000`, which Python takes, is none."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) <= _LARGEST:  # not a number, too
        found = repr(text) if text.strip() else "an empty cell"
        raise DataError(f"{where}: no number", expected="a finite number", found=found)
    return value


def _read_parquet(path: Path, label: str | None) -> _Table:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as exc:
        raise UsageError(
            f"{path} is Parquet, and pyarrow is not installed",
            remedy="pip install 'marwright[parquet]'",
        ) from exc
    try:
        # One file, never a data set of many: a folder's name would add a column.
        content = parquet.ParquetFile(path).read()
    except (arrow.ArrowException, OSError) as exc:
        message = " ".join(str(exc).split())
        raise DataError(f"{path} is no whole Parquet file", found=message) from exc
    columns = [str(name) for name in content.column_names]
    place = _place_label(path, columns, label)
    if not content.num_rows:  # its columns may have no type either
        return _Table((), [], [])
    features = [name for index, name in enumerate(columns) if index != place]
    numbers = [
        _read_column(f"{path}, column {columns[index]}", content.column(index), arrow)
        for index in range(len(columns))
        if index != place
    ]
    labels = [
        _read_label(f"{path}, row {row}, column {columns[place]}", "" if value is None else value)
        for row, value in enumerate(_list_labels(content.column(place)), start=1)
    ]
    return _Table(tuple(features), [list(row) for row in zip(*numbers, strict=True)], labels)


def _list_labels(column: Any) -> Iterator[str | None]:
    for value in column.to_pylist():
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        yield None if text is None else str(text)


def _read_column(where: str, column: Any, arrow: Any) -> list[float]:
    """Return a column's numbers; whole, decimal and truth values count as such."""
    tests: list[Callable[[Any], bool]] = [
        arrow.types.is_integer,
        arrow.types.is_floating,
        arrow.types.is_decimal,
        arrow.types.is_boolean,
    ]
    if not any(test(column.type) for test in tests):
        raise DataError(f"{where}: no numbers", expected="numbers", found=str(column.type))
    values: list[float | None] = [
        None if value is None else float(value) for value in column.to_pylist()
    ]
    numbers = []
    for row, value in enumerate(values, start=1):
        if value is None or not abs(value) <= _LARGEST:
            found = "an empty cell" if value is None else repr(value)
            place = where.replace(", column", f", row {row}, column", 1)
            raise DataError(f"{place}: no number", expected="a finite number", found=found)
        numbers.append(value)
    return numbers


def _sort_classes(path: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct labels: by value where all are numbers, else as text."""
    distinct = set(labels)
    values = {text: _parse_label(text) for text in distinct}
    if any(value is None for value in values.values()):
        return tuple(sorted(distinct))
    whole = all(isinstance(value, int) for value in values.values())
    if not whole and len(distinct) > _MOST_FLOAT_LABELS:
        raise DataError(
            f"the labels of {path} look like measurements; marwright trains classifiers",
            expected=f"at most {_MOST_FLOAT_LABELS} distinct labels that are no whole numbers",
            found=f"{len(distinct):,}, such as {sorted(distinct)[0]}",
            remedy="name another column by --label, or sort the values into classes",
        )
    return tuple(sorted(distinct, key=lambda text: (values[text] or 0, text)))


def _parse_label(text: str) -> int | float | None:
    for parse in (int, float):
        try:
            value = parse(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


def _check_counts(path: Path, counts: Counter[str], classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{path} has one class", expected="two or more labels", found=", ".join(classes)
        )
    scarce = [f"{text} ({counts[text]})" for text in classes if counts[text] < FEWEST_OF_A_CLASS]
    if scarce:
        raise DataError(
            f"classes in {path} have too few rows",
            expected=f"at least {FEWEST_OF_A_CLASS}: training, validation and test need one each",
            found=", ".join(scarce[:10]) + (", ..." if len(scarce) > 10 else ""),
            remedy="add rows, or take the class out",
        )
