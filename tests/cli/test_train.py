from __future__ import annotations

import json
import os
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from marwright.archive import Run

Command = Callable[..., subprocess.CompletedProcess[str]]

DYING = """
import os
from pathlib import Path
from torch import nn

class Net(nn.Linear):
    def __init__(self, classes, input_shape):
        super().__init__(input_shape[0], classes)
        self.calls = 0

    def forward(self, rows):
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.calls == 5:
            Path("pid").write_text(str(os.getpid()))
            os._exit(3)
        return super().forward(rows)
"""


def write_table(path: Path) -> Path:
    """Write 90 rows whose label is the first column."""
    chance = random.Random(0)
    rows = [
        f"k{n % 3},{chance.gauss(40 * (n % 3), 5):.2f},{chance.gauss(0, 1):.3f}" for n in range(90)
    ]
    path.write_text("\n".join(["kind,length,noise", *rows]) + "\n", encoding="utf-8")
    return path


def write_photos(folder: Path) -> None:
    """Write JPEGs of various sizes of two classes, and two files that are no images."""
    chance = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            height, width = chance.integers(20, 90, 2)
            pixels = chance.normal(level, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.jpg")
    (folder / "dark/broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "light/empty.jpg").write_bytes(b"")


def test_a_folder_of_photos_is_trained_and_packed(marwright: Command, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    options = ["--height", "16", "--width", "16", "--epochs", "10", "--batch-size", "8"]
    done = marwright("train", "--dataset", "folder:photos", *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["run"] == "runs/folder-photos"
    assert "left out as unreadable: 2" in done.stderr
    for name in ("dark/broken.jpg", "light/empty.jpg"):
        assert name in done.stderr
        assert sum(name in line for line in told["unreadable"]) == 1
    run = Run.open(tmp_path / told["run"])
    assert run.classes == ("dark", "light")
    assert run.image_size == (16, 16)
    assert run.report["unreadable"] == told["unreadable"]
    assert run.report["accuracy"] > 0.9
    packed = marwright("pack", told["run"], "--json", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    facts = json.loads(packed.stdout)
    assert not facts["findings"]
    with zipfile.ZipFile(tmp_path / facts["path"]) as archive:
        assert "image_classifier.py" in archive.namelist()


def test_a_table_is_trained_and_packed_with_the_handler_of_arrays(
    marwright: Command, tmp_path: Path
) -> None:
    write_table(tmp_path / "table.csv")
    options = ["--label", "kind", "--epochs", "8", "--batch-size", "8", "--out", "run"]
    done = marwright("train", "--dataset", "table:table.csv", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert run.columns == ("length", "noise")
    assert run.report["accuracy"] > 0.9
    assert f"{run.report['accuracy']:.4f}" in done.stdout
    packed = marwright("pack", "run", "--json", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    facts = json.loads(packed.stdout)
    assert not facts["findings"]
    assert facts["figures"]["load_seconds"] > 0
    with zipfile.ZipFile(tmp_path / facts["path"]) as archive:
        assert "tensor.py" in archive.namelist()
        settings = yaml.safe_load(archive.read("model-config.yaml"))
    assert settings["handler"]["inputs"] == [
        {"name": "inputs", "shape": [2], "datatype": "FP32"},
    ]


def test_a_second_process_that_dies_is_told_in_one_line(marwright: Command, tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv")
    (tmp_path / "dying_net.py").write_text(DYING, encoding="utf-8")
    options = ["--label", "kind", "--model", "dying_net:Net", "--processes", "2", "--out", "run"]
    done = marwright("train", "--dataset", "table:table.csv", *options, cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert errors == ["error: process 1 of 2 ended with status 3"]
    assert "Traceback" not in done.stderr
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"table.csv", "dying_net.py", "pid"}


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--epochs", "0", "--optimizer", "lion"], 2, "optimizer 'lion', one of gd, sgd"),
        (["--out", "taken"], 2, "taken exists; choose another --out, or pass --force"),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_line(
    marwright: Command, tmp_path: Path, options: list[str], status: int, told: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    done = marwright("train", *options, cwd=tmp_path, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == status
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
