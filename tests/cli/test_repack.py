from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive import Packed
from marwright.archive.summary import Summary

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_settings_files_and_version_are_changed_at_once(
    marwright: Command, packed: Packed, tmp_path: Path
) -> None:
    (tmp_path / "a=b.txt").write_text("text", encoding="utf-8")
    options = ["--set", "batchSize=4", "--set", "handler.threads=2", "--set", "startupTimeout="]
    options += ["--add", "a=b.txt", "--add", "a=b.txt=docs/note.txt", "--version", "1.1"]
    answer = marwright("repack", packed.path, *options, "--out", "b.mar", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    summary = Summary.read(tmp_path / "b.mar")
    assert json.loads(answer.stdout)["root_digest"] == summary.root_digest
    assert summary.manifest.version == "1.1"
    assert (summary.settings["batchSize"], summary.settings["handler"]["threads"]) == (4, 2)
    assert "startupTimeout" not in summary.settings
    assert {"a=b.txt", "docs/note.txt"} <= {member.name for member in summary.members}


def test_a_handler_that_crashes_is_found_before_anything_is_written(
    marwright: Command, packed: Packed, tmp_path: Path
) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("1 / 0\n\n\ndef handle(data, context): ...\n", encoding="utf-8")
    before = packed.path.read_bytes()
    answer = marwright("repack", packed.path, "--handler", crash, "--force")
    assert answer.returncode == 1
    assert "ZeroDivisionError" in answer.stderr
    assert packed.path.read_bytes() == before
    forced = marwright("repack", packed.path, "--handler", crash, "--force", "--no-preflight")
    assert forced.returncode == 0, forced.stderr
    assert "left out, since only the old handler used it" in forced.stderr


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--set", "batchSize"], 2, "--set takes KEY=VALUE"),
        (["--set", "=4"], 2, "--set takes KEY=VALUE"),
        (["--set", "batchSize=[4"], 2, "the value of batchSize is no YAML"),
        (["--set", "batchsize=4", "--force"], 1, "did you mean batchSize?"),
        (["--add", "=x", "--force"], 2, "--add takes PATH"),
        (["--add", "absent", "--force"], 1, "there is no file absent"),
        (["--remove", "model.pt", "--force"], 1, "cannot be removed"),
        (["--version", "2.0"], 1, "exists; pass --force"),
    ],
)
def test_a_mistake_gets_one_line_and_its_status(
    marwright: Command, packed: Packed, options: list[str], status: int, text: str
) -> None:
    before = packed.path.read_bytes()
    answer = marwright("repack", packed.path, *options, "--no-preflight")
    assert (answer.returncode, text in answer.stderr) == (status, True), answer.stderr
    assert "Traceback" not in answer.stderr
    assert packed.path.read_bytes() == before
