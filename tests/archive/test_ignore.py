from __future__ import annotations

from pathlib import Path

import pytest

from marwright.archive.ignore import Ignore, walk_files
from marwright.errors import ArchiveError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def list_files(folder: Path) -> list[str]:
    ignore = Ignore.read(folder)
    files = walk_files(folder, skip=ignore.covers)
    return sorted(path.relative_to(folder).as_posix() for path in files if not ignore.covers(path))


def test_caches_and_hidden_folders_stay_out(tmp_path: Path) -> None:
    make(tmp_path, "a.py", "__pycache__/a.pyc", ".git/config", "b/.cache/x", "b/.env", "c.pyc")
    assert list_files(tmp_path) == ["a.py", "b/.env"]


def test_patterns_are_those_of_a_gitignore(tmp_path: Path) -> None:
    make(tmp_path, "a.csv", "keep.csv", "data/raw/x.bin", "data/x.bin", "sub/data/y", "#odd")
    (tmp_path / ".marwrightignore").write_text("# comment\n*.csv\n!keep.csv\n/data/raw/\n\\#odd\n")
    assert list_files(tmp_path) == ["data/x.bin", "keep.csv", "sub/data/y"]


def test_a_pattern_may_take_a_hidden_folder_in(tmp_path: Path) -> None:
    make(tmp_path, ".well-known/a.json", ".other/b.json")
    (tmp_path / ".marwrightignore").write_text("!.well-known/\n")
    assert list_files(tmp_path) == [".well-known/a.json"]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "a")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert list_files(tmp_path) == ["a"]


def test_a_file_of_patterns_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".marwrightignore").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArchiveError, match="expected UTF-8 text"):
        Ignore.read(tmp_path)


def test_a_folder_linked_into_itself_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/b/c")
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a")
    with pytest.raises(ArchiveError, match="leads back to a folder above it"):
        list_files(tmp_path)
