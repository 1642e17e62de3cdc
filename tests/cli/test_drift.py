from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from marwright.archive import Archive, Packed, Run, pack_run
from marwright.archive.run import REFERENCE_NAME
from marwright.monitor.reference import Reference

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def archive(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_run(run, out=tmp_path_factory.mktemp("store") / "cnn.mar", preflight=None).path


def write_log(
    folder: Path, archive: Path, *, rows: int = 200, darker: float = 0.0, version: str = "1.0"
) -> Path:
    """Write what a worker would have logged of requests like those of the reference."""
    reference = Reference.read(archive)
    assert reference is not None
    chosen = np.random.default_rng(0).permutation(reference.rows)[:rows]
    (folder / "spool").mkdir(parents=True, mode=0o700, exist_ok=True)
    with (folder / f"spool/cnn-{version}-4000000-1.jsonl").open("w") as stream:
        for number, row in enumerate(chosen):
            features = dict(
                zip(reference.feature_names, reference.features[row].tolist(), strict=True)
            )
            features["brightness"] = features["brightness"] * (1 - darker)
            line: dict[str, Any] = {
                "time": time.time() - rows + number,
                "request": f"r{number}",
                "item": 0,
                "model": "cnn",
                "version": version,
                "status": 200,
                "seconds": 0.004,
                "features": features,
                "prediction": str(reference.prediction[row]),
                "confidence": float(reference.confidence[row]),
                "embedding": reference.embedding[row].tolist(),
            }
            stream.write(json.dumps(line) + "\n")
    return folder


def test_no_shift_is_exit_0_and_a_table(archive: Path, tmp_path: Path, marwright: Command) -> None:
    log = write_log(tmp_path / "log", archive)
    done = marwright("drift", "--folder", log, "--archive", archive, "--window", 200)
    assert done.returncode == 0, done.stderr
    assert "cnn 1.0: 200 predictions, no shift" in done.stdout
    lines = done.stdout.splitlines()
    assert any("features.brightness" in line and "psi" in line for line in lines)
    assert any("embedding" in line and "mmd" in line for line in lines)


def test_a_shift_is_exit_1_and_its_subject_comes_first(
    archive: Path, tmp_path: Path, marwright: Command
) -> None:
    log = write_log(tmp_path / "log", archive, darker=0.4)
    picture = tmp_path / "drift.png"
    done = marwright(
        *("drift", "cnn", "--version", "1.0", "--folder", log, "--archive", archive),
        *("--window", 50, "--json", "--plot", picture),
    )
    assert done.returncode == 1, done.stderr
    [found] = json.loads(done.stdout)
    assert (found["model"], found["version"], found["shifted"]) == ("cnn", "1.0", True)
    assert found["window_rows"] == 50
    assert found["rows"][0]["subject"] == "features.brightness"
    assert found["rows"][0]["shifted"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_too_few_predictions_are_no_answer(
    archive: Path, tmp_path: Path, marwright: Command
) -> None:
    log = write_log(tmp_path / "log", archive, rows=20)
    done = marwright("drift", "--folder", log, "--archive", archive)
    assert done.returncode == 1
    assert "20 predictions are logged" in done.stderr
    assert not done.stdout.strip()


def test_an_archive_without_a_reference_says_so(
    packed: Packed, archive: Path, tmp_path: Path, marwright: Command
) -> None:
    log = write_log(tmp_path / "log", archive)
    with Archive.open(packed.path) as opened:
        bare = opened.extract(tmp_path / "bare")
    (bare / REFERENCE_NAME).unlink()
    for more in ((), ("--plot", tmp_path / "drift.png")):
        done = marwright("drift", "--folder", log, "--archive", bare, *more)
        assert done.returncode == 1
        assert "reference" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "drift.png").exists()


def test_the_versions_of_a_deployment_are_compared_from_its_own_log(
    run: Run, archive: Path, tmp_path: Path, marwright: Command
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "cnn.mar").write_bytes(archive.read_bytes())
    pack_run(run, out=store / "cnn-2.0.mar", version="2.0", preflight=None)
    log = write_log(tmp_path / "predictions", archive)
    write_log(log, archive, darker=0.4, version="2.0")
    values = {
        "store": "store",
        "monitoring": {"predictions": True, "drift": {"window": 100}},
    }
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = marwright("drift", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = {one["version"]: one for one in json.loads(done.stdout)}
    assert {key: one["shifted"] for key, one in found.items()} == {"1.0": False, "2.0": True}
    assert {one["window_rows"] for one in found.values()} == {100}
    assert marwright("drift", "cnn", "--version", "1.0", cwd=tmp_path).returncode == 0
    refused = marwright("drift", "--plot", tmp_path / "drift.png", cwd=tmp_path)
    assert refused.returncode == 2
    assert "a picture is of one version" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--folder", "."), "go together"),
        (("--archive", "cnn.mar"), "go together"),
        (("--folder", ".", "--archive", "{archive}", "--server", "x"), "exclude each other"),
        (("--folder", "absent", "--archive", "{archive}"), "no folder absent"),
        (("resnet", "--folder", ".", "--archive", "{archive}"), "no archive of resnet"),
        (("--folder", ".", "--archive", "{archive}", "--window", "3"), "50"),
    ],
)
def test_wrong_usage_is_exit_2(
    arguments: tuple[str, ...], said: str, archive: Path, tmp_path: Path, marwright: Command
) -> None:
    words = [word.format(archive=archive) for word in arguments]
    done = marwright("drift", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
