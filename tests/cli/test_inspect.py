from __future__ import annotations

import json
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from marwright.archive import Packed
from marwright.archive.manifest import MANIFEST_NAME

Command = Callable[..., subprocess.CompletedProcess[str]]


def write(path: Path, **members: str) -> Path:
    manifest = {"model": {"modelName": "m", "handler": "h.py"}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST_NAME, json.dumps(manifest))
        for name, content in {"h.py": "", **members}.items():
            archive.writestr(name, content)
    return path


def test_a_packed_run_is_shown_with_all_that_it_carries(marwright: Command, packed: Packed) -> None:
    answer = marwright("inspect", packed.path)
    assert answer.returncode == 0, answer.stderr
    for line in (
        " model               cnn 1.0",
        " root digest         " + packed.root_digest,
        " bill of materials   yes",
        " signature           none",
        "   MANIFEST.json",
        " batchSize            8",
        " training.config.dataset",
    ):
        assert line in answer.stdout
    document = json.loads(marwright("inspect", packed.path, "--json").stdout)
    assert document["root_digest"] == packed.root_digest
    assert {member["name"] for member in document["members"]} >= {MANIFEST_NAME, "model.pt"}


def test_names_and_values_cannot_rule_the_terminal(marwright: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar", **{"a\x1b[2J\n forged": "", "sub/\u202egnp.exe": ""})
    answer = marwright("inspect", path)
    assert answer.returncode == 0
    assert "\x1b" not in answer.stdout + answer.stderr
    assert "\u202e" not in answer.stdout
    assert r"a\x1b[2J\n forged" in answer.stdout


def test_what_is_no_archive_gets_one_line(marwright: Command, tmp_path: Path) -> None:
    (tmp_path / "text.mar").write_text("text", encoding="utf-8")
    for name in ("text.mar", "absent\x1b.mar"):
        answer = marwright("inspect", tmp_path / name)
        assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
        assert "\x1b" not in answer.stderr


def test_an_archive_of_many_megabytes_is_shown_at_once(marwright: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    with zipfile.ZipFile(path, "a") as archive, archive.open("model.pt", "w") as member:
        for _ in range(128):
            member.write(bytes(1 << 20))
    began = time.monotonic()
    assert marwright("inspect", path).returncode == 0
    assert time.monotonic() - began < 5  # 0.4 s on a quiet machine
