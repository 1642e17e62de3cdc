from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.archive import Packed
from marwright.archive.checks.report import CheckReport, run_checks
from marwright.errors import ArchiveError, UsageError

Make = Callable[..., Any]
RUNS = (
    "open({!r}, 'w').close()\ndef handle(data, context):\n    return data and ['x' for _ in data]\n"
)


def ids(report: CheckReport) -> list[str]:
    return [f"{item.severity} {item.rule.id}" for item in report.findings]


def archive_with_archiver(folder: Path, handler: str, *options: str) -> Path:
    """Make an archive with the real torch-model-archiver and return its path."""
    out = folder / "out"
    out.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "m"]
    command += ["--version", "1.0", "--handler", handler, "--export-path", str(out), *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


def test_an_archive_of_ours_is_good_and_its_figures_are_told(packed: Packed) -> None:
    report = run_checks(packed.path)
    assert ids(report) == []
    assert report.is_good
    assert set(report.figures["seconds_per_request"]) == {1, 2, 8}


@pytest.mark.parametrize("form", ["default", "tgz", "no-archive"])
def test_an_archive_of_torch_model_archiver_is_read_in_each_format(
    tmp_path: Path, form: str
) -> None:
    (tmp_path / "handler.py").write_text(RUNS.format(str(tmp_path / "ran")) + "import absent_one\n")
    made = archive_with_archiver(tmp_path, "handler.py", "--archive-format", form)
    report = run_checks(made, preflight=False)
    assert ids(report) == ["error H308", "note I604"]
    assert not report.is_good
    assert not (tmp_path / "ran").exists()


def test_a_stock_handler_with_torchscript_is_tried_in_a_folder_that_stays_as_it_was(
    tmp_path: Path,
) -> None:
    network = torch.jit.script(torch.nn.Linear(600, 600))
    network.save(str(tmp_path / "net.pt"))  # more than is copied
    options = ("--serialized-file", "net.pt", "--archive-format", "no-archive")
    made = archive_with_archiver(tmp_path, "base_handler", *options)
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    report = run_checks(made)
    assert ids(report) == ["note I604", "note W531"]
    assert report.figures["load_seconds"] > 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_nothing_of_a_dangerous_archive_is_run(unpacked: Make, tmp_path: Path) -> None:
    folder, _ = unpacked(RUNS.format(str(tmp_path / "ran")))
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    made = Path(shutil.make_archive(str(tmp_path / "m"), "zip", folder))
    report = run_checks(made)
    assert ids(report)[0].startswith("danger P")
    assert ids(report)[-1] == "note W535"
    assert not (tmp_path / "ran").exists()


def test_nothing_of_an_altered_archive_is_run(packed: Packed) -> None:
    content = packed.path.read_bytes()
    at = content.index(b"class ImageClassifier")
    altered = content[:at] + b"clasS" + content[at + 5 :]
    packed.path.write_bytes(altered)
    report = run_checks(packed.path)
    assert not report.is_good
    assert ids(report)[-1] == "note W535"


def test_settings_that_are_unreadable_keep_it_from_being_tried(
    unpacked: Make, tmp_path: Path
) -> None:
    folder, _ = unpacked(RUNS.format(str(tmp_path / "ran")), settings="- a\n")
    assert ids(run_checks(folder)) == ["error C401", "note I604", "note W535"]
    assert not (tmp_path / "ran").exists()


def test_what_both_passes_find_is_told_once_with_its_traceback(unpacked: Make) -> None:
    folder, _ = unpacked("import absent_one\ndef handle(data, context): ...\n")
    report = run_checks(folder)
    assert ids(report) == ["error W502", "note I604"]
    assert "ModuleNotFoundError" in report.findings[0].detail


def test_syntax_is_judged_by_the_python_that_the_archive_declares(unpacked: Make) -> None:
    folder, _ = unpacked("def handle(data, context):\n    match data:\n        case _: return\n")
    assert ids(run_checks(folder, preflight=False)) == ["note I604"]
    (folder / "MAR-INF/spec.json").write_text('{"python": "3.9"}')
    assert "error H302" in ids(run_checks(folder, preflight=False))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="there is no archive"):
        run_checks(tmp_path / "absent.mar")
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as archive:
        archive.writestr("handler.py", "")
    with pytest.raises(ArchiveError, match=r"expected a member MAR-INF/MANIFEST\.json"):
        run_checks(tmp_path / "x.mar")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_time_limit_that_is_none_is_refused(unpacked: Make, timeout: float) -> None:
    folder, _ = unpacked("def handle(data, context): ...")
    with pytest.raises(UsageError, match="needs a time limit"):
        run_checks(folder, timeout=timeout)
