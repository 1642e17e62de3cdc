from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Run
from marwright.server import TorchServe

Command = Callable[..., subprocess.CompletedProcess[str]]


class Model(BaseHTTPRequestHandler):
    """Answers with what it is sent, refuses "bad", breaks for "broken"; counts the requests."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.asked.append(body)
        time.sleep(server.delay)
        self.send_response({b"bad": 400, b"broken": 500}.get(body, 200))
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def model() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    server.asked, server.delay = [], 0.0
    server.options = ["--inference-url", f"http://127.0.0.1:{server.server_address[1]}"]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(20)]
    for path in paths:
        path.write_text(path.stem, encoding="utf-8")
    return paths


def read_rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_written_one_line_each(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    done = marwright("predict", "m", *files, "--out", out, "--in-flight", "4", *model.options)
    assert (done.returncode, done.stderr) == (0, "")
    rows = read_rows(out)
    assert {row["input"]: row["answer"] for row in rows} == {str(f): f.stem for f in files}
    assert len(rows) == 20
    assert {row["model"] for row in rows} == {"m"}
    assert str(out) in done.stdout


def test_a_second_run_asks_only_for_what_is_missing(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    files[3].write_bytes(b"bad")
    command = ("predict", "m", *files, "--out", out, "--json", *model.options)
    first = marwright(*command)
    assert first.returncode == 1
    found = {"file": str(out), "answered": 19, "refused": 1, "there_before": 0}
    assert json.loads(first.stdout) == found
    (error,) = [row["error"] for row in read_rows(out) if row["input"] == str(files[3])]
    assert "answered 400" in error
    files[3].write_text("mended", encoding="utf-8")
    with out.open("ab") as stream:
        stream.write(b'{"input": "torn')
    model.asked.clear()
    second = marwright(*command)
    assert second.returncode == 0
    assert json.loads(second.stdout) == found | {"answered": 1, "refused": 0, "there_before": 19}
    assert model.asked == [b"mended"]
    assert len(read_rows(out)) == 20


def test_an_answer_that_is_no_text_is_kept_whole(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    content = b"\x89PNG\xff\x00"
    files[0].write_bytes(content)
    command = ("predict", "m", files[0], "--out", out, "--json", *model.options)
    assert marwright(*command).returncode == 0
    (row,) = read_rows(out)
    assert base64.b64decode(row["body_base64"]) == content
    assert json.loads(marwright(*command).stdout)["there_before"] == 1
    shown = marwright("predict", "m", files[0], *model.options).stdout
    assert shown.splitlines()[2].split()[1:] == [row["body_base64"], "(base64)"]


def test_answers_of_another_model_or_version_do_not_count(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    asked = (["m"], ["other"], ["m", "--version", "2.0"])
    for there_before in (0, 3):
        for words in asked:
            done = marwright("predict", *words, *files[:3], "--out", out, "--json", *model.options)
            assert json.loads(done.stdout)["there_before"] == there_before
    rows = read_rows(out)
    assert len(rows) == 9
    assert [(row["model"], row.get("version")) for row in rows[::3]] == [
        ("m", None),
        ("other", None),
        ("m", "2.0"),
    ]


def test_an_error_of_the_server_ends_the_run_and_keeps_the_answers(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    files[10].write_bytes(b"broken")
    command = ("predict", "m", *files, "--out", out, "--in-flight", "1", *model.options)
    done = marwright(*command)
    assert done.returncode == 1
    assert "answered 500" in done.stderr
    assert len(read_rows(out)) == 10
    files[10].write_text("mended", encoding="utf-8")
    assert marwright(*command).returncode == 0
    assert len(read_rows(out)) == 20


def test_ctrl_c_leaves_a_file_that_is_gone_on_with(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    model.delay = 0.2
    command = ["predict", "m", *map(str, files), "--out", str(out), "--in-flight", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "marwright", *command, *model.options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(model.asked) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert 2 <= len(read_rows(out)) < 20
    model.delay = 0.0
    assert marwright(*command, *model.options).returncode == 0
    assert len(read_rows(out)) == 20


def test_another_file_is_not_written_over(
    marwright: Command, model: Any, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("dear diary\n", encoding="utf-8")
    done = marwright("predict", "m", *files, "--out", out, *model.options)
    assert done.returncode == 2
    assert "no file of answers" in done.stderr
    assert out.read_text(encoding="utf-8") == "dear diary\n"
    assert model.asked == []


def test_without_a_file_answers_are_printed_in_the_inputs_order(
    marwright: Command, model: Any, files: list[Path]
) -> None:
    wanted = [*reversed(files), files[0]]
    done = marwright("predict", "m", *wanted, *model.options)
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert lines == [[str(path), path.stem] for path in wanted]


@pytest.mark.server
def test_a_real_model_answers_files_into_a_file(
    marwright: Command, server: TorchServe, run: Run, tmp_path: Path
) -> None:
    labels = {}
    for number, sample in enumerate(run.samples):
        path = tmp_path / f"{number}.png"
        shutil.copy(sample.path, path)
        labels[str(path)] = sample.prediction
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    key_file = ["--key-file", str(server.endpoint.key_file)]
    options = ["--inference-url", server.endpoint.inference_url, *key_file]
    done = marwright("predict", "cnn", *labels, tmp_path / "text.png", "--out", out, *options)
    assert done.returncode == 1
    rows = read_rows(out)
    answers = {row["input"]: next(iter(row["answer"])) for row in rows if "answer" in row}
    assert answers == labels
    assert [row["input"] for row in rows if "error" in row] == [str(tmp_path / "text.png")]
