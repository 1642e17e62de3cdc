from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import UsageError
from marwright.training.loop import Epoch
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.tracking import track
from marwright.training.train import train_run

EPOCH = Epoch(1, 0.5, 0.4, 0.9, 0.01, 0.1)


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with track("", tmp_path, {"lr": 0.1}) as record:
        record(EPOCH)
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused_with_the_known(tmp_path: Path) -> None:
    told = pytest.raises(UsageError, match="no tracker wandb: expected one of tensorboard, mlflow")
    with told, track("wandb", tmp_path, {}):
        pytest.fail("it tracked")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: Path, name: str
) -> None:
    real = importlib.import_module

    def refuse(module: str, *arguments: Any) -> Any:
        if name in module:
            raise ImportError(f"No module named {name!r}")
        return real(module, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UsageError) as caught:
        train_run(
            tmp_path / "run",
            recipe=Recipe(f"table:{measurements}"),
            settings=Settings(epochs=1),
            trackers=name,
            progress=lambda *_: pytest.fail("it trained"),
        )
    assert caught.value.remedy == f"pip install 'marwright[{name}]'"
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with track("tensorboard", tmp_path, {"lr": 0.1}) as record:
        record(EPOCH)
    events = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("validation_accuracy")
    assert (scalar.step, scalar.value) == (1, pytest.approx(0.9))


@pytest.mark.filterwarnings("ignore")  # what MLflow's own libraries tell of one another
def test_mlflow_gets_parameters_and_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with track("mlflow", tmp_path, {"lr": 0.1, "augment": ""}) as record:
        record(EPOCH)
    assert (tmp_path / "mlflow.db").is_file()
    (found,) = mlflow.search_runs(experiment_names=["marwright"], output_format="list")
    assert found.data.params == {"lr": "0.1"}
    assert found.data.metrics["validation_accuracy"] == pytest.approx(0.9)
