from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.errors import DataError, UsageError
from marwright.training.sources import load_data

GOOD = "a,b,label\n" + "".join(f"{i},{i / 2},{'xyz'[i % 3]}\n" for i in range(9))


def load(folder: Path, text: str | bytes, **options: Any) -> Any:
    path = folder / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_data(f"table:{path}", **options)


def write_parquet(path: Path, **columns: Any) -> str:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return f"table:{path}"


def test_columns_become_inputs_and_labels_classes(tmp_path: Path) -> None:
    data = load(tmp_path, GOOD)
    assert (data.columns, data.classes, data.is_table) == (("a", "b"), ("x", "y", "z"), True)
    assert (data.inputs.shape, data.inputs.dtype) == ((9, 2), torch.float32)
    assert data.inputs[3].tolist() == [3.0, 1.5]
    assert data.labels.tolist() == [0, 1, 2] * 3
    assert data.labels.dtype == torch.int64
    assert data.open_sample is None
    assert data.name == f"table:{tmp_path}/rows.csv"


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_separator_is_found(tmp_path: Path, mark: str) -> None:
    data = load(tmp_path, GOOD.replace(",", mark))
    assert torch.equal(data.inputs, load(tmp_path, GOOD).inputs)


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    text = GOOD.replace("a,", '"a, in m",', 1).replace("\n", "\r\n").replace("3,1.5", ' "3",1.5 ')
    data = load(tmp_path, b"\xef\xbb\xbf" + text.replace(' "3"', '"3"').encode() + b"\r\n")
    assert data.columns == ("a, in m", "b")
    assert data.inputs[3].tolist() == [3.0, 1.5]


@pytest.mark.parametrize(
    ("header", "label", "columns"),
    [
        ("label,b,c", None, ("b", "c")),
        ("a,b,kind", None, ("a", "b")),
        ("a,b,label", "a", ("b", "label")),
    ],
)
def test_the_label_is_the_column_named_or_label_or_the_last(
    tmp_path: Path, header: str, label: str | None, columns: tuple[str, ...]
) -> None:
    data = load(tmp_path, header + "\n" + "0,1,0\n1,2,1\n" * 3, label=label)
    assert data.columns == columns
    assert len(data.classes) == 2


def test_whole_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = "".join(f"1,{label}\n" for label in (10, 9, -1) for _ in range(3))
    assert load(tmp_path, "a,label\n" + rows).classes == ("-1", "9", "10")


def test_a_digest_tells_tables_apart(tmp_path: Path) -> None:
    digest = load(tmp_path, GOOD).digest
    assert load(tmp_path, GOOD.replace(",", ";")).digest == digest
    assert load(tmp_path, GOOD.replace("3,1.5", "3,1.25")).digest != digest
    swapped = GOOD.replace("3,1.5,x", "3,1.5,y").replace("4,2.0,y", "4,2.0,x")
    assert load(tmp_path, swapped).digest != digest


@pytest.mark.parametrize(
    "text", ["one", "nan", "inf", "-Infinity", "1e39", "1_000", "0x10", "1.5 m", "True"]
)
def test_a_feature_that_is_no_number_is_found_by_line_and_column(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.csv, line 5, column b: .*found '{text}'"):
        load(tmp_path, GOOD.replace("3,1.5", f"3,{text}"))


def test_empty_cells_are_found_by_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 5, column b: .*an empty cell"):
        load(tmp_path, GOOD.replace("3,1.5", "3, "))
    with pytest.raises(DataError, match=r"line 5, column label: .*an empty cell"):
        load(tmp_path, GOOD.replace("3,1.5,x", "3,1.5,"))


@pytest.mark.parametrize("row", ["3,1.5", "3,1.5,x,", "3"])
def test_a_row_of_another_width_is_found_by_its_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"line 5: .*expected 3 cells, found [124]"):
        load(tmp_path, GOOD.replace("3,1.5,x", row))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("a,b,label\n", "has no rows"),
        ("a,a,label\n1,2,x\n", "columns of one name: found a"),
        (",a,label\n0,1,x\n", "column without a name: found column 1; .*index=False"),
        ("label\nx\ny\n", "has one column"),
        ("a,label\n" + "1,x\n" * 9, "has one class: .*found x"),
        (GOOD + "1,1,rare\n" * 2, r"too few rows: .*at least 3.*found rare \(2\)"),
        (b"a,label\n\xff\xfe,x\n", "not text in UTF-8"),
        ('a,label\n"' + "1" * 200_000 + '",x\n', "line .*: no CSV"),
    ],
)
def test_what_no_training_can_use_is_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text)


def test_an_unknown_label_column_is_refused_with_the_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'kind': expected a, b, label"):
        load(tmp_path, GOOD, label="kind")


def test_labels_that_are_measurements_are_refused(tmp_path: Path) -> None:
    rows = [f"1,{label / 8}\n" for label in range(101)]
    with pytest.raises(DataError, match="look like measurements; marwright trains classifiers"):
        load(tmp_path, "a,price\n" + "".join(rows * 3))
    assert len(load(tmp_path, "a,price\n" + "".join(rows[:100] * 3)).classes) == 100
    whole = "".join(f"1,{label}\n" for label in range(150))
    assert len(load(tmp_path, "a,kind\n" + whole * 3).classes) == 150


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.csv"):
        load_data(f"table:{tmp_path}/none.csv")
    with pytest.raises(DataError, match="is a folder"):
        load_data(f"table:{tmp_path}")


def test_a_table_has_no_image_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image size"):
        load(tmp_path, GOOD, image_size=(8, 8))


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "rows.parquet",
        a=list(range(9)),
        b=[i / 2 for i in range(9)],
        label=list("xyz" * 3),
    )
    data, text = load_data(source), load(tmp_path, GOOD)
    assert (data.columns, data.classes, data.digest) == (text.columns, text.classes, text.digest)
    assert torch.equal(data.inputs, text.inputs)


def test_parquets_whole_and_truth_values_are_numbers(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "t.pq", yes=[True, False] * 3, kind=[10, 9] * 3)
    data = load_data(source)
    assert data.inputs[:, 0].tolist() == [1.0, 0.0] * 3
    assert data.classes == ("9", "10")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1.0, None, 2.0]}, "row 2, column a: no number: .*an empty cell"),
        ({"a": [1.0, 2.0, math.nan]}, "row 3, column a: no number: .*found nan"),
        ({"a": ["1", "2", "3"]}, "column a: no numbers: .*found string"),
        ({"a": [1, 2, 3], "label": ["x", None, "y"]}, "row 2, column label: no label"),
        ({"__index_level_0__": [1, 2, 3]}, "an index of pandas"),
        ({"a": []}, "has no rows"),
    ],
)
def test_parquets_faults_are_found_by_row_and_column(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    labels = ["x", "y", "x"][: len(next(iter(columns.values())))]
    source = write_parquet(tmp_path / "t.parquet", **{"label": labels, **columns})
    with pytest.raises(DataError, match=message):
        load_data(source)


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "t.parquet", a=[1, 2], label=["x", "y"])
    whole = (tmp_path / "t.parquet").read_bytes()
    for damaged in (b"", b"a,label\n1,x\n", whole[:-20], whole[:40] + bytes(60) + whole[100:]):
        (tmp_path / "t.parquet").write_bytes(damaged)
        with pytest.raises(DataError):
            load_data(source)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'marwright\[parquet\]'"):
        load_data(f"table:{tmp_path}/t.parquet")
