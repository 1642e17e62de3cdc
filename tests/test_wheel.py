from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True, timeout=170)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"marwright", next(top for top in tops if top.endswith(".dist-info"))}
    for needed in ("handlers/image_classifier.py", "training/train.py", "server/log4j2.xml"):
        assert f"marwright/{needed}" in names


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_runs_the_demo_in_an_environment_of_its_own(
    wheel: Path, root: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", str(root / "constraints.txt"), str(wheel)], check=True)
    answer = subprocess.run(
        [str(tmp_path / "venv/bin/marwright"), "demo", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": "/tmp"},
        check=True,
    )
    assert json.loads(answer.stdout)["version_switch"] == ["1.0", "2.0", "1.0"]
