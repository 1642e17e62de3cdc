from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from marwright.archive import Run

Command = Callable[..., subprocess.CompletedProcess[str]]
HANDLER = (
    "class Handler:\n"
    "    def initialize(self, context): ...\n"
    "    def handle(self, data, context): return ['ok'] * len(data)\n"
)
ARGUMENTS = ["--model-name", "m", "--version", "1.0", "--handler", "handler.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "handler.py").write_text(HANDLER)
    return tmp_path


def pack(marwright: Command, folder: Path, *arguments: str | Path, status: int = 0) -> str:
    """Pack in a folder; return standard output, or standard error where it must fail."""
    answer = marwright("pack", *arguments, cwd=folder)
    assert answer.returncode == status, answer.stderr
    assert "Traceback" not in answer.stderr.split("error:")[0]
    return answer.stderr if status else answer.stdout


def test_a_run_is_tried_and_packed(marwright: Command, folder: Path, run: Run) -> None:
    told = json.loads(pack(marwright, folder, run.path, "--name", "digits", "--json"))
    assert told["path"] == "model_store/digits.mar"
    assert not told["findings"]
    assert told["figures"]["load_seconds"] > 0
    assert (folder / "model_store/digits.mar").stat().st_size == told["size_bytes"]


def test_torch_model_archivers_arguments_are_tried_too(marwright: Command, folder: Path) -> None:
    assert "m.mar" in pack(marwright, folder, *ARGUMENTS)
    (folder / "handler.py").write_text(HANDLER.replace("...", "raise KeyError('lost')"))
    told = pack(marwright, folder, *ARGUMENTS, "-f", status=1)
    assert "handler.py:2" in told
    assert "KeyError: 'lost'" in told
    pack(marwright, folder, *ARGUMENTS, "-f", "--no-preflight")


def test_a_failed_preflight_leaves_the_old_archive(marwright: Command, folder: Path) -> None:
    (folder / "m.mar").write_bytes(b"old")
    (folder / "handler.py").write_text(HANDLER.replace("...", "1 / 0"))
    arguments = [*ARGUMENTS, "-f"]
    assert "ZeroDivisionError" in pack(marwright, folder, *arguments, status=1)
    assert (folder / "m.mar").read_bytes() == b"old"


def test_samples_are_tried_where_they_are_given(marwright: Command, folder: Path) -> None:
    (folder / "handler.py").write_text(HANDLER.replace("['ok'] * len(data)", "['one']"))
    (folder / "s.txt").write_text("s")
    (folder / "config.yaml").write_text("batchSize: 2")
    arguments = [*ARGUMENTS, "--config-file", "config.yaml"]
    told = pack(marwright, folder, *arguments, "--sample", "s.txt", status=1)
    assert "W511 1 answers to 2 requests" in told


def test_a_spec_is_packed(marwright: Command, folder: Path) -> None:
    spec = {"name": "m", "handler": "handler.py", "files": ["notes.txt"]}
    (folder / "notes.txt").write_text("n")
    (folder / "model.yaml").write_text(yaml.safe_dump(spec))
    told = json.loads(pack(marwright, folder, "model.yaml", "--version", "7", "--json"))
    assert (told["path"], told["version"]) == ("model_store/m.mar", "7")


def test_what_a_spec_does_wrong_is_told_with_lines(marwright: Command, folder: Path) -> None:
    (folder / "model.yaml").write_text("name: m\nhandlr: x.py\nsettings:\n  batchsize: 1\n")
    told = pack(marwright, folder, "model.yaml", status=1)
    assert "model.yaml:2: handlr: no such key; did you mean handler?" in told
    assert "model.yaml:4: settings.batchsize: no such key; did you mean batchSize?" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "pack needs --model-name, --version, --handler"),
        (["runs/x", "--serialized-file", "m.pt"], "--serialized-file does not go with a run"),
        (["model.yaml", "--handler", "h.py"], "--config-file and --handler go with a run"),
        (["runs/x", "--archive-format", "tgz"], "--archive-format does not go with a run"),
        (["--model-name", "m", "-v", "1", "--handler", "h", "--runtime", "go"], "one of LSP"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_told(
    marwright: Command, folder: Path, arguments: list[str], told: str
) -> None:
    assert told in pack(marwright, folder, *arguments, status=2)


def test_the_schema_is_json(marwright: Command, tmp_path: Path) -> None:
    schema = json.loads(marwright("schema", cwd=tmp_path, env=dict(os.environ)).stdout)
    assert schema["properties"]["settings"]["$ref"] == "#/$defs/ModelSettings"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("'ok'", "no JSON"),
        ("{'label': 3}", "$.label: 3 is not of type 'string'"),
        ("{'label': 'a'}", ""),
    ],
)
def test_answers_must_fit_the_declared_output(
    marwright: Command, folder: Path, answer: str, told: str
) -> None:
    (folder / "handler.py").write_text(HANDLER.replace("'ok'", answer))
    (folder / "s.txt").write_text("s")
    schema = {"type": "object", "properties": {"label": {"type": "string"}}}
    spec = {
        "name": "m",
        "handler": "handler.py",
        "samples": ["s.txt"],
        "output": {"schema": schema},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(spec))
    printed = pack(marwright, folder, "model.yaml", status=1 if told else 0)
    assert told in printed
    assert ("W521" in printed) == bool(told)


def test_many_packs_of_one_name_at_once_give_one_whole_archive(folder: Path) -> None:
    command = [sys.executable, "-m", "marwright", "pack", *ARGUMENTS, "--force", "--no-preflight"]
    # Neither the language nor the time zone of whoever packs is in the bytes.
    places = [{"LC_ALL": "C", "TZ": "UTC"}, {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}] * 2
    packs = [
        subprocess.Popen(command, cwd=folder, env={**os.environ, **place}, stdout=subprocess.PIPE)
        for place in places
    ]
    told = {pack.communicate()[0].split()[-1] for pack in packs}
    assert [pack.returncode for pack in packs] == [0, 0, 0, 0]
    assert len(told) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["handler.py", "m.mar"]
    with zipfile.ZipFile(folder / "m.mar") as archive:
        assert archive.testzip() is None


def test_what_is_packed_is_scanned(marwright: Command, folder: Path) -> None:
    (folder / "A.txt").touch()
    (folder / "a.txt").touch()
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    arguments = [*ARGUMENTS, "--no-preflight", "--extra-files"]
    answer = marwright("pack", *arguments, "A.txt,a.txt", cwd=folder)
    assert answer.returncode == 0
    assert "warning S106" in answer.stderr
    told = pack(marwright, folder, *arguments, "evil.pkl", "--force", status=1)
    assert "P201" in told
    assert "os.system" in told
