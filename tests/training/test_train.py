from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from marwright.archive import Run, pack_run
from marwright.errors import DataError, RunError, StorageError
from marwright.training.data import load_images, split_images
from marwright.training.loop import Settings
from marwright.training.train import main, train_run

QUICK = Settings(epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one epoch of a few large batches; tests leave it as it is."""
    return train_run(tmp_path_factory.mktemp("runs") / "quick", settings=QUICK)


def interrupt_at(step: int) -> Any:
    def progress(done: int, *_: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def load_weights(run: Run) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.jit.load(str(run.model_path)).state_dict()
    return state


def read_folder(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_default_settings_reach_97_percent(tmp_path: Path) -> None:
    report = train_run(tmp_path / "run").report
    assert report["accuracy"] >= 0.97
    assert report["validation_accuracy"] >= 0.97


def test_a_run_holds_exactly_the_documented_files(quick: Run) -> None:
    samples = {f"samples/{sample.path.name}" for sample in quick.samples}
    assert len(samples) == 10
    assert set(read_folder(quick.path)) == samples | {
        "config.json",
        "metrics.jsonl",
        "model.pt",
        "classes.json",
        "report.json",
        "curves.png",
        "confusion.png",
        "samples/samples.json",
    }
    assert [path.name for path in quick.path.parent.iterdir()] == ["quick"]


def test_the_same_seed_gives_the_same_run(tmp_path: Path, quick: Run) -> None:
    torch.rand(5)  # whatever was drawn before
    again = train_run(tmp_path / "again", settings=QUICK)
    weights = load_weights(again)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_weights(quick).items())
    first, second = read_folder(quick.path), read_folder(again.path)
    for name in ("config.json", "classes.json", "samples/samples.json", "confusion.png"):
        assert first[name] == second[name]
    archives = [
        pack_run(run, out=tmp_path / run.path.name, preflight=None) for run in (quick, again)
    ]
    assert archives[0].sha256 == archives[1].sha256


def test_the_config_says_how_to_train_again(quick: Run) -> None:
    images = load_images("digits")
    assert quick.config == {
        "dataset": "digits",
        "data_digest": images.digest,
        "model": "cnn",
        "image_size": [24, 24],
        "epochs": 1,
        "batch_size": 256,
        "lr": QUICK.lr,
        "momentum": QUICK.momentum,
        "weight_decay": QUICK.weight_decay,
        "shift": QUICK.shift,
        "seed": 0,
        "threads": 1,
        "images": {"train": 1257, "validation": 180, "test": 360},
    }


def test_the_report_adds_up(quick: Run) -> None:
    classes = quick.report["classes"]
    right = sum(values["support"] * values["recall"] for values in classes.values())
    assert sum(values["support"] for values in classes.values()) == 360
    assert quick.report["accuracy"] == pytest.approx(right / 360)
    assert quick.report["model_bytes"] == quick.model_path.stat().st_size
    assert quick.report["seconds"] >= quick.report["train_seconds"] > 0
    assert quick.report["best_epoch"] == 1


def test_metrics_are_one_line_of_json_an_epoch(run: Run) -> None:
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]
    best = max(epoch["validation_accuracy"] for epoch in epochs)
    assert run.report["validation_accuracy"] == best


@pytest.mark.parametrize("name", ["config.json", "classes.json", "report.json"])
def test_a_file_of_json_is_strict_json(quick: Run, name: str) -> None:
    json.loads((quick.path / name).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_samples_are_scans_of_the_test_part(quick: Run) -> None:
    images = load_images("digits")
    test = set(split_images(images, seed=0).test.tolist())
    for sample in quick.samples:
        label, index = sample.path.stem.split("-")
        assert int(index) in test
        assert sample.label == label == images.classes[int(images.labels[int(index)])]
        assert Image.open(sample.path).tobytes() == images.scans[int(index)].tobytes()


def test_pictures_are_readable(quick: Run) -> None:
    for name in ("curves.png", "confusion.png"):
        with Image.open(quick.path / name) as image:
            image.verify()


def test_an_interrupted_training_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "run", settings=QUICK, progress=interrupt_at(2))
    assert not list(tmp_path.iterdir())


def test_a_failed_training_leaves_the_run_that_it_should_replace(
    tmp_path: Path, quick: Run
) -> None:
    out = Path(shutil.copytree(quick.path, tmp_path / "run"))
    before = read_folder(out)
    with pytest.raises(KeyboardInterrupt):
        train_run(out, settings=QUICK, force=True, progress=interrupt_at(1))
    with pytest.raises(DataError, match=r"loss is (nan|inf)"):
        train_run(out, settings=Settings(epochs=1, batch_size=256, lr=1e30), force=True)
    assert read_folder(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_force_replaces_a_run_as_a_whole(tmp_path: Path) -> None:
    out = train_run(tmp_path / "run", settings=QUICK).path
    (out / "left over").write_text("")
    run = train_run(out, settings=QUICK, force=True)
    assert run == Run.open(out)
    assert not (out / "left over").exists()


def test_a_folder_that_exists_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="exists; choose another folder, or pass --force"):
        train_run(tmp_path, progress=lambda *_: pytest.fail("it trained"))


def test_an_unknown_data_set_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set 'mnist'"):
        train_run(tmp_path / "run", dataset="mnist")
    assert not list(tmp_path.iterdir())


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "run", settings=QUICK, progress=interrupt_at(1))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_program_trains_with_the_seed_given_and_prints_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: Run
) -> None:
    out = tmp_path / "run"
    options = ["--out", str(out), "--epochs", "1", "--batch-size", "256", "--seed", "5"]
    assert main(options) == 0
    assert capsys.readouterr().out == f"{out}\n"
    other = Run.open(out)
    assert other.config == {**quick.config, "seed": 5}
    assert not torch.equal(*(load_weights(run)["network.fc2.weight"] for run in (quick, other)))
    assert main(options) == 1
    assert capsys.readouterr().err.startswith(f"error: {out} exists")


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--epochs", "0", "--lr", "-1"], 2, "epochs 0, at least 1; learning rate -1.0, above 0"),
        (["--seed", "-1"], 2, "seed -1"),
        (["--dataset", "mnist"], 1, "there is no data set 'mnist'"),
    ],
)
def test_the_program_tells_an_error_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    told: str,
) -> None:
    assert main(["--out", str(tmp_path / "run"), *options]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert captured.out == ""


def test_the_program_runs_by_its_module_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "marwright.training.train", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0
    for option in ("--out", "--epochs", "--batch-size", "--weight-decay", "--force"):
        assert option in done.stdout


def test_force_never_replaces_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years", encoding="utf-8")
    with pytest.raises(RunError, match="something else than a run"):
        train_run(tmp_path, settings=QUICK, force=True)
    assert (tmp_path / "thesis.txt").read_text("utf-8") == "three years"


def test_a_full_disk_ends_in_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from marwright.training.train import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(['--out', sys.argv[1], '--epochs', '1', '--batch-size', '256']))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, "error: cannot write" in answer.stderr) == (1, True), answer.stderr
    assert not list(tmp_path.iterdir())
