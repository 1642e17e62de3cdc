from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from marwright.archive import Packed
from marwright.cli.main import app

HANDLER = """
def handle(data, context):
    if data is None:
        return None
    print("the handler prints")
    answers = []
    for index, row in enumerate(data):
        body = bytes(row["body"]) if isinstance(row["body"], bytearray) else row["body"]
        if body == b"refuse":
            context.set_response_status(418, "I am a teapot", index)
        if body == b"fail":
            local = "in sight"
            raise ValueError("no luck")
        answers.append(body if isinstance(body, bytes) else {"batch": len(data), "json": body})
    return answers
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A folder with an unpacked archive whose handler echoes."""
    folder = tmp_path / "model"
    (folder / "MAR-INF").mkdir(parents=True)
    manifest = {"runtime": "python", "model": {"modelName": "echo", "handler": "handler.py"}}
    (folder / "MAR-INF/MANIFEST.json").write_text(json.dumps(manifest))
    (folder / "handler.py").write_text(HANDLER)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Return a function that writes an input."""

    def write(content: bytes) -> Path:
        path = tmp_path / f"input-{len(list(tmp_path.iterdir()))}"
        path.write_bytes(content)
        return path

    return write


def invoke(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)], input=stdin)


def test_the_body_of_one_answer_is_printed_as_it_is(
    archive: Path, file: Callable[[bytes], Path]
) -> None:
    result = invoke(archive, file(b"a\xff\x00"))
    assert (result.exit_code, result.stdout_bytes) == (0, b"a\xff\x00")
    assert "the handler prints" in result.stderr


def test_an_archive_of_ours_answers(packed: Packed, scan: bytes, tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(scan)
    result = invoke(packed.path, tmp_path / "scan.png")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)) == 5


def test_an_archive_of_ours_explains(packed: Packed, scan: bytes, tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(scan)
    told = json.loads(invoke(packed.path, tmp_path / "scan.png", "--explain").stdout)
    assert told["method"] == "integrated_gradients"
    assert len(told["attributions"]) == 24


def test_several_inputs_make_a_table(archive: Path, file: Callable[[bytes], Path]) -> None:
    result = invoke(archive, file(b"one"), file(b"two"))
    header, _line, *rows = result.stdout.splitlines()
    assert header.split() == ["input", "status", "content", "type", "answer"]
    assert [row.split()[1:] for row in rows] == [["200", "one"], ["200", "two"]]


def test_rows_as_json_tell_text_json_and_bytes_apart(
    archive: Path, file: Callable[[bytes], Path]
) -> None:
    result = invoke(archive, file(b"text"), file(b'{"a": 1}'), file(b"\xff"), "--json")
    text, document, raw = json.loads(result.stdout)
    assert text["answer"] == "text"
    assert document["answer"] == {"a": 1}
    assert base64.b64decode(raw["body_base64"]) == b"\xff"
    assert {row["status"] for row in (text, document, raw)} == {200}


def test_inputs_go_one_by_one_or_as_a_batch(archive: Path, file: Callable[[bytes], Path]) -> None:
    inputs = file(b'{"a": 1}'), file(b'{"b": 2}')
    options = (archive, *inputs, "--json", "--content-type", "application/json")
    alone, together = invoke(*options), invoke(*options, "--batch")
    assert [row["answer"]["batch"] for row in json.loads(alone.stdout)] == [1, 1]
    assert [row["answer"]["batch"] for row in json.loads(together.stdout)] == [2, 2]


def test_a_refused_input_is_printed_and_fails(archive: Path, file: Callable[[bytes], Path]) -> None:
    result = invoke(archive, file(b"refuse"))
    assert (result.exit_code, result.stdout) == (1, "refuse")
    assert "error" not in result.stderr


def test_a_failing_handler_is_quoted_once(archive: Path, file: Callable[[bytes], Path]) -> None:
    result = invoke(archive, file(b"one"), file(b"fail"), "--batch", "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert [(row["status"], row["failure"]["place"]) for row in rows] == [
        (503, "handler.py:13")
    ] * 2
    line = "error: the handler failed (exception): ValueError: no luck at handler.py:13"
    assert result.stderr.count(line) == 1
    assert 'File "handler.py", line 13, in handle' in result.stderr


def test_a_handler_that_does_not_load_ends_in_one_error(
    marwright: Callable[..., subprocess.CompletedProcess[str]],
    archive: Path,
    file: Callable[[bytes], Path],
) -> None:
    (archive / "handler.py").write_text("import absent_module")
    answer = marwright("run", archive, file(b"one"))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith(f"error: {archive} cannot be loaded: found ModuleNotFoundError")
    assert "at handler.py:1;" in answer.stderr


def test_another_handler_answers(
    archive: Path, file: Callable[[bytes], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "def handle(data, context): return ['mine' for _ in data or ()]"
    )
    result = invoke(archive, file(b"one"), "--handler", tmp_path / "mine.py")
    assert result.stdout == "mine"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_profile_has_every_stage(
    packed: Packed, scan: bytes, tmp_path: Path, as_json: bool
) -> None:
    (tmp_path / "scan.png").write_bytes(scan)
    options = ["--profile", *(["--json"] if as_json else [])]
    result = invoke(packed.path, tmp_path / "scan.png", *options)
    stages = ["torch", "unpack", "import", "initialize", "preprocess", "infer", "postprocess"]
    stages += ["other", "protocol"]
    if as_json:
        profile = json.loads(result.stdout)["profile"]
        assert list(profile["seconds"]) == stages
        assert profile["measured_by"] == "torch modules"
        assert profile["seconds"]["infer"] > 0
    else:
        rows = [line.split() for line in result.stdout.splitlines()]
        assert [row[0] for row in rows[-10:]] == [*stages, "total"]
        assert rows[-1][2] == "100.0%"


def test_the_debugger_stops_in_the_handler(archive: Path, file: Callable[[bytes], Path]) -> None:
    result = invoke(archive, file(b"fail"), "--pdb", stdin="p local\nq\n")
    assert "'in sight'" in result.stderr
    assert result.exit_code == 1
    assert json.loads(result.stdout)["message"] == "Prediction failed"


def test_the_debugger_takes_commands_from_a_pipe_that_ends(
    archive: Path, file: Callable[[bytes], Path]
) -> None:
    (archive / "handler.py").write_text("secret = 7\n1 / 0")
    result = invoke(archive, file(b"one"), "--pdb", stdin="p secret * 6")
    assert "42" in result.stderr
    assert "ZeroDivisionError" in str(result.exception)


def test_watching_what_cannot_change_is_refused(packed: Packed, scan: bytes) -> None:
    result = invoke(packed.path, packed.path, "--watch")
    assert "pass --handler FILE" in str(result.exception)


@pytest.mark.parametrize("override", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_watched_handler_answers_again_until_ctrl_c(
    archive: Path, file: Callable[[bytes], Path], tmp_path: Path, override: bool
) -> None:
    handler = archive / "handler.py"
    options = []
    if override:
        (tmp_path / "mine").mkdir()
        handler = tmp_path / "mine/new.py"
        options = ["--handler", str(handler)]
    source = "def handle(data, context): return ['{}' for _ in data or ()]"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    handler.write_text(source.format("first"))
    command = [sys.executable, "-m", "marwright", "run", str(archive), str(file(b"one"))]
    with subprocess.Popen(
        [*command, "--watch", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for text in ("first", "no python (", "again"):
            broken = text == "no python ("
            if text != "first":
                handler.write_text(text if broken else source.format(text))
            if not broken:
                assert process.stdout.read(5) == text.encode()
            lines = [process.stderr.readline()]
            while b"watching" not in lines[-1]:
                lines.append(process.stderr.readline())
            assert (b"SyntaxError" in b"".join(lines)) == broken
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - started < 10
    assert not list(temporary.iterdir())
