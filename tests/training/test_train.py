from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from marwright.archive import Run
from marwright.errors import StorageError, UsageError
from marwright.training.data import load_images, make_transform, split_images
from marwright.training.loop import Settings
from marwright.training.train import train_run

FILES = ["classes.json", "config.json", "confusion.png", "curves.png", "metrics.jsonl"]
FILES += ["model.pt", "report.json", "samples"]


def load_state(run: Run) -> dict[str, torch.Tensor]:
    """Return a run's weights."""
    state: dict[str, torch.Tensor] = torch.jit.load(str(run.model_path)).state_dict()
    return state


def test_the_defaults_reach_97_percent(tmp_path: Path) -> None:
    run = train_run(tmp_path / "run")
    assert run.report["accuracy"] >= 0.97
    assert sorted(path.name for path in run.path.iterdir()) == FILES
    assert len(run.samples) == 10


def test_one_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    states = [
        load_state(train_run(tmp_path / str(name), settings=Settings(epochs=1, seed=seed)))
        for name, seed in enumerate((3, 3, 4))
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "run", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_run_is_replaced_only_by_force(run: Run) -> None:
    with pytest.raises(StorageError, match="exists"):
        train_run(run.path)


def test_every_impossible_number_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        Settings(epochs=0, lr=-1, momentum=2)
    assert all(word in str(caught.value) for word in ("epochs 0", "rate -1", "momentum 2"))


def test_the_split_is_whole_and_disjoint() -> None:
    images = load_images("digits")
    split = split_images(images, seed=0)
    parts = torch.cat([split.train, split.validation, split.test])
    assert sorted(parts.tolist()) == list(range(1797))


def test_training_and_handler_make_one_tensor_of_one_image(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "handlers"))
    import image_classifier

    handler = image_classifier.ImageClassifier()
    handler.height, handler.width = 24, 24
    for scan in load_images("digits").scans[:50]:
        served = handler._make_tensor(scan.convert("RGB"))
        assert torch.equal(served, make_transform((24, 24))(scan))
    del sys.modules["image_classifier"], sys.modules["image_input"]
