from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from marwright.archive import worktree
from marwright.archive.worktree import WorkTree

AUTHOR = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]


def git(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["git", *AUTHOR, "-C", str(folder), *arguments],
        env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, **(env or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def make_repository(folder: Path, *options: str, **files: str) -> Path:
    """Commit files, named with `_` for `.`, in a new repository."""
    git(folder.parent, "init", "-q", *options, str(folder))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


def find(folder: Path) -> WorkTree:
    tree = WorkTree.find(folder)
    assert tree is not None
    return tree


@pytest.mark.parametrize("form", ["sha1", "sha256"])
def test_a_clean_work_tree_stands_at_its_commit(tmp_path: Path, form: str) -> None:
    folder = make_repository(tmp_path / "r", f"--object-format={form}", a_py="1", b_py="2")
    (folder / "new.py").write_text("3")
    tree = find(folder)
    assert tree.commit == git(folder, "rev-parse", "HEAD")
    assert tree.root == folder.resolve()
    assert (tree.tracked, tree.changed) == ({"a.py", "b.py"}, frozenset())


def test_a_folder_inside_stands_where_the_whole_does(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a_py="1")
    (folder / "deep/er").mkdir(parents=True)
    (folder / "a.py").write_text("2")
    assert find(folder / "deep/er") == find(folder)
    assert find(folder).changed == {"a.py"}


def test_every_kind_of_change_counts(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", edited="1", staged="1", gone="1", same="1")
    for name in ("edited", "staged"):
        (folder / name).write_text("2")
    (folder / "gone").unlink()
    (folder / "added").write_text("1")
    (folder / "with space\n").write_text("1")
    git(folder, "add", "staged", "added", "with space\n")
    tree = find(folder)
    assert tree.changed == {"edited", "staged", "gone", "added", "with space\n"}
    assert tree.tracked == {"edited", "staged", "gone", "same"}


def test_a_file_with_a_new_name_is_two_changes(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="many words\n" * 9)
    git(folder, "mv", "a", "b")
    assert find(folder).changed == {"a", "b"}


def test_a_conflict_is_a_change(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1\n")
    git(folder, "checkout", "-q", "-b", "other")
    for text in ("2\n", "3\n"):
        (folder / "a").write_text(text)
        git(folder, "commit", "-q", "-a", "-m", text)
        git(folder, "checkout", "-q", "-")
    with pytest.raises(subprocess.CalledProcessError):
        git(folder, "merge", "-")
    assert find(folder).changed == {"a"}


def test_mode_and_times_are_no_change(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1", b="2")
    (folder / "a").chmod(0o755)
    os.utime(folder / "b", (0, 0))
    assert not find(folder).changed


def test_a_copy_of_the_folder_tells_the_same(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1", b="2")
    (folder / "a").write_text("2")
    tree, copy = find(folder), find(Path(shutil.copytree(folder, tmp_path / "copy")))
    assert (copy.commit, copy.changed, copy.tracked) == (tree.commit, tree.changed, tree.tracked)


def test_a_linked_work_tree_has_its_own_commit(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    git(folder, "worktree", "add", "-q", str(tmp_path / "linked"))
    git(tmp_path / "linked", "rm", "-q", "a")
    git(tmp_path / "linked", "commit", "-q", "-m", "second")
    assert find(tmp_path / "linked").tracked == frozenset()
    assert find(folder).tracked == {"a"}


def test_a_split_index_is_read(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1", b="2")
    git(folder, "update-index", "--split-index")
    assert list((folder / ".git").glob("sharedindex.*"))
    (folder / "a").write_text("2")
    assert find(folder).changed == {"a"}


def test_a_file_in_large_file_storage_counts_by_its_content(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 7\n"
    folder = make_repository(
        tmp_path / "r", _gitattributes="*.pt filter=lfs", a_pt=pointer, b_pt=pointer, c_pt=pointer
    )
    (folder / "a.pt").write_bytes(b"weights")
    (folder / "b.pt").write_bytes(b"others")
    (folder / "c.pt").unlink()
    assert find(folder).changed == {"b.pt", "c.pt"}


@pytest.mark.parametrize("kind", ["plain", "bare", "unborn"])
def test_a_folder_without_a_commit_has_none(tmp_path: Path, kind: str) -> None:
    if kind != "plain":
        git(tmp_path, "init", "-q", *(["--bare"] if kind == "bare" else []), ".")
    assert WorkTree.find(tmp_path) is None
    assert WorkTree.find(tmp_path / "absent") is None


def test_a_damaged_repository_has_no_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    (folder / ".git/index").write_bytes(b"no index")
    assert WorkTree.find(folder) is None
    assert "is left out" in caplog.text


def test_a_machine_without_git_knows_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert WorkTree.find(folder) is None


def test_a_git_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG):
        assert WorkTree.find(tmp_path, timeout=0.2) is None
    assert time.monotonic() - started < 5
    assert "no answer in time" in caplog.text


def test_variables_of_git_do_not_lead_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = (make_repository(tmp_path / name, a=name) for name in ("r", "other"))
    for name, value in {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_INDEX_FILE": other / ".git/index",
        "GIT_CONFIG_COUNT": "broken",
    }.items():
        monkeypatch.setenv(name, str(value))
    tree = WorkTree.find(folder)
    assert tree is not None
    assert (tree.root, tree.changed) == (folder.resolve(), frozenset())


def test_files_of_another_owner_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    stranger = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}  # git's own switch for its tests
    with pytest.raises(subprocess.CalledProcessError, match="128"):
        git(folder, "status", env=stranger)
    monkeypatch.setattr(worktree, "_ENVIRONMENT", {**worktree._ENVIRONMENT, **stranger})
    assert find(folder).tracked == {"a"}


def make_hostile(folder: Path, program: str) -> None:
    """Name a program wherever a repository's configuration can."""
    for setting in (
        "core.fsmonitor",
        "core.pager",
        "core.sshCommand",
        "core.alternateRefsCommand",
        "diff.external",
        "filter.evil.clean",
        "filter.evil.smudge",
        "filter.evil.process",
        "gpg.program",
        "pager.status",
        "remote.origin.uploadpack",
        "credential.helper",
    ):
        git(folder, "config", setting, program)
    for setting, value in {
        "remote.origin.url": f"ext::{program}",
        "remote.origin.promisor": "true",
        "extensions.partialClone": "origin",
        "protocol.allow": "always",
        "log.showSignature": "true",
    }.items():
        git(folder, "config", setting, value)
    (folder / ".git/info/attributes").write_text("* filter=evil diff=evil\n")
    for hook in ("post-index-change", "fsmonitor-watchman", "pre-auto-gc"):
        shutil.copy(program, folder / ".git/hooks" / hook)


def test_a_hostile_repository_runs_nothing(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1", b="2", _gitattributes="* filter=evil")
    inner = make_repository(folder / "inner", c="3")
    git(folder, "add", "inner")
    git(folder, "commit", "-q", "-m", "with a repository inside")
    program, trace = tmp_path / "program", tmp_path / "trace"
    program.write_text(f'#!/bin/sh\necho "$0 $*" >> {trace}\n')
    program.chmod(0o755)
    make_hostile(folder, str(program))
    make_hostile(inner, str(program))
    (folder / "a").write_text("3")
    os.utime(folder / "b", (0, 0))
    assert find(folder).changed == {"a"}
    assert not trace.exists()
    subprocess.run(["git", "-C", folder, "status"], capture_output=True, check=False)
    assert "program" in trace.read_text()  # plain git does run it


def test_a_commit_that_is_not_there_is_not_fetched(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    program, trace = tmp_path / "program", tmp_path / "trace"
    program.write_text(f'#!/bin/sh\necho "$0 $*" >> {trace}\n')
    program.chmod(0o755)
    make_hostile(folder, str(program))
    tree = git(folder, "rev-parse", "HEAD^{tree}")
    (folder / ".git/objects" / tree[:2] / tree[2:]).unlink()
    assert WorkTree.find(folder) is None
    assert not trace.exists()
    with pytest.raises(subprocess.CalledProcessError):
        git(folder, "ls-tree", "HEAD")
    assert trace.exists()  # plain git does ask for it


def test_nothing_is_written_into_the_repository(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "r", a="1")
    os.utime(folder / "a", (0, 0))  # a plain `git status` would note the new time in the index
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    find(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
