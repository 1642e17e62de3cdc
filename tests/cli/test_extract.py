from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from marwright.archive import Archive, Packed

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_an_archive_is_unpacked_under_its_models_name(
    marwright: Command, packed: Packed, tmp_path: Path
) -> None:
    answer = marwright("extract", packed.path, "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["folder"] == "cnn"
    with Archive.open(packed.path) as archive:
        for name in archive.names:
            assert (tmp_path / "cnn" / name).read_bytes() == archive.read(name)


def test_single_files_go_where_they_are_wanted(
    marwright: Command, packed: Packed, tmp_path: Path
) -> None:
    names = ("model-config.yaml", "MAR-INF/MANIFEST.json")
    options = [option for name in names for option in ("--member", name)]
    answer = marwright("extract", packed.path, "--to", tmp_path / "out", *options)
    assert answer.returncode == 0, answer.stderr
    found = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "out").as_posix() for path in found} == set(names)
    again = marwright("extract", packed.path, "--to", tmp_path / "out", *options)
    assert (again.returncode, "--force" in again.stderr) == (1, True)
    absent = marwright("extract", packed.path, "--to", tmp_path / "out", "--member", "absent")
    assert "has no member absent; marwright inspect" in absent.stderr


def test_a_folder_of_something_else_is_never_replaced(
    marwright: Command, packed: Packed, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    answer = marwright("extract", packed.path, "--to", tmp_path / "mine", "--force")
    assert (answer.returncode, "something else" in answer.stderr) == (1, True)
    assert (tmp_path / "mine/thesis.txt").exists()
