from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive import Run

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    shutil.copytree(run.path, tmp_path / "digits")
    return tmp_path / "digits"


def test_an_export_is_compared_with_the_network(marwright: Command, copy: Path) -> None:
    answer = marwright("export", copy, "--to", "onnx", "--json")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["path"] == str(copy / "exported/digits.onnx")
    assert Path(result["path"]).stat().st_size == result["size_bytes"]
    assert result["parity"]["worst"] < 1e-3
    assert result["accuracy"] == result["accuracy_before"] > 0.8
    again = marwright("export", copy, "--to", "onnx")
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_tensorflow_that_is_not_installed_is_told_with_the_command(
    marwright: Command, copy: Path
) -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        answer = marwright("export", copy, "--to", "savedmodel")
        assert answer.returncode == 2
        assert "pip install 'marwright[tf]'" in answer.stderr
        assert not (copy / "exported").exists()
    else:
        pytest.skip("TensorFlow is installed")


def test_tensorflow_loads_what_was_exported(marwright: Command, copy: Path) -> None:
    pytest.importorskip("tensorflow")
    pytest.importorskip("ai_edge_litert")
    for form in ("savedmodel", "tflite"):
        answer = marwright("export", copy, "--to", form, "--json")
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["parity"]["worst"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [(["nowhere"], 1, "no run folder"), (["digits", "--to", "word"], 2, "torchscript, onnx")],
)
def test_bad_input_is_one_line(
    marwright: Command, copy: Path, arguments: list[str], status: int, text: str
) -> None:
    answer = marwright("export", *arguments, cwd=copy.parent)
    assert (answer.returncode, text in answer.stderr) == (status, True), answer.stderr
    assert "Traceback" not in answer.stderr
