from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from marwright.archive import Run, pack_run
from marwright.errors import DataError, RunError, StorageError
from marwright.training import train
from marwright.training.calibration import compute_ece, count_bins, fit_temperature
from marwright.training.data import split_data
from marwright.training.loop import compute_logits
from marwright.training.network import load_network
from marwright.training.predict import predict_inputs
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.sources import load_data
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
        "reference.npz",
        "report.json",
        "weights.pt",
        "curves.png",
        "confusion.png",
        "calibration.png",
        "attributions.png",
        "mistakes.json",
        "mistakes.png",
        "samples/samples.json",
    }
    assert [path.name for path in quick.path.parent.iterdir()] == ["quick"]


def test_the_same_seed_gives_the_same_run(tmp_path: Path, quick: Run) -> None:
    torch.rand(5)  # whatever was drawn before
    again = train_run(tmp_path / "again", settings=QUICK)
    weights = load_weights(again)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_weights(quick).items())
    first, second = read_folder(quick.path), read_folder(again.path)
    same = ("classes.json", "confusion.png", "config.json", "reference.npz", "samples/samples.json")
    for name in same:
        assert first[name] == second[name]
    archives = [
        pack_run(run, out=tmp_path / run.path.name, preflight=None) for run in (quick, again)
    ]
    assert archives[0].sha256 == archives[1].sha256


def test_the_config_says_how_to_train_again(quick: Run) -> None:
    assert quick.config == {
        "dataset": "digits",
        "data_digest": load_data("digits").digest,
        "model": "cnn",
        "image_size": [24, 24],
        "most_unreadable": 0.1,
        "epochs": 1,
        "batch_size": 256,
        "lr": QUICK.lr,
        "momentum": QUICK.momentum,
        "weight_decay": QUICK.weight_decay,
        "shift": QUICK.shift,
        "seed": 0,
        "threads": 1,
        "optimizer": "sgd",
        "schedule": "cosine",
        "label_smoothing": 0.0,
        "clip": 0.0,
        "patience": 0,
        "augment": "",
        "precision": "float32",
        "device": "cpu",
        "checkpoint_steps": 0,
        "items": {"train": 1257, "validation": 180, "test": 360},
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
    data = load_data("digits")
    assert data.open_sample is not None
    test = set(split_data(data, seed=0).test.tolist())
    for sample in quick.samples:
        label, index = sample.path.stem.split("-")
        assert int(index) in test
        assert sample.label == label == data.classes[int(data.labels[int(index)])]
        assert Image.open(sample.path).tobytes() == data.open_sample(int(index)).tobytes()


def test_pictures_are_readable(quick: Run) -> None:
    for path in quick.path.glob("*.png"):
        with Image.open(path) as image:
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


def test_a_run_that_exists_is_refused_before_training(quick: Run) -> None:
    with pytest.raises(StorageError, match="exists; choose another folder, or pass --force"):
        train_run(quick.path, progress=lambda *_: pytest.fail("it trained"))


def test_an_empty_folder_is_taken(tmp_path: Path, measurements: Path) -> None:
    (tmp_path / "run").mkdir()
    recipe = Recipe(f"table:{measurements}")
    assert train_run(tmp_path / "run", recipe=recipe, settings=QUICK).path == tmp_path / "run"


def test_a_run_that_another_process_writes_is_refused_with_its_number(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from marwright.storage import hold_path\n"
        "with hold_path(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StorageError, match=f"run is in use: found process {other.pid} writes"):
            train_run(tmp_path / "run", progress=lambda *_: pytest.fail("it trained"))
        other.communicate()
    assert not list(tmp_path.iterdir())


def test_an_unknown_data_set_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set 'kmnist'"):
        train_run(tmp_path / "run", recipe=Recipe("kmnist"))
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
        (["--dataset", "kmnist"], 1, "there is no data set 'kmnist'"),
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


def test_the_served_probabilities_are_the_calibrated_ones(run: Run) -> None:
    data = load_data("digits")
    split = split_data(data, seed=0)
    model = load_network(run)
    temperature = model.temperature.item()
    assert run.report["calibration"]["temperature"] == pytest.approx(temperature)
    model.temperature.fill_(1.0)
    logits = compute_logits(model, data.inputs)
    expected = fit_temperature(logits[split.validation], data.labels[split.validation])
    assert temperature == pytest.approx(expected, rel=1e-4)
    served = predict_inputs(run.model_path, data.inputs[split.test])
    torch.testing.assert_close(
        served, (logits[split.test] / temperature).softmax(1), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(served.argmax(1), logits[split.test].argmax(1))
    for name, probabilities in (("ece", served), ("ece_as_trained", logits[split.test].softmax(1))):
        ece = compute_ece(count_bins(probabilities, data.labels[split.test]))
        assert run.report["calibration"][name] == pytest.approx(ece, abs=1e-5)


def test_mistakes_are_the_surest_of_the_test_part(run: Run) -> None:
    mistakes = json.loads((run.path / "mistakes.json").read_text("utf-8"))
    data = load_data("digits")
    assert 0 < len(mistakes) <= 12
    sure = [item["probability"] for item in mistakes]
    assert sure == sorted(sure, reverse=True)
    for item in mistakes:
        assert item["label"] == data.classes[int(data.labels[item["index"]])] != item["prediction"]
    found = predict_inputs(run.model_path, data.inputs[[item["index"] for item in mistakes]])
    assert [run.classes[place] for place in found.argmax(1)] == [
        item["prediction"] for item in mistakes
    ]


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory, measurements: Path) -> Run:
    return train_run(
        tmp_path_factory.mktemp("runs") / "table",
        recipe=Recipe(f"table:{measurements}", label="kind"),
        settings=Settings(epochs=20, batch_size=16, lr=0.05),
    )


def test_a_table_is_learnt_from_its_raw_rows(table_run: Run, measurements: Path) -> None:
    data = load_data(f"table:{measurements}")
    assert table_run.columns == ("length", "depth")
    assert table_run.config["model"] == "mlp"
    assert table_run.classes == ("k0", "k1", "k2")
    assert table_run.report["accuracy"] > 0.9
    state = load_weights(table_run)
    rows = data.inputs[split_data(data, seed=0).train]
    torch.testing.assert_close(state["mean"], rows.mean(0))
    torch.testing.assert_close(state["deviation"], rows.std(0))
    answers = predict_inputs(table_run.model_path, data.inputs).argmax(1)
    assert (answers == data.labels).double().mean() > 0.9


def test_samples_of_a_table_are_rows_of_json(table_run: Run, measurements: Path) -> None:
    rows = load_data(f"table:{measurements}").inputs.tolist()
    assert [sample.label for sample in table_run.samples] == ["k0", "k1", "k2"]
    for sample in table_run.samples:
        assert sample.path.suffix == ".json"
        assert json.loads(sample.path.read_text("utf-8")) in rows
    assert not (table_run.path / "mistakes.png").exists()


def test_a_column_that_never_changes_does_not_harm(tmp_path: Path, measurements: Path) -> None:
    lines = measurements.read_text("utf-8").splitlines()
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["same," + lines[0], *(f"7,{line}" for line in lines[1:])]), "utf-8")
    run = train_run(tmp_path / "run", recipe=Recipe(f"table:{table}"), settings=QUICK)
    answers = predict_inputs(run.model_path, load_data(f"table:{table}").inputs)
    assert answers.isfinite().all()


def test_a_teacher_of_other_classes_or_inputs_is_refused(
    tmp_path: Path, quick: Run, table_run: Run, measurements: Path
) -> None:
    table = tmp_path / "table.csv"
    text = measurements.read_text("utf-8")
    table.write_text(text.replace("length", "height"), encoding="utf-8")
    for recipe, told in (
        (Recipe(f"table:{measurements}", teacher=str(quick.path)), "knows other classes"),
        (Recipe(height=8, width=8, teacher=str(quick.path)), r"other inputs.*\[8, 8\].*24, 24"),
        (Recipe(f"table:{table}", teacher=str(table_run.path)), "other inputs.*height.*length"),
        (Recipe(teacher=str(tmp_path / "absent")), "no run folder"),
    ):
        with pytest.raises(RunError, match=told):
            train_run(tmp_path / "run", recipe=recipe, settings=QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_run_can_teach_and_start_another(
    tmp_path: Path, table_run: Run, measurements: Path
) -> None:
    recipe = Recipe(
        f"table:{measurements}", teacher=str(table_run.path), weights=str(table_run.weights_path)
    )
    run = train_run(tmp_path / "run", recipe=recipe, settings=Settings(epochs=1, lr=1e-9))
    assert run.config["teacher"] == str(table_run.path)
    # At such a rate they stay what they were at the start.
    first, second = (load_weights(item)["network.layers.0.weight"] for item in (run, table_run))
    torch.testing.assert_close(first, second)


def test_a_head_that_stays_random_is_told(
    tmp_path: Path, table_run: Run, measurements: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    # Not caplog: packages that other tests import switch loggers off.
    monkeypatch.setattr(train._log, "warning", lambda text, *facts: told.append(text % facts))
    table = tmp_path / "table.csv"
    lines = [line.replace("k2", "k1") for line in measurements.read_text("utf-8").splitlines()]
    table.write_text("\n".join(lines), encoding="utf-8")
    recipe = Recipe(f"table:{table}", weights=str(table_run.weights_path))
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "run", recipe=recipe, settings=QUICK, progress=interrupt_at(1))
    assert told == ["layers.4.bias, layers.4.weight start random: they are for other classes"]


def test_a_network_of_torchvision_gets_imagenets_normalisation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "data" / f"c{label}").mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 128, (8, 8, 3), np.uint8) + np.uint8(label * 120)
            Image.fromarray(pixels).save(tmp_path / "data" / f"c{label}" / f"{number}.png")
    recipe = Recipe(f"folder:{tmp_path / 'data'}", "torchvision:squeezenet1_1", 32, 32)
    run = train_run(tmp_path / "run", recipe=recipe, settings=QUICK)
    state = load_weights(run)
    assert state["mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert state["deviation"].flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
