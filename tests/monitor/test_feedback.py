from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.archive import Spec, pack_spec
from marwright.errors import DataError, StorageError
from marwright.monitor.feedback import Change, Joined, Label, list_classes, read_labels
from marwright.monitor.predictions import PredictionLog
from marwright.server.deployment import Deployment

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def log(tmp_path: Path) -> PredictionLog:
    return PredictionLog(tmp_path / "predictions")


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


Csv = Callable[[str | bytes], Path]


def list_said(log: PredictionLog) -> dict[tuple[str, int | None], str]:
    """The last label of each item, as it is kept."""
    rows = sorted(log.gather_labels().to_pylist(), key=lambda row: row["time"])
    return {(row["request"], row["item"]): row["label"] for row in rows}


def test_rows_are_read_by_the_rules_of_csv(write_csv: Csv) -> None:
    path = write_csv(
        '\ufefflabel,request,note,item,time\r\n"seven, or ""7""",r1,,,\r\n'
        '"two\nlines",r2,x,3,2026-01-02T03:04:05Z\r\n\r\n7,r3,,0,1764313200.5\r\n'
    )
    assert read_labels(path) == [
        Label("r1", 'seven, or "7"', line=2),
        Label("r2", "two\nlines", 3, 1767323045.0, 3),
        Label("r3", "7", 0, 1764313200.5, 6),
    ]


def test_all_rows_that_cannot_be_used_are_listed_with_their_lines(write_csv: Csv) -> None:
    ahead = time.time() + 2 * 86400
    lines = [
        b"request,label,item,time",
        b"r1,7,,",
        b"r2",
        b",7,,",
        b"r3, ,,",
        b"r4,7,-1,",
        b"r5,7,x,",
        b"r6,7,,tomorrow",
        b"r7,7,,nan",
        f"r8,7,,{ahead}".encode(),
        b"r9,7,,,",
        b"\xff,7,,",
        b"r" * 5000 + b",7,,",
        b'"r10"x,7,,',
        b'r11,"never closed,,',
    ]
    with pytest.raises(DataError, match="13 rows cannot be used") as caught:
        read_labels(write_csv(b"\n".join(lines)))
    told = caught.value.detail.splitlines()
    assert [line.split(":")[0] for line in told] == [f"line {n}" for n in range(3, 16)]
    assert told[0] == "line 3: 1 cells, and the header has 4"
    assert "is no UTF-8" in caught.value.detail
    assert "no label was kept" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "r1,7\n", "request;label\nr1;7", "request,label,label\n", '"request', "\xff,\x00\n"],
)
def test_without_a_header_nothing_is_read(write_csv: Csv, text: str) -> None:
    with pytest.raises(DataError, match="no header of labels"):
        read_labels(write_csv(text))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_labels(tmp_path / "absent.csv")


def test_a_thousand_malformed_rows_are_listed_and_the_others_counted(write_csv: Csv) -> None:
    with pytest.raises(DataError) as caught:
        read_labels(write_csv("request,label\n" + "r\n" * 1500))
    assert caught.value.detail.endswith("line 1001: 1 cells, and the header has 2\nand 500 more")


@given(st.binary(max_size=80))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_file_is_read_or_refused(write_csv: Csv, content: bytes) -> None:
    for start in (b"", b"request,label\n"):
        with contextlib.suppress(DataError):
            assert all(label.request for label in read_labels(write_csv(start + content)))


def test_labels_are_matched_with_predictions_by_request(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    spool_write(log.folder, [spool_record("in parquet")])
    log.collect()
    spool_write(log.folder, [spool_record("in the spool")])
    labels = [Label("in parquet", "7"), Label("in the spool", "7"), Label("nowhere", "7")]
    assert log.add_labels(labels) == Joined(matched=2, unmatched=1)
    assert log.gather_labels().num_rows == 3
    assert (log.folder / "labels").stat().st_mode & 0o777 == 0o700


def test_a_label_that_came_first_is_joined_when_its_prediction_comes(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    assert log.add_labels([Label("late", "7")]) == Joined(unmatched=1)
    spool_write(log.folder, [spool_record("late")])
    assert log.add_labels([Label("late", "7", 0)]) == Joined(matched=1, doubled=1)
    assert log.gather_labels().num_rows == 1


def test_a_request_with_several_items_needs_its_rows_to_name_one(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    spool_write(log.folder, [spool_record("two", item=0), spool_record("two", item=1)])
    labels = [Label("two", "7", line=2), Label("two", "8", 1, line=3), Label("two", "9", 2, line=4)]
    joined = log.add_labels(labels)
    assert joined.ambiguous == (labels[0],)
    assert (joined.matched, joined.unmatched) == (1, 1)
    assert list_said(log) == {("two", 1): "8", ("two", 2): "9"}


def test_of_two_labels_the_later_one_counts(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    spool_write(log.folder, [spool_record("r")])
    labels = [Label("r", "3", line=2), Label("r", "3", line=3), Label("r", "5", line=4)]
    change = Change("r", 0, 4, "3", "5", "5")
    assert log.add_labels(labels, classes=["3", "5"]) == Joined(
        matched=3, doubled=1, changed=(change,)
    )
    assert list_said(log) == {("r", 0): "5"}
    # A week older than what is there: it does not count, and that is said.
    older = log.add_labels([Label("r", "4", time=time.time() - 7 * 86400, line=2)])
    assert older.changed == (Change("r", 0, 2, "5", "4", "5"),)
    assert list_said(log) == {("r", 0): "5"}
    assert log.add_labels([Label("r", "6")]).changed[0].counts == "6"
    assert list_said(log) == {("r", 0): "6"}


def test_a_label_mended_under_its_own_time_counts(log: PredictionLog) -> None:
    moment = time.time() - 86400.1234567
    for label in ("3", "5", "7"):
        log.add_labels([Label("r", label, time=moment)])
    assert list_said(log) == {("r", None): "7"}


def test_the_same_file_twice_is_kept_once(log: PredictionLog) -> None:
    labels = [Label(f"r{n}", str(n % 10)) for n in range(1000)]
    assert log.add_labels(labels) == Joined(unmatched=1000)
    before = log.measure()
    assert log.add_labels(labels) == Joined(unmatched=1000, doubled=1000)
    assert log.measure() == before


def test_labels_nobody_predicts_are_kept_and_told(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    labels = [Label("a", "7"), Label("b", "cat"), Label("c", "cat"), Label("d", "<b>\n")]
    assert log.add_labels(labels).unknown == {}  # of no model is anything known yet
    spool_write(log.folder, [spool_record("a")])
    assert log.add_labels(labels).unknown == {"cat": 2, "<b>\n": 1}
    assert log.add_labels(labels, classes=["cat"]).unknown == {"<b>\n": 1}
    assert list_said(log)["b", None] == "cat"


def test_many_labels_of_their_own_are_no_trouble(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    spool_write(log.folder, [spool_record("a")])
    joined = log.add_labels([Label(f"r{n}", f"class {n}") for n in range(100_000)])
    assert (joined.unmatched, len(joined.unknown)) == (100_000, 100_000)


def test_labels_outlive_merging_and_go_by_their_own_day(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path)
    for number in range(30):
        log.add_labels([Label(f"r{number}", "7"), Label("same", str(number))])
        log.collect()
    assert len(list(tmp_path.glob("labels/day=*/*.parquet"))) < 20
    assert log.gather_labels().num_rows == 60
    assert list_said(log)["same", None] == "29"
    (day,) = tmp_path.glob("labels/day=*")
    day.rename(day.with_name("day=2020-01-01"))
    log.collect()
    assert log.gather_labels().num_rows == 0


def test_the_classes_of_references_are_known(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text("def handle(data, context): ...\n", encoding="utf-8")
    np.savez(
        tmp_path / "reference.npz",
        format=np.int64(1),
        features=np.zeros((2, 1), np.float32),
        feature_names=np.array(["brightness"]),
        confidence=np.ones(2, np.float32),
        prediction=np.array(["cat", "dog"]),
        embedding=np.zeros((2, 2), np.float32),
        accuracy=np.float64(1.0),
    )
    spec = Spec.create(name="m", handler="handler.py", files=["reference.npz"])
    pack_spec(spec, folder=tmp_path, out=tmp_path / "store/m.mar", preflight=None)
    (tmp_path / "store/broken.mar").write_bytes(b"no archive")
    assert list_classes(Deployment(store=tmp_path / "store")) == {"cat", "dog"}
