from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from marwright.archive import Run
from marwright.errors import RunError
from marwright.training.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from marwright.training.loop import Training
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import list_arguments, main, train_run

DROPOUT = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, input_shape):
        super().__init__(
            nn.Linear(*input_shape, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes)
        )
"""


def make_training(settings: Settings) -> Training:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=generator)
    data = (images, torch.arange(40) % 3)
    torch.manual_seed(0)
    layers = (nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    return Training(nn.Sequential(*layers), data, data, settings)


def list_epochs(training: Training) -> list[Any]:
    return [replace(epoch, seconds=0) for epoch in training.epochs]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "more"),
    [
        ("gd", "constant", {}),
        ("sgd", "cosine", {"augment": "flip,erase"}),
        ("adam", "step", {"clip": 0.5, "precision": "bfloat16"}),
        ("adamw", "onecycle", {"label_smoothing": 0.1, "patience": 2, "augment": "crop"}),
    ],
)
def test_from_whatever_step_a_training_goes_on_it_ends_the_same(
    tmp_path: Path, optimizer: str, schedule: str, more: dict[str, Any]
) -> None:
    settings = Settings(
        epochs=3,
        batch_size=16,
        shift=1,
        lr=0.01,
        optimizer=optimizer,
        schedule=schedule,
        checkpoint_steps=1,
        **more,
    )
    whole = make_training(settings)
    kept: list[Path] = []

    def keep(state: dict[str, Any]) -> None:
        kept.append(tmp_path / str(len(kept)))
        write_checkpoint(kept[-1], state)

    whole.run(on_checkpoint=keep)
    assert len(kept) == len(whole.epochs) * whole.steps
    for path in kept:
        torch.manual_seed(99)
        resumed = make_training(settings)
        resumed.set_state(read_checkpoint(path))
        resumed.run()
        assert list_epochs(resumed) == list_epochs(whole)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, resumed.model.state_dict()[name]), (path.name, name)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 9, 100])
def test_checkpoints_come_at_the_stated_steps(every: int) -> None:
    training = make_training(Settings(epochs=4, batch_size=16, checkpoint_steps=every))
    done: list[int] = []
    training.run(
        on_checkpoint=lambda state: done.append(
            len(state["epochs"]) * training.steps + state["step"]
        )
    )
    assert {step for step in range(1, 13) if step % every == 0} <= set(done)
    # Besides, one at the end of an epoch that had one.
    assert {step for step in done if step % every} <= {3, 6, 9, 12}
    assert done == sorted(set(done))


def kill_midway(out: Path, recipe: Recipe, settings: Settings) -> None:
    """Train in a process of its own and kill it once it has left a checkpoint."""
    arguments = list_arguments(out, recipe=recipe, settings=settings)
    with subprocess.Popen(
        [sys.executable, "-m", "marwright.training.train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not find_checkpoint(out).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    assert not out.exists()


def read_metrics(run: Run) -> list[dict[str, Any]]:
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


@pytest.mark.parametrize(
    "kind",
    [
        "images by sgd, augmented",
        pytest.param("a table by adamw, with dropout", marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_ends_as_one_that_was_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: Path, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dropout_net.py").write_text(DROPOUT, encoding="utf-8")
    if kind.startswith("images"):
        recipe = Recipe(height=8, width=8)
        settings = Settings(epochs=12, batch_size=128, augment="flip", checkpoint_steps=7)
    else:
        recipe = Recipe(f"table:{measurements}", "dropout_net:Net")
        settings = Settings(epochs=40, batch_size=8, optimizer="adamw", checkpoint_steps=5)
    kill_midway(tmp_path / "killed", recipe, settings)
    arguments = list_arguments(tmp_path / "killed", recipe=recipe, settings=settings, resume=True)
    assert main(arguments) == 0
    whole = train_run(tmp_path / "whole", recipe=recipe, settings=settings)
    killed = Run.open(tmp_path / "killed")
    weights = [torch.load(run.weights_path, weights_only=True) for run in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert read_metrics(whole) == read_metrics(killed)
    assert whole.report["accuracy"] == killed.report["accuracy"]
    assert whole.config == killed.config
    assert not find_checkpoint(killed.path).exists()
    assert not find_checkpoint(whole.path).exists()


def interrupt(out: Path, recipe: Recipe, settings: Settings) -> None:
    def stop(done: int, *_: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(out, recipe=recipe, settings=settings, progress=stop)


SETTINGS = Settings(epochs=2, batch_size=8, checkpoint_steps=3)


@pytest.fixture
def recipe(measurements: Path) -> Recipe:
    return Recipe(f"table:{measurements}")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 0.5}, "lr 0.01, now 0.5"),
        ({"optimizer": "adam"}, "optimizer 'sgd', now 'adam'"),
        ({"epochs": 9, "seed": 1}, "epochs 2, now 9; seed 0, now 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, recipe: Recipe, changed: dict[str, Any], told: str
) -> None:
    interrupt(tmp_path / "run", recipe, SETTINGS)
    before = find_checkpoint(tmp_path / "run").read_bytes()
    with pytest.raises(RunError, match="is of another training") as caught:
        train_run(
            tmp_path / "run", recipe=recipe, settings=replace(SETTINGS, **changed), resume=True
        )
    assert told in caught.value.found
    assert "\n" not in str(caught.value)
    assert find_checkpoint(tmp_path / "run").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint"]


def test_a_checkpoint_of_other_data_or_another_network_is_refused(
    tmp_path: Path, recipe: Recipe, measurements: Path
) -> None:
    interrupt(tmp_path / "run", recipe, SETTINGS)
    table = tmp_path / "other.csv"
    lines = measurements.read_text("utf-8").splitlines()
    table.write_text("\n".join([*lines[:-1], "1,2,k0"]), encoding="utf-8")
    for other, told in (
        (replace(recipe, dataset=f"table:{table}"), "data_digest"),
        (Recipe(), "model 'mlp', now 'cnn'"),
        (Recipe(height=8, width=8, model="mlp"), "height 0, now 8"),
    ):
        with pytest.raises(RunError, match=f"of another training.*{told}"):
            train_run(tmp_path / "run", recipe=other, settings=SETTINGS, resume=True)


def test_a_checkpoint_of_a_changed_class_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "changed_net.py").write_text(DROPOUT, encoding="utf-8")
    recipe = replace(recipe, model="changed_net:Net")
    interrupt(tmp_path / "run", recipe, SETTINGS)
    monkeypatch.delitem(sys.modules, "changed_net")
    (tmp_path / "changed_net.py").write_text(DROPOUT.replace("16", "170"), encoding="utf-8")
    with pytest.raises(RunError, match="another architecture or optimiser") as caught:
        train_run(tmp_path / "run", recipe=recipe, settings=SETTINGS, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_broken_checkpoint_is_refused(tmp_path: Path, recipe: Recipe, content: bytes) -> None:
    find_checkpoint(tmp_path / "run").write_bytes(content)
    with pytest.raises(RunError, match="is no checkpoint"):
        train_run(tmp_path / "run", recipe=recipe, settings=SETTINGS, resume=True)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(
    tmp_path: Path, recipe: Recipe
) -> None:
    with pytest.raises(RunError, match=r"there is no checkpoint .*run\.checkpoint"):
        train_run(tmp_path / "run", recipe=recipe, settings=SETTINGS, resume=True)
    assert not list(tmp_path.iterdir())


def test_threads_and_the_distance_of_checkpoints_may_change(tmp_path: Path, recipe: Recipe) -> None:
    interrupt(tmp_path / "run", recipe, SETTINGS)
    settings = replace(SETTINGS, threads=2, checkpoint_steps=0)
    train_run(tmp_path / "run", recipe=recipe, settings=settings, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
