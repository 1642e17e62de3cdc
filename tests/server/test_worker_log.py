from __future__ import annotations

import json
from pathlib import Path

import pytest

from marwright.errors import ModelLoadError
from marwright.server.worker_log import read_failures, read_tail

SITE = "/opt/venv/lib/python3.11/site-packages"
TRACEBACK = "Traceback (most recent call last):"
DIED = "Backend worker process died."
STARTED = [
    "s_name_part0=/tmp/.ts.sock, s_name_part1=9000, pid=27887",
    "Listening on port: /tmp/.ts.sock.9000",
    "[PID]27887",
    "Torch worker started.",
    "model_name: cnn, batchSize: 1",
]
TORCHSERVE = [
    f'  File "{SITE}/ts/model_service_worker.py", line 301, in <module>',
    "    worker.run_server()",
    f'  File "{SITE}/ts/model_loader.py", line 108, in load',
    "    module, function_name = self._load_handler_file(handler)",
    "                            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
    '  File "/usr/lib/python3.11/importlib/__init__.py", line 126, in import_module',
    "    return _bootstrap._gcd_import(name[level:], package, level)",
    '  File "<frozen importlib._bootstrap>", line 1204, in _gcd_import',
]
HANDLER = [
    '  File "/tmp/models/57df/handler.py", line 12, in initialize',
    "    self.model = load()",
    '  File "/tmp/models/57df/weights.py", line 3, in load',
    "    import nothing_like_it",
]
MISSING = "ModuleNotFoundError: No module named 'nothing_like_it'"
MASKED = [
    DIED,
    TRACEBACK,
    *TORCHSERVE,
    *HANDLER,
    MISSING,
    "",
    "During handling of the above exception, another exception occurred:",
    "",
    TRACEBACK,
    *TORCHSERVE,
    "ModuleNotFoundError: No module named 'ts.torch_handler.handler'",
]


def write_line(thread: str, logger: str, message: str) -> str:
    """Return a line as Java writes it into the log."""
    fields = {"time": "2026-11-23T23:39:32.045Z", "level": "INFO", "thread": thread}
    return json.dumps({**fields, "logger": logger, "message": message}, ensure_ascii=False)


def write_lines(
    *texts: str, model: str = "cnn_1.0", worker: int = 9000, stream: str = "stdout"
) -> list[str]:
    """Return lines as a worker's output stands in TorchServe's log."""
    return [write_line(f"W-{worker}-{model}-{stream}", "MODEL_LOG", text) for text in texts]


def write_stop(stream: str = "stdout") -> str:
    """Return the line of the Java thread that has read a worker's last output."""
    thread = f"W-9000-cnn_1.0-{stream}"
    logger = "org.pytorch.serve.wlm.WorkerLifeCycle"
    return write_line(thread, logger, f"Stopped Scanner - {thread}")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def fill(log: Path, *lines: str) -> Path:
    log.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return log


def test_the_first_traceback_of_a_masked_import_error_is_told(log: Path) -> None:
    fill(log, *write_lines(*STARTED, *MASKED))
    (failure,) = read_failures(log)
    assert failure.reason == MISSING
    assert "ts.torch_handler" not in failure.traceback


def test_torchserves_frames_are_dropped_and_the_handlers_kept(log: Path) -> None:
    fill(log, *write_lines(*MASKED))
    (failure,) = read_failures(log)
    assert failure.traceback.split("\n") == [TRACEBACK, *HANDLER, MISSING]
    assert failure.place == "weights.py:3"


def test_the_error_says_what_where_and_quotes_the_traceback(log: Path) -> None:
    fill(log, *write_lines(*MASKED))
    (failure,) = read_failures(log)
    error = failure.to_error()
    assert isinstance(error, ModelLoadError)
    assert f"cnn 1.0 cannot be loaded: found {MISSING} at weights.py:3" in str(error)
    assert error.detail == failure.traceback


@pytest.mark.parametrize(
    ("thread", "model", "version"),
    [
        ("cnn_1.0", "cnn", "1.0"),
        ("bad3_1.0", "bad3", "1.0"),
        ("my_net_2.0", "my_net", "2.0"),
        ("my-net-stdout_x_10", "my-net-stdout_x", "10"),
        ("W-9000-a_b-1.0_3", "W-9000-a_b-1.0", "3"),
    ],
)
def test_model_names_may_hold_dashes_and_underscores(
    log: Path, thread: str, model: str, version: str
) -> None:
    fill(log, *write_lines(*MASKED, model=thread))
    (failure,) = read_failures(log)
    assert (failure.model, failure.version) == (model, version)


def test_a_message_of_several_lines_is_kept_whole(log: Path) -> None:
    message = [
        "RuntimeError: Error(s) in loading state_dict for Net:",
        "\tMissing key(s) in state_dict: fc.weight.",
        "\tsize mismatch for conv.weight.",
    ]
    fill(log, *write_lines(DIED, TRACEBACK, *HANDLER, *message, *STARTED))
    (failure,) = read_failures(log)
    assert failure.traceback.split("\n")[-3:] == message
    assert failure.reason == f"{message[0]} {message[1].strip()}"


def test_what_a_handler_caught_and_logged_is_not_what_ended_it(log: Path) -> None:
    caught = ["optional thing is missing", TRACEBACK, *HANDLER[:2], "ImportError: no optional"]
    ended = ["Failed to load model cnn, exception no", "such weights", TRACEBACK, *HANDLER]
    hidden = [DIED, TRACEBACK, *TORCHSERVE, "RuntimeError: 500 - Unknown exception"]
    fill(log, *write_lines(*STARTED, *caught, *ended, "RuntimeError: no", "such weights", *hidden))
    (failure,) = read_failures(log)
    assert failure.reason == "RuntimeError: no"


@pytest.mark.parametrize(
    "said", ["Load model cnn cpu OOM, exception ", "Load model cnn cuda OOM, exception CUDA"]
)
def test_memory_that_ran_out_is_told(log: Path, said: str) -> None:
    hidden = [DIED, TRACEBACK, *TORCHSERVE, "RuntimeError: 507 - System out of memory"]
    fill(log, *write_lines(said, TRACEBACK, *HANDLER, "MemoryError", *hidden))
    (failure,) = read_failures(log)
    assert failure.reason == "MemoryError"


def test_a_syntax_errors_place_is_the_line_of_the_handler(log: Path) -> None:
    frames = [*TORCHSERVE, '  File "/tmp/models/1/handler.py", line 7', "    def x(", "         ^"]
    fill(log, *write_lines(DIED, TRACEBACK, *frames, "SyntaxError: '(' was never closed"))
    (failure,) = read_failures(log)
    assert (failure.place, failure.reason) == ("handler.py:7", "SyntaxError: '(' was never closed")


def test_an_error_of_torchserve_itself_has_no_place(log: Path) -> None:
    fill(log, *write_lines(DIED, TRACEBACK, *TORCHSERVE, "ValueError: Expected only one class"))
    (failure,) = read_failures(log)
    assert failure.place == ""
    assert str(failure.to_error()).count("ValueError: Expected only one class;") == 1


def test_two_workers_lines_that_alternate_are_told_apart(log: Path) -> None:
    one = write_lines(DIED, TRACEBACK, *HANDLER, "ValueError: one", model="one_1.0")
    two = write_lines(DIED, TRACEBACK, *HANDLER, "ValueError: two", model="two_1.0", worker=9001)
    fill(log, *(line for pair in zip(one, two, strict=True) for line in pair))
    reasons = {failure.model: failure.reason for failure in read_failures(log)}
    assert reasons == {"one": "ValueError: one", "two": "ValueError: two"}


def test_standard_error_does_not_part_a_traceback(log: Path) -> None:
    lines = write_lines(*MASKED)
    noise = write_lines("UserWarning: something", stream="stderr")
    fill(log, *(part for line in lines for part in (line, *noise)))
    (failure,) = read_failures(log)
    assert failure.traceback.split("\n") == [TRACEBACK, *HANDLER, MISSING]


def test_a_worker_that_is_stopped_before_it_says_that_it_died_is_told(log: Path) -> None:
    said = write_lines(*STARTED, "Failed to load model cnn, exception x", TRACEBACK, *HANDLER)
    fill(log, *said, *write_lines("RuntimeError: x"), write_stop())
    (failure,) = read_failures(log)
    assert (failure.reason, failure.place) == ("RuntimeError: x", "weights.py:3")


def test_a_worker_that_is_stopped_after_it_logged_what_it_caught_is_no_failure(log: Path) -> None:
    fill(log, *write_lines(*STARTED, TRACEBACK, *HANDLER, "RuntimeError: x"), write_stop())
    assert read_failures(log) == []


def test_a_traceback_that_is_still_being_written_is_not_told_yet(log: Path) -> None:
    lines = write_lines(*STARTED, *MASKED)
    whole = lines.index(write_lines(MISSING)[0]) + 1
    for count in range(len(lines)):
        fill(log, *lines[:count])
        assert [failure.reason for failure in read_failures(log)] == [MISSING] * (count >= whole)


def test_only_what_came_after_the_offset_counts(log: Path) -> None:
    fill(log, *write_lines(*MASKED))
    assert read_failures(log, offset=log.stat().st_size) == []
    offset = log.stat().st_size
    with log.open("a", encoding="utf-8") as stream:
        stream.writelines(
            f"{line}\n" for line in write_lines(DIED, TRACEBACK, *HANDLER, "ValueError: new")
        )
    assert [failure.reason for failure in read_failures(log, offset=offset)] == ["ValueError: new"]


def test_a_log_that_was_rotated_is_read_from_its_beginning(log: Path) -> None:
    fill(log, *write_lines(*MASKED))
    assert len(read_failures(log, offset=log.stat().st_size + 1)) == 1


@pytest.mark.parametrize(("starts", "failures"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 1)])
def test_three_starts_without_a_traceback_are_a_silent_death(
    log: Path, starts: int, failures: int
) -> None:
    fill(log, *write_lines(*STARTED * starts))
    found = read_failures(log)
    assert len(found) == failures
    assert all("no traceback: it was killed" in str(failure.to_error()) for failure in found)


def test_starts_of_three_workers_are_no_death(log: Path) -> None:
    lines = [line for port in (9000, 9001, 9002) for line in write_lines(*STARTED, worker=port)]
    assert read_failures(fill(log, *lines)) == []


def test_a_worker_that_cannot_import_torchserve_is_told_by_its_standard_error(log: Path) -> None:
    trace = [TRACEBACK, f'  File "{SITE}/ts/metrics.py", line 7', "    import yaml"]
    missing = "ModuleNotFoundError: No module named 'yaml'"
    attempt = [*write_lines(*trace, missing, stream="stderr"), write_stop("stderr"), write_stop()]
    assert read_failures(fill(log, *attempt * 2)) == []
    (failure,) = read_failures(fill(log, *attempt * 3))
    assert (failure.model, failure.version, failure.reason) == ("cnn", "1.0", missing)


def test_a_broken_byte_hides_nothing(log: Path) -> None:
    lines = write_lines(DIED, TRACEBACK, *HANDLER, "ValueError: byte X here")
    log.write_bytes("\n".join(lines).replace("X", "\udcff").encode("utf-8", "surrogateescape"))
    (failure,) = read_failures(log)
    assert failure.reason == "ValueError: byte \ufffd here"


def test_other_lines_are_no_failure(log: Path) -> None:
    java = [
        write_line("W-9000-cnn_1.0", "org.pytorch.serve.wlm.WorkerThread", text)
        for text in (DIED, TRACEBACK, *HANDLER, MISSING)
    ]
    other = write_line("W-9000-cnn_1.0-stdout", "org.other", DIED)
    fill(log, *java, other, "", "garbage", f"\tat {DIED}", *write_lines(f"he said: {DIED}"))
    assert read_failures(log) == []


@pytest.mark.parametrize("name", ["gone.log", "."])
def test_a_log_that_cannot_be_read_tells_nothing(tmp_path: Path, name: str) -> None:
    assert read_failures(tmp_path / name) == []
    assert read_tail(tmp_path / name) == ""


def test_a_line_end_of_unicodes_parts_no_line(log: Path) -> None:
    fill(log, *write_lines(DIED, TRACEBACK, *HANDLER, "ValueError: a\u2028b\x85c"))
    (failure,) = read_failures(log)
    assert failure.reason == "ValueError: a\u2028b\x85c"


def test_a_device_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "server.log").symlink_to("/dev/full")
    assert read_failures(tmp_path / "server.log") == []
    assert read_tail(tmp_path / "server.log") == ""


def test_the_tail_is_the_last_lines_without_javas_frames(log: Path) -> None:
    fill(log, *(f"line {number}" for number in range(30)), "\tat org.Foo.bar(Foo.java:1)", "end")
    assert read_tail(log, lines=3) == "line 28\nline 29\nend"


def test_the_tail_is_plain_text_with_what_an_exception_says(log: Path) -> None:
    fields = json.loads(write_line("main", "org.pytorch.serve.ModelServer", "no start"))
    fields["exception"] = "java.net.BindException: Address already in use\n\tat a.B.c(B.java:1)\n"
    fill(log, json.dumps(fields))
    assert read_tail(log).split("\n") == [
        "info org.pytorch.serve.ModelServer - no start",
        "java.net.BindException: Address already in use",
    ]
