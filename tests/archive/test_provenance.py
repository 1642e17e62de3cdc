from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import marwright
from marwright.archive.provenance import Provenance, Source, make_provenance
from marwright.archive.run import Run
from marwright.errors import RunError

REPORT = {"accuracy": 0.98, "seed": 3, "data_digest": "ab", "versions": {"torch": "2.13.0"}}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=Ann", "-c", "user.email=ann@example.org", *arguments],
        cwd=folder,
        env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A committed spec with its handler, beside weights that git does not know."""
    folder = tmp_path / "secret-place/models/cnn"
    (folder / "lib").mkdir(parents=True)
    for name in ("model.yaml", "handler.py", "lib/shared.py"):
        (folder / name).write_text(name, encoding="utf-8")
    root = tmp_path / "secret-place"
    git(root, "init", "-q")
    git(root, "remote", "add", "origin", "https://ann:token@example.org/models.git")
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", "first")
    (folder / "model.pt").write_bytes(b"weights")
    return folder / "model.yaml"


def find_source(spec: Path, *names: str) -> Source:
    source = make_provenance(spec_path=spec, sources=[spec.parent / name for name in names]).source
    assert source is not None
    return source


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run as far as provenance looks at it."""
    return Run(tmp_path / "run", {"model": "cnn", "lr": 0.05}, ("0",), dict(REPORT), ())


def test_a_run_tells_its_config_and_report(run: Run) -> None:
    training = json.loads(make_provenance(run=run).to_json())["training"]
    assert training["config"] == run.config
    assert training["report"]["versions"]["torch"] == run.report["versions"]["torch"]
    left_out = {"items_per_second", "seconds", "train_seconds", "unreadable"}
    assert set(run.report) - set(training["report"]) == left_out
    assert training["report"].items() <= run.report.items()


def test_how_long_a_training_took_changes_nothing(small: Run) -> None:
    slow = replace(small, report={**REPORT, "seconds": 99.5, "train_seconds": 98.0})
    assert make_provenance(run=slow).to_json() == make_provenance(run=small).to_json()


def test_a_report_beside_a_spec_is_told_without_a_run(tmp_path: Path) -> None:
    found = make_provenance(report=REPORT, spec_path=tmp_path / "model.yaml")
    assert found == Provenance(source=None, training={"report": REPORT})


def test_the_file_is_sorted_json_that_ends_in_a_newline(small: Run) -> None:
    text = make_provenance(run=small).to_json()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True).encode() + b"\n"
    assert json.loads(text)["packed_by"] == {"name": "marwright", "version": marwright.__version__}


def test_what_nothing_is_known_of_is_absent() -> None:
    assert set(json.loads(make_provenance().to_json())) == {"format", "packed_by"}


def test_a_committed_spec_stands_at_its_commit(spec: Path) -> None:
    source = find_source(spec, "handler.py", "lib/shared.py")
    assert source == Source(git(spec.parent, "rev-parse", "HEAD"), (), (), ())


def test_packed_files_that_differ_from_the_commit_are_named(spec: Path) -> None:
    for name in ("handler.py", "lib/shared.py"):
        (spec.parent / name).write_text("changed", encoding="utf-8")
    source = find_source(spec, "handler.py", "model.pt")  # lib/shared.py is not packed
    assert (source.modified, source.untracked) == (("handler.py",), ("model.pt",))
    spec.write_text("changed", encoding="utf-8")
    assert find_source(spec).modified == ("model.yaml",)


def test_names_are_relative_to_the_spec(spec: Path) -> None:
    other = spec.parents[1] / "shared/net.py"
    other.parent.mkdir()
    other.write_text("net", encoding="utf-8")
    (spec.parent / "lib/new.py").write_text("new", encoding="utf-8")
    source = find_source(spec, "lib/new.py", "../shared/net.py")
    assert source.untracked == ("../shared/net.py", "lib/new.py")


def test_a_spec_reached_through_a_link_names_files_alike(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(spec.parent)
    assert find_source(tmp_path / "link/model.yaml", "model.pt").untracked == ("model.pt",)


def test_a_file_outside_the_repository_has_no_path(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"weights")
    (spec.parent / "linked.pt").symlink_to(tmp_path / "weights.pt")
    source = find_source(spec, str(tmp_path / "weights.pt"), "linked.pt")
    assert source.outside == ("linked.pt", "weights.pt")


def test_a_spec_of_which_git_holds_nothing_has_no_source(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("", encoding="utf-8")
    assert make_provenance(spec_path=tmp_path / "model.yaml").source is None
    scratch = spec.parents[2] / "scratch/model.yaml"
    scratch.parent.mkdir()
    scratch.write_text("", encoding="utf-8")
    assert make_provenance(spec_path=scratch).source is None


def test_a_new_spec_beside_a_committed_handler_has_a_source(spec: Path) -> None:
    spec = spec.rename(spec.with_name("new.yaml"))
    assert find_source(spec, "handler.py").untracked == ("new.yaml",)


def test_another_folder_zone_and_umask_give_the_same_bytes(
    spec: Path,
    small: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    umask: Callable[[int], AbstractContextManager[None]],
) -> None:
    def write(path: Path) -> bytes:
        sources = [path.parent / name for name in ("model.pt", "handler.py")]
        return make_provenance(run=small, spec_path=path, sources=sources).to_json()

    (spec.parent / "handler.py").write_text("changed", encoding="utf-8")
    first = write(spec)
    with umask(0o077):
        shutil.copytree(tmp_path / "secret-place", tmp_path / "other")
        monkeypatch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        monkeypatch.chdir(tmp_path / "other/models")
        second = write(Path("cnn/model.yaml"))
    monkeypatch.undo()
    time.tzset()
    assert first == second


def test_nothing_of_the_machine_or_the_remote_is_told(
    spec: Path, small: Run, tmp_path: Path
) -> None:
    (tmp_path / "outside.pt").write_bytes(b"weights")
    sources = [spec.parent / "model.pt", tmp_path / "outside.pt"]
    text = make_provenance(run=small, spec_path=spec, sources=sources).to_json().decode()
    for word in ("secret-place", "token", "Ann", "example.org", str(tmp_path), "origin"):
        assert word not in text


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), pytest.param(None, id="nested too deeply")]
)
def test_a_report_that_is_no_strict_json_is_refused(small: Run, value: Any) -> None:
    if value is None:
        for _ in range(5_000):
            value = [value]
    with pytest.raises(RunError, match="cannot be packed: expected a report without NaN"):
        make_provenance(run=replace(small, report={"accuracy": value}))
