from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Packed

Command = Callable[..., Any]
MANIFEST = '{"model": {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py"}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An unpacked archive whose handler cannot be imported."""
    folder = tmp_path / "m"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF/MANIFEST.json").write_text(MANIFEST)
    (folder / "handler.py").write_text("import absent_one\n\ndef handle(data, context): ...\n")
    return folder


def test_a_good_archive_is_tried_and_its_figures_are_printed(
    marwright: Command, packed: Packed
) -> None:
    done = marwright("check", packed.path)
    assert done.returncode == 0
    assert "peak memory" in done.stdout
    assert "a request, batch size 8" in done.stdout
    assert done.stderr == f"{packed.path}: good\n"


def test_what_was_found_is_printed_with_place_and_remedy(marwright: Command, folder: Path) -> None:
    done = marwright("check", folder, "--no-preflight")
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "H308" in line]
    assert line.split()[:3] == ["error", "H308", "handler.py:1"]
    assert "add absent-one to --requirements-file" in line
    assert done.stderr == f"{folder}: not to be served\n"


def test_a_traceback_is_printed_below(marwright: Command, folder: Path) -> None:
    done = marwright("check", folder)
    assert done.returncode == 1
    assert "\nW502 handler.py:1\n    Traceback (most recent call last):\n" in done.stdout
    assert "    ModuleNotFoundError: No module named 'absent_one'\n" in done.stdout


def test_json_and_sarif_hold_every_finding(
    marwright: Command, folder: Path, tmp_path: Path
) -> None:
    done = marwright("check", folder, "--no-run", "--json", "--sarif", tmp_path / "out.sarif")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert [item["id"] for item in report["findings"]] == ["H308", "I604"]
    results = json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"]
    assert [item["ruleId"] for item in results] == ["H308", "I604"]


def test_what_is_no_archive_ends_in_one_line(marwright: Command, tmp_path: Path) -> None:
    done = marwright("check", tmp_path / "absent.mar")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no archive")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [("--timeout", "0"), ("--timeout", "x"), ("--nonsense",), ()])
def test_a_call_that_cannot_be_meant_ends_with_2(
    marwright: Command, folder: Path, options: tuple[str, ...]
) -> None:
    assert marwright("check", *([folder] if options else []), *options).returncode == 2
