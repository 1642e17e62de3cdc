from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")

from pyarrow import parquet

from marwright.errors import ConfigurationError, NoServerError, StorageError, UsageError
from marwright.monitor.feedback import Label
from marwright.monitor.parts import Part, tell_day
from marwright.monitor.predictions import PredictionLog, find_log
from marwright.monitor.spool import SCHEMA

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
Hold = Callable[[Path], IO[bytes]]
DAY = 86400.0

COLLECT = """
import sys
from pathlib import Path
from marwright.monitor.predictions import PredictionLog
log = PredictionLog(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    log.collect()
"""


@pytest.fixture
def log(tmp_path: Path) -> PredictionLog:
    return PredictionLog(tmp_path / "predictions")


def list_files(log: PredictionLog) -> list[Path]:
    return sorted(log.folder.glob("day=*/part-*.parquet"))


def list_requests(log: PredictionLog) -> list[str]:
    """What stands in Parquet, as any other reader of it sees it."""
    return [
        row
        for path in list_files(log)
        for row in parquet.ParquetFile(path).read(columns=["request"])["request"].to_pylist()
    ]


def list_window(log: PredictionLog, rows: int = 1000) -> list[str]:
    found: list[str] = log.read_window("cnn", "1.0", rows)["request"].to_pylist()
    return found


def test_a_record_comes_back_as_it_was_written(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    written = spool_record(
        "r1",
        digest="ab" * 32,
        input="aGVsbG8=",
        content_type="text/plain",
        score=-2.5,
        prediction='a "label"\nwith, two lines \u2603',
    )
    spool_write(log.folder, [written])
    assert log.collect().rows == 1
    (found,) = log.read_recent(limit=5)
    assert found == {
        **written,
        "time": pytest.approx(written["time"], abs=1e-6),
        "seconds": pytest.approx(0.004),
        "input": b"hello",
    }
    (path,) = list_files(log)
    assert path.parent.name == f"day={tell_day(written['time'])}"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not list((log.folder / "spool").iterdir())


def test_fields_may_be_missing(log: PredictionLog, spool_write: Write) -> None:
    spool_write(log.folder, [{"time": time.time(), "model": "cnn", "version": "1.0"}])
    log.collect()
    (row,) = log.read_recent(limit=5)
    assert row["item"] == 0
    assert {name for name, value in row.items() if value is not None} == {
        *("time", "model", "version", "item")
    }
    assert len(log.read_window("cnn", "1.0", 5)) == 1


def test_a_file_that_is_written_is_taken_up_to_its_last_whole_line(
    log: PredictionLog, spool_record: Make, spool_write: Write, spool_hold: Hold
) -> None:
    path = spool_write(log.folder, [spool_record("a")])
    stream = spool_hold(path)
    half = json.dumps(spool_record("b")).encode()
    stream.write(half[:40])
    assert log.collect().rows == 1
    assert log.collect().rows == 0
    assert list_window(log) == ["a"]
    stream.write(half[40:] + b"\n")
    assert list_window(log) == ["a", "b"]
    stream.close()
    done = log.collect()
    assert (done.rows, done.skipped) == (1, 0)
    assert list_window(log) == ["a", "b"]
    assert not path.exists()


def test_a_line_that_a_dead_worker_has_cut_is_counted(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    whole = json.dumps(spool_record("whole, without its newline")).encode()
    spool_write(log.folder, [spool_record("a"), whole], name="one")
    spool_write(log.folder, [spool_record("b"), whole[:30]], name="two")
    done = log.collect()
    assert (done.rows, done.skipped) == (3, 1)


HOSTILE = [
    b"",
    b"{",
    b"null",
    b'"text"',
    b"[1, 2]",
    b"7",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
]
BROKEN: list[dict[str, Any]] = [
    {"time": None},
    {"time": "now"},
    {"time": float("nan")},
    {"time": -1.0},
    {"time": 1e300},
    {"time": True},
    {"model": ""},
    {"model": ["cnn"]},
    {"version": None},
    {"version": 1.0},
    {"request": "r" * 513},
    {"request": "\ud800"},
    {"item": -1},
    {"item": 1.5},
    {"item": 1 << 40},
    {"status": "200"},
    {"status": 1e9},
    {"seconds": float("inf")},
    {"seconds": -1},
    {"input": "not base64"},
    {"input": 5},
    {"features": [1.0]},
    {"features": {"a": float("nan")}},
    {"features": {"a": 1e300}},
    {"features": {"a": 10**400}},
    {"features": {"a": "1"}},
    {"features": {"a": True}},
    {"features": {"a": None}},
    {"features": {"\ud800": 1.0}},
    {"features": {"a" * 600: 1.0}},
    {"features": {str(number): 1.0 for number in range(5000)}},
    {"prediction": 7},
    {"prediction": "x" * 5000},
    {"confidence": "high"},
    {"confidence": float("-inf")},
    {"score": []},
    {"embedding": {"a": 1.0}},
    {"embedding": [[1.0]]},
    {"embedding": [1e39]},
]


def test_hostile_lines_are_counted_and_harm_no_other(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    lines = [line + b"\n" for line in HOSTILE]
    lines += [json.dumps({**spool_record("bad"), **values}).encode() + b"\n" for values in BROKEN]
    mixed = [item for line in lines for item in (line, spool_record("good"))]
    spool_write(log.folder, mixed)
    assert list_window(log) == ["good"] * len(lines)
    done = log.collect()
    assert (done.rows, done.skipped) == (len(lines), len(lines))
    assert set(list_requests(log)) == {"good"}


@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_bytes_make_a_collection_fail(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spool").mkdir()
        (Path(folder) / "spool/x.jsonl").write_bytes(b"\n".join(lines))
        PredictionLog(Path(folder)).collect()
        assert (Path(folder) / "spool/x.jsonl").exists() is (not any(lines) and len(lines) < 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            sorted(
                BROKEN[0]
                | BROKEN[9]
                | {
                    "item": 0,
                    "model": 0,
                    "request": 0,
                    "status": 0,
                    "seconds": 0,
                    "input": 0,
                    "features": 0,
                    "prediction": 0,
                    "confidence": 0,
                    "score": 0,
                    "embedding": 0,
                    "digest": 0,
                    "new": 0,
                }
            )
        ),
        JSON,
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_a_record_or_is_counted(values: dict[str, Any]) -> None:
    good = {"time": time.time(), "model": "cnn", "version": "1.0"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spool").mkdir()
        text = f"{json.dumps({**good, **values})}\n{json.dumps(good)}\n"
        (Path(folder) / "spool/x.jsonl").write_text(text, encoding="utf-8")
        log = PredictionLog(Path(folder))
        done = log.collect()
        assert done.rows + done.skipped + done.expired == 2
        assert len(log.read_recent(limit=5)) == done.rows >= 1


def test_a_line_of_40_mb_is_one_that_is_skipped(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    huge = b'{"input": "' + b"A" * (40 << 20) + b'"}\n'
    spool_write(log.folder, [spool_record("a"), huge, spool_record("b")])
    done = log.collect()
    assert (done.rows, done.skipped) == (2, 1)


def test_a_record_from_ahead_goes_to_the_day_of_its_collection(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    ahead = [spool_record("far", time=time.time() + 3 * DAY), spool_record("mad", time=9e10)]
    hours = spool_record("hours", time=time.time() + DAY / 2)
    spool_write(log.folder, [*ahead, hours, spool_record("near", time=time.time() + 30)])
    done = log.collect()
    assert (done.rows, done.skewed) == (4, 3)
    days = {row["request"]: row["time"] for row in log.read_recent(limit=5)}
    for request in ("far", "mad", "hours"):
        assert abs(days[request] - time.time()) < 20
    assert days["near"] > time.time() + 20


def test_what_was_kept_while_the_clock_was_ahead_is_in_no_window_until_then(
    log: PredictionLog, spool_record: Make, spool_write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    spool_write(log.folder, [spool_record("ahead", time=now + 7200)])
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 7200)
        assert log.collect().skewed == 0
        assert log.read_window("cnn", "1.0", 5).num_rows == 1
    spool_write(log.folder, [spool_record("now", time=now)], name="later")
    log.collect()
    assert log.read_window("cnn", "1.0", 5)["request"].to_pylist() == ["now"]


def test_days_that_are_too_old_go_and_what_comes_of_them_is_counted(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    log = PredictionLog(tmp_path, keep_days=3)
    now = time.time()
    times = {"today": now, "kept": now - 3 * DAY, "gone": now - 4 * DAY, "1970": 0.0}
    spool_write(log.folder, [spool_record(name, time=moment) for name, moment in times.items()])
    done = log.collect()
    assert (done.rows, done.expired) == (2, 2)
    assert sorted(list_requests(log)) == ["kept", "today"]
    log.add_labels([Label("kept", "7")])
    stranger = tmp_path / f"day={tell_day(now - 3 * DAY)}" / "mine.txt"
    stranger.write_text("not of the log", encoding="utf-8")
    PredictionLog(tmp_path, keep_days=1).collect()
    assert list_requests(log) == ["today"]
    assert stranger.exists()


def test_the_oldest_day_goes_first_where_there_is_no_room(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    log = PredictionLog(tmp_path)
    inputs = random.Random(0)
    for day in range(5):
        rows = [
            spool_record(
                f"{day}-{n}", time=time.time() - day * DAY, digest=inputs.randbytes(99).hex()
            )
            for n in range(200)
        ]
        spool_write(log.folder, rows)
        log.collect()
    half = log.measure() // 2
    done = PredictionLog(tmp_path, most_bytes=half).collect()
    left = Counter(name[0] for name in list_requests(log))
    assert set(left) == {"0", "1"}
    assert (done.dropped, done.size) == (600, log.measure())
    assert log.measure() <= half
    # Of today the latest parts stay, and what goes is counted.
    spool_write(log.folder, [spool_record("latest")])
    log.collect()
    size = list_files(log)[-1].stat().st_size + (log.folder / "collected.json").stat().st_size
    done = PredictionLog(tmp_path, most_bytes=size).collect()
    assert (done.dropped, list_requests(log)) == (400, ["latest"])


def test_a_day_has_few_files_however_often_it_is_collected(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    names = [f"r{number}" for number in range(150)]
    for name in names:
        spool_write(log.folder, [spool_record(name)])
        log.collect()
    assert len(list_files(log)) < 25
    assert sorted(list_requests(log)) == sorted(names)
    assert list_window(log) == names
    assert list_window(log, 3) == names[-3:]


def test_a_broken_part_is_passed_over_and_keeps_no_others_from_being_merged(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    for number in range(40):
        spool_write(log.folder, [spool_record(f"r{number}")])
        log.collect()
        if not number:
            content = list_files(log)[0].read_bytes()
            list_files(log)[0].write_bytes(content[: len(content) // 2])
    assert list_window(log) == [f"r{number}" for number in range(1, 40)]
    assert len(list_files(log)) < 25


def test_versions_are_told_apart(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    strange = {"model": "<b>ü/..", "version": "2 0"}
    records = [spool_record("a"), spool_record("b", version="2.0"), spool_record("c", **strange)]
    spool_write(log.folder, records)
    known = [("<b>ü/..", "2 0"), ("cnn", "1.0"), ("cnn", "2.0")]
    assert log.list_versions() == known
    log.collect()
    assert log.list_versions() == known
    assert log.list_versions() == known  # from what it remembers of the parts
    assert log.read_window("cnn", "2.0", 9)["request"].to_pylist() == ["b"]
    assert log.read_window("<b>ü/..", "2 0", 9)["request"].to_pylist() == ["c"]
    assert log.read_window("cnn", "3.0", 9).num_rows == 0


def test_more_versions_than_a_part_lists_are_found_all_the_same(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    spool_write(log.folder, [spool_record("r", version=f"{n:05}") for n in range(1500)])
    log.collect()
    assert len(log.list_versions()) == 1500
    assert log.read_window("cnn", "01499", 9).num_rows == 1


def test_a_window_is_the_last_rows_over_days_parts_and_spool(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    chance = random.Random(1)
    rows = []
    for batch in range(12):
        fresh = [
            spool_record(f"{batch}-{n}", time=time.time() - chance.random() * 4 * DAY)
            for n in range(30)
        ]
        fresh += [spool_record("failed", status=500, prediction=None) for _ in range(3)]
        fresh += [spool_record("other", version="2.0") for _ in range(3)]
        spool_write(log.folder, fresh)
        rows += fresh
        if batch < 11:
            log.collect()
    rows = [row for row in rows if row["request"] not in {"failed", "other"}]
    expected = [row["request"] for row in sorted(rows, key=lambda row: row["time"])]
    for count in (1, 10, 100, 359, 360, 500):
        assert list_window(log, count) == expected[-count:]
    assert list_window(log, 0) == []
    window = log.read_window("cnn", "1.0", 5, columns=["time", "features"])
    assert window.column_names == ["time", "features"]


def test_failures_are_the_newest_first(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    now = time.time()
    failed = [spool_record(f"f{n}", time=now - n, status=503, prediction=None) for n in range(5)]
    spool_write(log.folder, [*failed[:2], spool_record("fine", time=now)])
    log.collect()
    spool_write(log.folder, failed[2:])
    found = log.read_recent(limit=3, failed=True)
    assert [row["request"] for row in found] == ["f0", "f1", "f2"]
    assert [row["status"] for row in found] == [503] * 3
    assert len(log.read_recent(limit=10)) == 6
    assert log.read_recent(limit=3, failed=True, model="mlp") == []


def test_where_nothing_failed_only_the_status_is_read(
    log: PredictionLog, spool_record: Make, spool_write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool_write(log.folder, [spool_record("fine", time=time.time() - 3 * DAY)])
    log.collect()
    spool_write(log.folder, [spool_record("failed", status=500), spool_record("fine")])
    log.collect()
    read: list[set[str]] = []
    original = Part.read

    def watch(part: Part, number: int, columns: Collection[str] | None) -> Any:
        read.append(set(columns or SCHEMA.names))
        return original(part, number, columns)

    monkeypatch.setattr(Part, "read", watch)
    found = log.read_recent(limit=3, failed=True)
    assert [row["request"] for row in found] == ["failed"]
    assert found[0]["features"] == {"brightness": 0.5}
    keys = {"model", "version", "status"}
    assert read == [keys, set(SCHEMA.names), keys]


def test_an_empty_log_has_nothing(log: PredictionLog) -> None:
    assert (log.list_versions(), log.measure(), list_window(log)) == ([], 0, [])
    assert not log.folder.exists()  # who reads makes nothing
    assert log.collect().rows == 0


# Who is killed.


CHANGES = {"mkstemp", "flush", "fsync", "chmod", "mkdir", "rename", "replace", "unlink", "rmdir"}
"""Calls that change what is on the disk: killed before each, a process leaves all there is."""


def collect_and_die(folder: Path, changes: int) -> bool:
    """Collect in a child that is killed before its change of this number; tell if it was."""
    pid = os.fork()
    if not pid:
        left = [changes]

        def count(_: object, event: str, function: Any) -> None:
            if event == "c_call" and function.__name__ in CHANGES:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            PredictionLog(folder).collect()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


STEPS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 2), st.integers(1, 5)),
    st.tuples(st.just("end"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("kill"), st.integers(1, 30), st.just(0)),
    st.tuples(st.just("collect"), st.just(0), st.just(0)),
)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@given(st.lists(STEPS, min_size=3, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_interleaving_of_writes_collections_and_kills_keeps_each_record_once(
    spool_record: Make, spool_write: Write, steps: list[tuple[str, int, int]]
) -> None:
    import fcntl

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as held:
        log = PredictionLog(Path(name))
        written: list[str] = []
        workers: dict[int, IO[bytes]] = {}
        for number, (step, first, count) in enumerate(steps):
            if step == "write":
                rows = [
                    spool_record(f"{number}-{n}", time=time.time() - n * DAY) for n in range(count)
                ]
                if first not in workers:
                    path = spool_write(log.folder, [], name=f"{first}-{number}")
                    workers[first] = held.enter_context(path.open("ab", buffering=0))
                    fcntl.flock(workers[first], fcntl.LOCK_EX)
                for row in rows:
                    workers[first].write(json.dumps(row).encode() + b"\n")
                written += [row["request"] for row in rows]
            elif step == "end" and first in workers:
                workers.pop(first).close()
            elif step == "kill":
                collect_and_die(log.folder, first)
            elif step == "collect":
                log.collect()
            assert sorted(list_window(log)) == sorted(written)
        held.close()
        log.collect()
        assert sorted(list_requests(log)) == sorted(written)
        assert not list((log.folder / "spool").glob("*")) if written else True
        assert not list(log.folder.glob("day=*/.part*"))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_kill_before_any_change_on_the_disk_loses_and_doubles_nothing(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    # The eighth part of today makes the collection merge them; another day has its first part.
    start = PredictionLog(tmp_path / "start")
    written = [f"r{number}" for number in range(8)] + ["yesterday", "other"]
    for number, name in enumerate(written):
        moment = time.time() - (DAY if name == "yesterday" else 0)
        spool_write(start.folder, [spool_record(name, time=moment)], name=f"w-{name}")
        if number < 7:
            start.collect()
    killed = 0
    while True:
        log = PredictionLog(tmp_path / f"log-{killed}")
        shutil.copytree(start.folder, log.folder)
        if not collect_and_die(log.folder, killed + 1):
            break
        killed += 1
        assert Counter(list_window(log)) == Counter(written), killed
        log.collect()
        assert Counter(list_requests(log)) == Counter(written), killed
        assert not list(log.folder.rglob(".part*"))
        assert not list((log.folder / "spool").iterdir())
    assert killed > 20
    assert len(list_files(log)) == 2


def test_kill_9_at_random_moments_loses_and_doubles_nothing(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    chance = random.Random(os.getpid())
    log = PredictionLog(tmp_path)
    written: list[str] = []
    command = [sys.executable, "-c", COLLECT, str(tmp_path)]
    collected = 0
    for kill in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            end = time.monotonic() + chance.random() * 0.4
            number = 0
            while time.monotonic() < end:
                rows = [spool_record(f"{kill}-{number}-{n}") for n in range(20)]
                spool_write(log.folder, rows, name=f"w-{kill}-{number}")
                written += [row["request"] for row in rows]
                number += 1
                time.sleep(0.01)
        finally:
            process.kill()
            process.communicate()
        found = log.gather(["request"], lambda table: table)["request"].to_pylist()
        assert Counter(found) == Counter(written)
        collected += len(list_requests(log)) > 0
    assert collected > 5  # they were at work when they were killed
    log.collect()
    assert Counter(list_requests(log)) == Counter(written)
    days = len({path.parent for path in list_files(log)})
    assert len(list_files(log)) < 40 * days


# Who shares the folder.


def test_two_collectors_and_a_reader_at_once_see_each_record_once(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    log = PredictionLog(tmp_path)
    command = [sys.executable, "-c", COLLECT, str(tmp_path)]
    collectors = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    written: list[str] = []
    try:
        end = time.monotonic() + 6
        number = 0
        while time.monotonic() < end:
            rows = [spool_record(f"{number}-{n}") for n in range(30)]
            spool_write(log.folder, rows, name=f"w-{number}")
            written += [row["request"] for row in rows]
            number += 1
            assert Counter(list_window(log, 100_000)) == Counter(written)
        assert [process.poll() for process in collectors] == [None, None]
    finally:
        for process in collectors:
            process.terminate()
            process.communicate()
    log.collect()
    assert Counter(list_requests(log)) == Counter(written)


def test_collections_of_several_threads_wait_for_each_other(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    for number in range(30):
        spool_write(log.folder, [spool_record(f"r{number}")], name=f"w{number}")
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(PredictionLog(log.folder).collect().rows))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 30
    assert len(done) == 6


def test_an_empty_file_that_is_new_is_left_for_its_worker(
    log: PredictionLog, spool_write: Write
) -> None:
    path = spool_write(log.folder, [])
    log.collect()
    assert path.exists()
    os.utime(path, (0, 0))
    log.collect()
    assert not path.exists()


def test_another_file_of_the_same_name_is_collected_from_its_start(
    log: PredictionLog, spool_record: Make, spool_write: Write, spool_hold: Hold
) -> None:
    path = spool_write(log.folder, [spool_record("a"), spool_record("b")])
    spool_hold(path)
    log.collect()
    path.unlink()
    spool_write(log.folder, [spool_record("c", confidence=0.25)])
    log.collect()
    assert sorted(list_requests(log)) == ["a", "b", "c"]


# What else stands in the folder.


def test_links_lead_nowhere(tmp_path: Path, spool_record: Make, spool_write: Write) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret.jsonl"
    secret.write_text(json.dumps(spool_record("secret")) + "\n", encoding="utf-8")
    log = PredictionLog(tmp_path / "log")
    path = spool_write(log.folder, [spool_record("mine")])
    path.with_name("link.jsonl").symlink_to(secret)
    os.mkfifo(path.with_name("pipe.jsonl"))
    path.with_name("folder.jsonl").mkdir()
    assert log.collect().rows == 1
    assert secret.exists()
    # A day that is a link is neither read, nor written, nor removed.
    shutil.rmtree(log.folder / f"day={tell_day(time.time())}")
    (log.folder / f"day={tell_day(time.time())}").symlink_to(outside)
    (log.folder / "day=2001-01-01").symlink_to(outside)
    spool_write(log.folder, [spool_record("next")])
    with pytest.raises(StorageError, match="is a link"):
        log.collect()
    assert list_window(log) == ["next"]
    (log.folder / "labels").symlink_to(outside)
    with pytest.raises(StorageError, match="is a link"):
        log.add_labels([Label("next", "7")])
    assert [path.name for path in outside.iterdir()] == ["secret.jsonl"]


def test_a_spool_or_a_lock_that_is_a_link_is_not_followed(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    target = PredictionLog(tmp_path / "other")
    spool_write(target.folder, [spool_record("other")])
    log = PredictionLog(tmp_path / "log")
    log.folder.mkdir()
    (log.folder / "spool").symlink_to(target.folder / "spool")
    assert log.collect().rows == 0
    victim = tmp_path / "victim"
    victim.write_text("kept", encoding="utf-8")
    (log.folder / ".collected.json.lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"lock is a link"):
        log.collect()
    assert victim.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"generation": 1}',
        '{"generation": "x", "offsets": {}, "adds": [], "removes": []}',
        '{"generation": 1, "offsets": {"a": 5}, "adds": [], "removes": []}',
        '{"generation": 1, "offsets": {}, "adds": [], "removes": ["../../victim"]}',
        '{"generation": 1, "offsets": {}, "adds": ["/etc/passwd"], "removes": []}',
    ],
)
def test_a_ledger_that_is_not_ours_is_refused(
    log: PredictionLog, spool_record: Make, spool_write: Write, text: str
) -> None:
    path = spool_write(log.folder, [spool_record("a")])
    (log.folder / "collected.json").write_text(text, encoding="utf-8")
    with pytest.raises(StorageError, match=r"collected\.json cannot be used"):
        log.collect()
    assert path.exists()


def test_parts_with_other_columns_are_passed_over(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    import pyarrow

    spool_write(log.folder, [spool_record("a")])
    log.collect()
    other = list_files(log)[0].with_name("part-20200101T000000000000Z-9.parquet")
    parquet.write_table(pyarrow.table({"time": [1], "model": ["cnn"]}), other)
    other.with_name("part-20200101T000000000001Z-9.parquet").write_bytes(b"PAR1")
    (log.folder / "day=2026-99-99").mkdir()
    assert list_window(log) == ["a"]
    assert log.list_versions() == [("cnn", "1.0")]
    assert log.collect().rows == 0


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_spool_as_it_was(
    small_disk: Path, spool_record: Make, spool_write: Write
) -> None:
    chance = random.Random(0)
    log = PredictionLog(small_disk / "log")
    rows = [spool_record(f"r{n}", digest=chance.randbytes(200).hex()) for n in range(200)]
    rows += [spool_record(f"y{n}", time=time.time() - DAY) for n in range(3)]
    path = spool_write(log.folder, rows)
    before = path.read_bytes()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as stream:
        while True:
            stream.write(bytes(4096))
            stream.flush()
    for spare in range(0, 60_000, 4096):  # it fails in one step after the other
        os.truncate(filler, filler.stat().st_size - (4096 if spare else 0))
        with contextlib.suppress(StorageError):
            log.collect()
            break
        assert path.read_bytes() == before
        assert not list(log.folder.rglob("*.parquet"))
        assert len(list_window(log)) == 203
    filler.unlink()
    log.collect()
    assert Counter(list_requests(log)) == Counter(row["request"] for row in rows)
    assert not path.exists()


# Where the log is.


def test_the_log_is_where_deploy_yaml_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoServerError):
        find_log()
    with pytest.raises(UsageError, match="there is no folder"):
        find_log(folder=tmp_path / "absent")
    assert find_log(folder=tmp_path)[0].folder == tmp_path
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="keeps no prediction log"):
        find_log()
    predictions = {"folder": "kept", "keep_days": 7, "most_bytes": "5 MiB"}
    deploy.write_text(yaml.safe_dump({"monitoring": {"predictions": predictions}}), "utf-8")
    log, deployment = find_log()
    assert (log.folder, log.keep_days, log.most_bytes) == (tmp_path / "kept", 7, 5 << 20)
    assert deployment is not None
    with pytest.raises(NoServerError):
        find_log(server="absent")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from marwright.errors import UsageError\n"
        "try: import marwright.monitor.predictions\n"
        "except UsageError as exc: print(exc)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'marwright[parquet]'" in answer.stdout
