from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from marwright.archive import Spec, pack_spec

Command = Callable[..., subprocess.CompletedProcess[str]]


def pack(path: Path, handler: str = "def handle(data, context): ...\n", value: float = 1.0) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "handler.py").write_text(handler, encoding="utf-8")
    torch.save({"layer.weight": torch.full((3,), value)}, folder / "model.pt")
    spec = Spec.create(name="m", handler="handler.py", model="model.pt")
    return pack_spec(spec, folder=folder, out=path, preflight=None).path


def test_equal_archives_exit_0_and_others_1(marwright: Command, tmp_path: Path) -> None:
    first, second = pack(tmp_path / "a.mar"), pack(tmp_path / "b.mar")
    third = pack(tmp_path / "c.mar", value=1.5)
    same = marwright("diff", first, second)
    assert (same.returncode, same.stdout) == (0, f"{first} and {second} hold the same\n")
    other = marwright("diff", first, third, "--json")
    assert other.returncode == 1
    document = json.loads(other.stdout)
    assert document["equal"] is False
    assert document["weights"][0]["tensors"][0]["max_abs"] == 0.5


def test_what_differs_is_shown_and_texts_where_asked(marwright: Command, tmp_path: Path) -> None:
    first = pack(tmp_path / "a.mar")
    second = pack(tmp_path / "b.mar", "def handle(data, context):\n    return data\n", 2.0)
    plain, full = (marwright("diff", first, second, *more) for more in ((), ("--text",)))
    assert plain.returncode == full.returncode == 1
    assert "weights model.pt: torch.save, 1 tensors differ, 0 are equal" in plain.stdout
    assert (
        " layer.weight   values   float32 [3]   float32 [3]   1         1         3 of 3"
        in plain.stdout
    )
    assert "+2 -1 lines" in plain.stdout
    assert "+    return data" not in plain.stdout
    assert "+    return data" in full.stdout


def test_an_archive_that_is_not_there_gets_one_line(marwright: Command, tmp_path: Path) -> None:
    answer = marwright("diff", pack(tmp_path / "a.mar"), tmp_path / "absent.mar")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: there is no archive")
