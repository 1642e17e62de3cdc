from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from marwright.archive import Run
from marwright.errors import RunError
from marwright.training.loop import compute_logits
from marwright.training.network import load_network
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.sources import load_data
from marwright.training.train import train_run


def test_the_network_of_a_run_answers_as_its_file_does(run: Run) -> None:
    model = load_network(run)
    inputs = load_data("digits").inputs[:50]
    expected = compute_logits(torch.jit.load(str(run.model_path)), inputs)
    torch.testing.assert_close(compute_logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not model.training
    assert model.temperature.item() == pytest.approx(run.report["calibration"]["temperature"])


def test_so_does_that_of_a_table_with_a_mean_for_each_column(
    tmp_path: Path, measurements: Path
) -> None:
    recipe = Recipe(f"table:{measurements}")
    run = train_run(tmp_path / "run", recipe=recipe, settings=Settings(epochs=1))
    model = load_network(run)
    assert model.mean.shape == (2,)
    rows = load_data(recipe.dataset).inputs
    expected = compute_logits(torch.jit.load(str(run.model_path)), rows)
    torch.testing.assert_close(compute_logits(model, rows), expected, rtol=1e-5, atol=1e-5)


def test_a_run_without_weights_is_refused(tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    (folder / "weights.pt").unlink()
    with pytest.raises(RunError, match=r"no weights to start from: expected weights\.pt"):
        load_network(Run.open(folder))


def test_weights_of_another_network_are_refused(tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    torch.save({"network.conv1.weight": torch.rand(2, 3, 3, 3)}, folder / "weights.pt")
    with pytest.raises(RunError, match="weights of another architecture"):
        load_network(Run.open(folder))
