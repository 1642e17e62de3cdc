from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marwright.archive import Run


def test_the_figures_are_those_of_the_last_measurement(root: Path) -> None:
    measured = json.loads((root / "benchmarks/results/way.json").read_text("utf-8"))
    readme = (root / "README.md").read_text("utf-8")
    demo, boot = measured["demo"], measured["boot"]
    assert f"{demo['total_seconds']} s, of which training {demo['train_seconds']} s" in readme
    assert f"{boot['ratio']} times" in readme
    archive = json.loads((root / "benchmarks/results/archive.json").read_text("utf-8"))["pack"]
    for name in ("torch-model-archiver", "torch-model-archiver zip-store"):
        assert f"{archive[name]['times_slower']} times" in readme


@pytest.mark.server
def test_the_readmes_python_runs_as_written(root: Path, run: Run, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run.path)
    answer = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "415 POST /predictions/digits answered 415: expected a PNG" in answer.stdout
