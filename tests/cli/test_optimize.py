from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive import Run

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def copy(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimize") / "digits"
    shutil.copytree(run.path, path)
    (path.parent / "plan.yaml").write_text(
        "rounds: 1\nvariants:\n  - name: plain\n  - {name: onnx, backend: onnx}\n",
        encoding="utf-8",
    )
    return path


def test_one_line_says_what_was_chosen_and_pack_follows(marwright: Command, copy: Path) -> None:
    answer = marwright("optimize", copy.name, "--plan", "plan.yaml", "--explain", cwd=copy.parent)
    assert answer.returncode == 0, answer.stderr
    chosen = json.loads((copy / "optimised/chosen.json").read_text(encoding="utf-8"))
    lines = answer.stdout.splitlines()
    assert [line for line in lines if line.strip().startswith(f"{chosen['variant']}: ")]
    loser = ({"plain", "onnx"} - {chosen["variant"]}).pop()
    (row,) = [line for line in lines if line.strip().startswith(f"{loser} ")]
    assert f"times as much as {chosen['variant']}: " in row
    packed = marwright("pack", copy.name, "--out", "store", "--json", cwd=copy.parent)
    assert packed.returncode == 0, packed.stderr
    assert f"packing {chosen['variant']}, which marwright optimize chose" in packed.stderr
    suffix = Path(chosen["file"]).suffix
    inside = marwright("inspect", "store/cnn.mar", cwd=copy.parent)
    assert f"{chosen['variant']}{suffix}" in inside.stdout
    told = marwright("inspect", "store/cnn.mar", "--json", cwd=copy.parent).stdout
    assert json.dumps(chosen["why"])[1:-1] in told  # the accuracy of what is in it


@pytest.mark.slow
def test_nothing_that_passes_ends_with_status_1_and_says_why(
    marwright: Command, copy: Path
) -> None:
    answer = marwright(
        *("optimize", copy.name, "--plan", "plan.yaml", "--max-size", "10KB", "--json"),
        cwd=copy.parent,
    )
    assert answer.returncode == 1
    decision = json.loads(answer.stdout)["decision"]
    assert decision["chosen"] is None
    assert "10 KB" in decision["line"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["nowhere"], 1, "there is no run folder nowhere"),
        (["digits", "--plan", "none.yaml"], 1, "none.yaml"),
        (["digits", "--plan", "bad.yaml"], 2, "is no plan"),
        (["digits", "--max-p99", "fast"], 2, "expected a number above 0 and us, ms or s"),
        (["digits", "--max-size", "5 elephants"], 2, "KB, MB"),
        (["digits", "--prefer", "beauty"], 2, "latency, throughput or size"),
        (["digits", "--max-accuracy-drop", "2"], 2, "expected 0 to 1"),
    ],
)
def test_bad_input_is_one_line(
    marwright: Command, copy: Path, arguments: list[str], status: int, text: str
) -> None:
    (copy.parent / "bad.yaml").write_text("variants: [{name: A, keep: 3}]\n", encoding="utf-8")
    answer = marwright("optimize", *arguments, cwd=copy.parent)
    assert (answer.returncode, text in answer.stderr) == (status, True), answer.stderr
    assert "Traceback" not in answer.stderr
