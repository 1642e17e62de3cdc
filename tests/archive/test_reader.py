from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from marwright.archive import Archive, Packed, Run
from marwright.errors import ArchiveError, RunError


def make_zip(path: Path, members: dict[str, str]) -> Path:
    """Write a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_a_packed_archive_opens(packed: Packed) -> None:
    assert Archive.open(packed.path).manifest.serialized_file == "model.pt"


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"model.pt": ""}, "expected a member MAR-INF/MANIFEST.json"),
        ({"MAR-INF/MANIFEST.json": "{"}, "broken manifest"),
        ({"MAR-INF/MANIFEST.json": "[]"}, "broken manifest"),
        ({"MAR-INF/MANIFEST.json": '{"model": {"modelName": "a"}}'}, "'handler'"),
        (
            {
                "MAR-INF/MANIFEST.json": '{"model": {"modelName": "a", "handler": "h.py",'
                ' "serializedFile": "model.pt"}}'
            },
            "no model.pt",
        ),
    ],
)
def test_a_broken_archive_is_told(tmp_path: Path, members: dict[str, str], found: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        Archive.open(make_zip(tmp_path / "a.mar", members))
    assert found in str(caught.value)


def test_what_is_no_zip_is_told(packed: Packed, tmp_path: Path) -> None:
    packed.path.write_bytes(packed.path.read_bytes()[:1000])
    (tmp_path / "text.mar").write_text("no archive", encoding="utf-8")
    for path in (packed.path, tmp_path / "text.mar"):
        with pytest.raises(ArchiveError, match="expected a zip file"):
            Archive.open(path)
    with pytest.raises(ArchiveError, match="there is no archive"):
        Archive.open(tmp_path / "absent.mar")


def test_every_problem_of_a_run_is_named_at_once(tmp_path: Path, run: Run) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "classes.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    for problem in ("config.json is not JSON", "classes.json holds dict", "model.pt is missing"):
        assert problem in str(caught.value)
    with pytest.raises(RunError, match="there is no run folder"):
        Run.open(tmp_path / "absent")
