from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from queue import Queue

import pytest

from marwright.errors import StorageError
from marwright.server.log import LogLine, parse_line, read_log, read_logs

START = datetime(2026, 11, 27, 19, 38, 4, 895_000, timezone.utc)
WAIT = 30.0


def write(
    message: str, *, seconds: float = 0, level: str = "INFO", thread: str = "main", **more: str
) -> bytes:
    """Return one line as Java writes it."""
    time = (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
    fields = {"time": time, "level": level, "thread": thread, "logger": "a.b.C"}
    return json.dumps({**fields, "message": message, **more}).encode() + b"\n"


def tell(lines: Iterator[LogLine]) -> list[str]:
    return [line.message for line in lines]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder / "server.log"


@pytest.fixture
def follow(log: Path) -> Iterator[Callable[[], str]]:
    """Follow the log in a thread; return a function that waits for the next message."""
    messages: Queue[str] = Queue()
    log.touch()

    def run() -> None:
        for line in read_log(log, follow=True):
            messages.put(line.message)

    thread = threading.Thread(target=run)
    thread.start()
    yield lambda: messages.get(timeout=WAIT)
    moved = log.parent.rename(log.parent.with_name("gone"))
    thread.join(WAIT)
    assert not thread.is_alive(), f"follows although the folder is {moved}"
    assert messages.empty()


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)


def test_a_line_is_read_with_all_it_says() -> None:
    line = parse_line(write("hello", level="WARN", exception="java.lang.Error\n\tat x"))
    assert line == LogLine(START, "warning", "a.b.C", "hello", exception="java.lang.Error\n\tat x")


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-27T19:38:04.895Z",
        "2026-11-27T20:38:04.895+01:00",
        "2026-11-27T20:38:04,895+0100",
        "2026-11-27T19:38:04.895000+00:00",
    ],
)
def test_a_time_may_be_written_in_several_ways(text: str) -> None:
    line = parse_line(json.dumps({"time": text, "message": "x"}).encode())
    assert line.time == START
    assert line.time.tzinfo is not None


@pytest.mark.parametrize(
    ("thread", "model", "version", "worker", "stream"),
    [
        ("W-9000-cnn_1.0-stdout", "cnn", "1.0", 9000, "stdout"),
        ("W-29500-my_net_2.0-stderr", "my_net", "2.0", 29500, "stderr"),
        ("W-9001-my_net_2.0", "my_net", "2.0", 9001, ""),
        ("W-9001-my-net-stdout_x_10-stdout", "my-net-stdout_x", "10", 9001, "stdout"),
        ("W-9000-W-9001-a_b-1.0_3-stdout", "W-9001-a_b-1.0", "3", 9000, "stdout"),
        ("W-9000-cnn-stdout", "", "", None, ""),
        ("epollEventLoopGroup-3-1", "", "", None, ""),
    ],
)
def test_a_workers_thread_says_model_version_port_and_stream(
    thread: str, model: str, version: str, worker: int | None, stream: str
) -> None:
    line = parse_line(write("x", thread=thread))
    assert (line.model, line.version, line.worker, line.stream) == (model, version, worker, stream)


def test_a_message_that_is_an_object_may_name_a_request_and_a_model() -> None:
    said = {"event": "request_failed", "request_id": "12-34", "model": "cnn", "version": "2.0"}
    line = parse_line(write(json.dumps(said)))
    assert (line.request_id, line.model, line.version) == ("12-34", "cnn", "2.0")
    line = parse_line(write(json.dumps(said), thread="W-9000-other_1.0-stdout"))
    assert (line.request_id, line.model, line.version) == ("12-34", "other", "1.0")


@pytest.mark.parametrize("message", ["{", "{}", "[1]", '{"request_id"', "{" * 100_000])
def test_a_message_that_only_looks_like_an_object_is_one_all_the_same(message: str) -> None:
    line = parse_line(write(message))
    assert (line.message, line.request_id) == (message, "")


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense",
        b"\xff\xfe",
        b"[]",
        b"12",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"time": "never", "message": "x"}',
        b'{"time": 12, "message": "x"}',
        b'{"time": "2026-11-27T19:38:04Z", "message": 7}',
        b'{"time": "2026-11-27T19:38:04Z"',
    ],
)
def test_another_line_is_told_as_it_is_at_the_time_of_the_one_before(
    log: Path, text: bytes
) -> None:
    log.write_bytes(write("before") + text + b"\n" + write("after"))
    before, odd, after = read_log(log)
    assert (before.message, after.message) == ("before", "after")
    assert odd == LogLine(START, "info", "", text.decode("utf-8", "replace"))


def test_empty_lines_and_holes_say_nothing(log: Path) -> None:
    log.write_bytes(b"\n\r\n\0\0\0\n" + write("x"))
    assert tell(read_log(log)) == ["x"]


def test_a_last_line_without_its_end_counts_if_it_is_whole(log: Path) -> None:
    whole = write("last").rstrip(b"\n")
    log.write_bytes(write("first") + whole)
    assert tell(read_log(log)) == ["first", "last"]
    log.write_bytes(write("first") + whole[:-1])
    assert tell(read_log(log)) == ["first"]


def test_lines_from_a_time_on(log: Path) -> None:
    log.write_bytes(b"".join(write(str(number), seconds=number) for number in range(5)))
    assert tell(read_log(log, since=START + timedelta(seconds=3))) == ["3", "4"]


def test_several_logs_are_told_in_the_order_of_time(log: Path) -> None:
    other = log.with_name("supervisor.log")
    log.write_bytes(b"".join(write(str(number), seconds=number) for number in (0, 2, 4)))
    other.write_bytes(b"".join(write(str(number), seconds=number) for number in (1, 3)))
    assert tell(read_logs([log, other])) == ["0", "1", "2", "3", "4"]
    odd = read_logs([log, other], is_wanted=lambda line: line.message in "024", last=2)
    assert tell(odd) == ["2", "4"]


def test_a_log_that_is_not_there_is_an_error(log: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*server\.log"):
        list(read_log(log))


def test_what_is_still_to_come_is_told_line_by_line(log: Path, follow: Callable[[], str]) -> None:
    append(log, write("one") + write("two")[:20])
    assert follow() == "one"
    append(log, write("two")[20:] + write("three"))
    assert follow() == "two"
    assert follow() == "three"


def test_a_log_is_followed_through_its_rotation(log: Path, follow: Callable[[], str]) -> None:
    append(log, write("one"))
    assert follow() == "one"
    for number in range(3):
        append(log, write(f"last of {number}"))
        log.rename(log.with_name(f"server.{number}.log"))
        append(log.with_name(f"server.{number}.log"), write(f"late in {number}"))
        log.write_bytes(write(f"first after {number}"))
        assert [follow(), follow(), follow()] == [
            f"last of {number}",
            f"late in {number}",
            f"first after {number}",
        ]


def test_a_log_that_is_emptied_is_followed_from_its_beginning(
    log: Path, follow: Callable[[], str]
) -> None:
    append(log, write("a long line" * 50))
    follow()
    log.write_bytes(b"")
    append(log, write("short"))
    assert follow() == "short"


def test_with_last_what_is_old_is_left_out_and_what_is_new_is_not(log: Path) -> None:
    log.write_bytes(b"".join(write(str(number)) for number in range(5)))
    lines = read_logs([log], follow=True, last=1)
    assert next(lines).message == "4"
    append(log, write("new") + write("newer"))
    assert [next(lines).message, next(lines).message] == ["new", "newer"]
