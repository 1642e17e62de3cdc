"""The prediction log: what is written, what never is, and what a fault costs."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Import = Callable[[str], Any]

LABELS = ["plain", 'a "quoted"\nlabel \\ of \u2028 lines', "\ud800 alone"]


class Counts:
    """What the log tells of itself."""

    def __init__(self) -> None:
        self.logged = self.lost = 0

    def __call__(self, logged: int, lost: int) -> None:
        self.logged += logged
        self.lost += lost


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def module(handlers: Import) -> Any:
    return handlers("prediction_log")


@pytest.fixture
def make_log(
    module: Any, counts: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a log, which writes only when it is told to."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 3600)
    logs = []

    def make(folder: Path | None = None, **settings: Any) -> Any:
        values = {"folder": str(folder or tmp_path / "log"), "share": 100, **settings}
        describe = values.pop("describe", None) or (lambda notes: [note.output for note in notes])
        log = module.PredictionLog(
            module.LogSettings.parse(values),
            model=values.get("model", "m"),
            version=values.get("version", "1.0"),
            describe=describe,
            count=counts,
        )
        logs.append(log)
        return log

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def make_note(module: Any) -> Callable[..., Any]:
    def make(request: str = "r", *, status: int = 200, value: Any = b"abc", **told: Any) -> Any:
        numbers = told.pop("tensors", ())
        output = module.Observation(**told) if status == 200 else None
        return module.Note(
            1764313200.5, request, 0, status, 0.004, value, "image/png", numbers, output
        )

    return make


def read_spool(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for path in sorted((folder / "spool").glob("*.jsonl")):
        content = path.read_bytes()
        assert content.endswith(b"\n")
        lines += content.splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_a_line_says_what_was_asked_and_answered(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path, counts: Counts
) -> None:
    log = make_log()
    log.keep(
        [
            make_note(
                "id-1",
                features={"red": 0.25},
                prediction="7",
                confidence=0.75,
                score=-3.5,
                embedding=[1.0, -2.5],
            )
        ]
    )
    log.flush()
    assert read_spool(tmp_path / "log") == [
        {
            "time": 1764313200.5,
            "request": "id-1",
            "item": 0,
            "model": "m",
            "version": "1.0",
            "status": 200,
            "seconds": 0.004,
            "digest": hashlib.sha256(b"abc").hexdigest(),
            "content_type": "image/png",
            "features": {"red": 0.25},
            "prediction": "7",
            "confidence": 0.75,
            "score": -3.5,
            "embedding": [1.0, -2.5],
        }
    ]
    assert (counts.logged, counts.lost) == (1, 0)


def test_a_request_that_failed_has_its_status_and_no_prediction(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log(describe=lambda notes: pytest.fail("described"))
    log.keep([make_note(status=415)])
    log.flush()
    (line,) = read_spool(tmp_path / "log")
    assert line["status"] == 415
    assert not {"prediction", "features", "confidence", "embedding"} & set(line)


def test_the_sample_is_the_share_that_the_ids_choose(make_log: Callable[..., Any]) -> None:
    ids = [str(uuid.UUID(int=number * 7919)) for number in range(20_000)]
    logs = [make_log(share=share) for share in (10, 30, 100)]
    few, more, everything = ({name for name in ids if log.takes(name)} for log in logs)
    assert few < more < everything
    assert len(everything) == len(ids)
    assert len(few) == pytest.approx(2000, abs=150)
    # As whoever looks for them computes it.
    assert few == {name for name in ids if zlib.crc32(name.encode()) % 10_000 < 10 * 100}
    logs[0].takes("\ud800, whatever it is")


@pytest.mark.parametrize("label", LABELS)
def test_any_label_makes_one_line(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path, label: str
) -> None:
    log = make_log()
    log.keep([make_note(prediction=label)])
    log.flush()
    (line,) = read_spool(tmp_path / "log")
    assert line["prediction"] == label.replace("\ud800", "?")


def test_numbers_that_are_not_finite_are_left_out(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log()
    infinite, nothing = float("inf"), float("nan")
    log.keep(
        [
            make_note(
                features={"good": 1.0, "bad": nothing, "worse": -infinite},
                confidence=nothing,
                score=infinite,
                embedding=[1.0, nothing],
            )
        ]
    )
    log.flush()
    (line,) = read_spool(tmp_path / "log")
    assert line["features"] == {"good": 1.0}
    assert not {"confidence", "score", "embedding"} & set(line)


def test_what_is_redacted_is_nowhere_on_the_disk(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log(
        redact=["prediction", "request", "confidence", "embedding", "features.age"], inputs="none"
    )
    log.keep(
        [
            make_note(
                "secret-request",
                prediction="secret-label",
                confidence=0.123456,
                embedding=[0.654321],
                features={"age": 777.5, "height": 1.5},
                value=b"secret-input",
            )
        ]
    )
    log.flush()
    content = b"".join(path.read_bytes() for path in (tmp_path / "log/spool").iterdir())
    for secret in (b"secret", b"777.5", b"0.123456", b"0.654321", b"age"):
        assert secret not in content
    assert base64.b64encode(b"secret-input") not in content
    assert hashlib.sha256(b"secret-input").hexdigest().encode() not in content
    (line,) = read_spool(tmp_path / "log")
    assert line["features"] == {"height": 1.5}


def test_an_input_is_kept_whole_only_where_that_is_allowed_and_it_is_small(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log(inputs="whole", input_bytes=4)
    log.keep([make_note("small", value=b"abcd"), make_note("large", value=b"abcde")])
    log.flush()
    small, large = read_spool(tmp_path / "log")
    assert base64.b64decode(small["input"]) == b"abcd"
    assert "input" not in large
    assert large["digest"] == hashlib.sha256(b"abcde").hexdigest()


def test_numbers_have_a_digest_and_are_kept_as_json(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log(inputs="whole")
    row = torch.tensor([1.5, 2.0])
    log.keep([make_note(value=None, tensors=(row,))])
    log.flush()
    (line,) = read_spool(tmp_path / "log")
    assert line["digest"] == hashlib.sha256(row.numpy().tobytes()).hexdigest()
    assert json.loads(base64.b64decode(line["input"])) == [1.5, 2.0]
    assert line["content_type"] == "application/json"


def test_nobody_else_may_read_what_is_written(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log()
    log.keep([make_note()])
    log.flush()
    (path,) = (tmp_path / "log/spool").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_names_of_files_stay_in_the_folder_whatever_the_model_is_called(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log(model="../../x/é" + "y" * 500, version="1/2")
    log.keep([make_note()])
    log.flush()
    (path,) = (tmp_path / "log/spool").iterdir()
    assert path.name.startswith("..%2F..%2Fx%2F%C3%A9y")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def is_held(path: Path) -> bool:
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_file_is_held_while_it_is_written_and_let_go_when_it_is_full_or_old(
    handlers: Import,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = handlers("spool")
    monkeypatch.setattr(spool, "FILE_BYTES", 600)
    log = make_log()

    def write() -> list[bool]:
        log.keep([make_note()])
        log.flush()
        return [is_held(path) for path in sorted((tmp_path / "log/spool").iterdir())]

    assert write() == [True]
    assert write() == [True]
    assert write() == [False, True]
    monkeypatch.setattr(spool, "FILE_SECONDS", 0)
    log.flush()
    assert [is_held(path) for path in (tmp_path / "log/spool").iterdir()] == [False, False]
    assert write() == [False, False, False]
    assert len(read_spool(tmp_path / "log")) == 4


def test_the_spool_has_a_bound_and_what_is_above_is_counted(
    handlers: Import,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    tmp_path: Path,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = handlers("spool")
    log = make_log(spool_bytes=2000)
    monkeypatch.setattr(spool, "MEASURE_SECONDS", 0)
    other = tmp_path / "log/spool/other-1-1-1-0.jsonl"
    for _ in range(20):
        log.keep([make_note()])
        log.flush()
    size = sum(path.stat().st_size for path in other.parent.iterdir())
    assert 1500 < size <= 2000
    assert counts.logged == len(read_spool(tmp_path / "log"))
    assert counts.logged + counts.lost == 20
    assert len(list(other.parent.iterdir())) == 1  # no empty files for those that were lost
    for path in other.parent.iterdir():
        path.unlink()  # collected
    log.keep([make_note()])
    log.flush()
    assert len(read_spool(tmp_path / "log")) == 1


def test_files_that_nobody_collects_are_bounded_too(
    handlers: Import,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    tmp_path: Path,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = handlers("spool")
    monkeypatch.setattr(spool, "MOST_FILES", 3)
    monkeypatch.setattr(spool, "FILE_SECONDS", -1)  # each write begins another file
    log = make_log()
    for _ in range(5):
        log.keep([make_note()])
        log.flush()
    assert len(list((tmp_path / "log/spool").iterdir())) == 3
    assert (counts.logged, counts.lost) == (3, 2)


def test_the_folder_is_not_looked_at_for_each_write(
    handlers: Import,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = handlers("spool")
    looks: list[Any] = []
    scan = spool.os.scandir

    def look(path: Any) -> Any:
        looks.append(path)
        return scan(path)

    monkeypatch.setattr(spool.os, "scandir", look)
    monkeypatch.setattr(spool, "MEASURE_SECONDS", 3600)
    log = make_log(spool_bytes=2000)
    for _ in range(20):
        log.keep([make_note()])
        log.flush()
    assert len(looks) == 1
    assert 0 < counts.logged < 20, "what it writes itself counts without a look"


def test_what_waits_is_let_go_at_once_where_the_spool_is_full(
    make_log: Callable[..., Any], make_note: Callable[..., Any], counts: Counts
) -> None:
    log = make_log(spool_bytes=10)
    log.keep([make_note() for _ in range(500)])
    log._drain()
    assert (counts.logged, counts.lost, log._bytes) == (0, 500, 0)


def test_a_queue_that_is_full_is_counted_and_takes_no_more_memory(
    module: Any,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = make_log()
    monkeypatch.setattr(module, "MOST_NOTES", 5)
    for _ in range(8):
        log.keep([make_note()])
    assert counts.lost == 3
    monkeypatch.setattr(module, "MOST_NOTES", 1000)
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    log.keep([make_note(value=bytes(2000))])
    log.keep([make_note(value=b"", tensors=(torch.zeros(300),))])
    log.keep([make_note(value=b"", tensors=(torch.zeros(300).numpy(),))])
    assert counts.lost == 6
    log.flush()
    assert (counts.logged, log._bytes) == (5, 0)


def test_what_a_handler_cannot_describe_is_logged_without_a_description(
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = make_log(describe=lambda notes: [][1])
    log.keep([make_note("a"), make_note("b", status=500)])
    log.flush()
    assert [line["request"] for line in read_spool(tmp_path / "log")] == ["a", "b"]
    assert "describe failed: IndexError" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = shutil.which("mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr if done else 'no mount'}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_counted_and_writing_goes_on_once_there_is_room(
    module: Any,
    small_disk: Path,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(50 << 10))
    log = make_log(small_disk)
    for _ in range(100):
        log.keep([make_note() for _ in range(10)])
        log.flush()
    assert counts.lost > 0
    assert counts.logged + counts.lost == 1000
    lines = read_spool(small_disk)  # each of them whole
    assert len(lines) == counts.logged > 0
    assert "No space left on device" in caplog.text
    assert len(caplog.records) == 1  # not one a failure
    before = counts.lost
    filler.unlink()
    log.keep([make_note("after")])
    log.flush()
    assert counts.lost == before
    assert read_spool(small_disk)[-1]["request"] == "after"
    assert "is written again" in caplog.text


def test_after_a_failure_what_comes_waits_for_the_next_try(
    module: Any,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    tmp_path: Path,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.2)
    place = tmp_path / "log"
    place.write_text("a file where the folder would be")
    log = make_log()
    log.keep([make_note()])
    log._drain()
    assert counts.lost == 1
    place.unlink()
    log.keep([make_note("waits")])
    log._drain()
    assert not place.exists()
    time.sleep(0.25)
    log._drain()
    assert [line["request"] for line in read_spool(place)] == ["waits"]
    assert (counts.logged, counts.lost) == (1, 1)


def test_a_folder_that_cannot_be_written_is_counted(
    small_disk: Path, make_log: Callable[..., Any], make_note: Callable[..., Any], counts: Counts
) -> None:
    log = make_log(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    log.keep([make_note()])
    log.flush()
    assert (counts.logged, counts.lost) == (0, 1)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    log.keep([make_note()])
    log.flush()
    assert (counts.logged, counts.lost) == (1, 1)


def test_a_link_in_the_place_of_a_file_is_not_followed(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log()
    log.keep([make_note()])
    log.flush()
    (path,) = (tmp_path / "log/spool").iterdir()
    log._spool.close()
    target = tmp_path / "elsewhere"
    path.with_name(path.name.replace("-0.jsonl", "-1.jsonl")).symlink_to(target)
    log.keep([make_note()])
    log.flush()
    assert not target.exists()
    assert (path.parent / path.name.replace("-0.jsonl", "-2.jsonl")).is_file()


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from prediction_log import LogSettings, Note, Observation, PredictionLog
log = PredictionLog(
    LogSettings.parse({"folder": sys.argv[2], "share": 100}), model="m", version="1",
    describe=lambda notes: [Observation(prediction=str(note.output)) for note in notes],
)
number = 0
while True:
    log.keep([Note(time.time(), str(number), 0, 200, 0.0, b"x", "", (), number)])
    number += 1
    print(time.time(), number, flush=True)
    time.sleep(0.001)
"""


def test_a_worker_that_is_killed_loses_at_most_the_last_second(root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root / "handlers"), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line.split()[1]) >= 1500:
            break
    process.kill()
    rest = process.communicate(timeout=30)[0].splitlines()
    end, _ = (rest or [line])[-1].split()
    lines = read_spool(tmp_path)
    assert [line["request"] for line in lines] == [str(n) for n in range(len(lines))]
    assert len(lines) > 500
    assert float(end) - lines[-1]["time"] < 1.0
    assert not any(is_held(path) for path in (tmp_path / "spool").iterdir())


def test_a_worker_that_ends_in_order_loses_nothing(root: Path, tmp_path: Path) -> None:
    program = WRITER.replace("while True:", "while number < 20:")
    command = [sys.executable, "-c", program, str(root / "handlers"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert len(read_spool(tmp_path)) == 20


def test_a_renewed_worker_goes_on_with_a_file_of_its_own(root: Path, tmp_path: Path) -> None:
    # As handlers/renewal.py does it: the process stays, its image is another.
    program = WRITER.replace("while True:", "while number < 20:").replace(
        "import sys, time", "import os, sys, time"
    )
    program += (
        "log.flush()\n"
        "if sys.argv[3:] != ['again']:\n"
        "    os.execv(sys.executable, [*sys.orig_argv, 'again'])\n"
    )
    command = [sys.executable, "-c", program, str(root / "handlers"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    first, second = sorted((tmp_path / "spool").iterdir())
    assert second.name == first.name.replace("-0.jsonl", "-1.jsonl")
    assert len(read_spool(tmp_path)) == 40
    assert not is_held(first)


def test_a_forked_worker_goes_on_with_a_file_of_its_own(
    module: Any, make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path
) -> None:
    log = make_log()
    log.keep([make_note("parent")])
    log.flush()

    def go_on() -> None:
        log.keep([make_note("child")])
        log.close()

    child = multiprocessing.get_context("fork").Process(target=go_on)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    files = sorted((tmp_path / "log/spool").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    assert [is_held(path) for path in files] == [True, False]
    log.keep([make_note("parent again")])
    log.flush()
    requests = [json.loads(line)["request"] for line in files[0].read_bytes().splitlines()]
    assert requests == ["parent", "parent again"]


def test_lines_are_written_by_themselves(
    module: Any,
    make_log: Callable[..., Any],
    make_note: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    counts: Counts,
) -> None:
    assert module.FLUSH_SECONDS == 3600
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    log = make_log()
    log.keep([make_note()])
    deadline = time.monotonic() + 10
    while not counts.logged and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counts.logged == 1


def test_nothing_is_lost_or_doubled_between_threads(
    make_log: Callable[..., Any], make_note: Callable[..., Any], tmp_path: Path, counts: Counts
) -> None:
    log = make_log()

    def work(name: str) -> None:
        for number in range(100):
            log.keep([make_note(f"{name}-{number}")])
            if number % 10 == 0:
                log.flush()

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.flush()
    seen = Counter(line["request"] for line in read_spool(tmp_path / "log"))
    assert len(seen) == counts.logged == 400
    assert set(seen.values()) == {1}


def open_log(module: Any, setting: Any) -> Any:
    return module.open_log(
        setting, model="m", version="1", describe=lambda notes: [], count=lambda *_: None
    )


def test_the_servers_variable_wins_over_the_handlers_setting(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_log(module, None) is None
    own = {"folder": str(tmp_path / "own"), "share": 5}
    log = open_log(module, own)
    assert log.settings.share == 5
    log.close()
    values = {"folder": str(tmp_path / "server"), "share": 7, "what is newer": True}
    monkeypatch.setenv("MARWRIGHT_PREDICTIONS", json.dumps(values))
    log = open_log(module, own)
    assert (log.settings.folder, log.settings.share) == (tmp_path / "server", 7)
    log.close()
    monkeypatch.setenv("MARWRIGHT_PREDICTIONS", json.dumps({**values, "share": 0}))
    assert open_log(module, own) is None
    assert not list(tmp_path.iterdir())  # nothing is made before there is something to write


WRONG: list[tuple[Any, str]] = [
    ({}, "with a folder"),
    ([], "with a folder"),
    ({"folder": "x", "share": 101}, "0 to 100"),
    ({"folder": "x", "share": "much"}, "could not convert"),
    ({"folder": "x", "inputs": "all"}, "prediction_log.inputs: expected one of none"),
    ({"folder": "x", "score": "best"}, "prediction_log.score"),
    ({"folder": "x", "redact": "prediction"}, "expected a list"),
    ({"folder": "x", "redact": ["predictoin"]}, "found 'predictoin'"),
]


@pytest.mark.parametrize(("values", "message"), WRONG[2:])
def test_a_setting_that_cannot_be_used_stops_the_handler_that_has_it(
    module: Any, values: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_log(module, values)


@pytest.mark.parametrize("text", [*(json.dumps(values) for values, _ in WRONG), "{", "[" * 9])
def test_a_variable_that_cannot_be_used_turns_the_log_off_and_nothing_else(
    module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    monkeypatch.setenv("MARWRIGHT_PREDICTIONS", text)
    with caplog.at_level(logging.ERROR):
        assert open_log(module, None) is None
    assert "the prediction log is off: MARWRIGHT_PREDICTIONS" in caplog.text
