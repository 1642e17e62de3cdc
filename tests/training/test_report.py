from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from marwright.training.report import (
    count_confusion,
    describe_commit,
    list_versions,
    measure_classes,
)
from marwright.training.settings import Settings
from marwright.training.train import train_run


def make_answers(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    guesses = torch.randint(classes, (count,), generator=generator)
    right = torch.rand(count, generator=generator) < 0.7
    return torch.where(right, labels, guesses), labels


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (40, 2), (300, 10), (20, 10)])
def test_confusion_equals_that_of_scikit_learn(count: int, classes: int) -> None:
    predicted, labels = make_answers(count, classes, seed=count)
    expected = confusion_matrix(labels, predicted, labels=range(classes))
    assert count_confusion(predicted, labels, classes).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_equal_those_of_scikit_learn(seed: int) -> None:
    predicted, labels = make_answers(300, 10, seed)
    found = measure_classes(count_confusion(predicted, labels, 10), [f"c{n}" for n in range(10)])
    precision, recall, _, support = precision_recall_fscore_support(labels, predicted)
    assert list(found) == [f"c{n}" for n in range(10)]
    for index, values in enumerate(found.values()):
        assert values["precision"] == pytest.approx(precision[index])
        assert values["recall"] == pytest.approx(recall[index])
        assert values["support"] == support[index]


def test_a_ratio_of_nothing_is_none() -> None:
    confusion = torch.tensor([[2, 0, 1], [0, 0, 0], [1, 0, 0]])
    found = measure_classes(confusion, ["a", "b", "c"])
    assert found["a"] == {"precision": 2 / 3, "recall": 2 / 3, "support": 3}
    assert found["b"] == {"precision": None, "recall": None, "support": 0}
    assert found["c"] == {"precision": 0.0, "recall": 0.0, "support": 1}


def test_versions_are_those_that_run() -> None:
    versions = list_versions()
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"])  # the registry leaves +cu130 out
    assert {"marwright", "torchvision", "numpy", "scikit-learn", "pillow"} < set(versions)


def make_repository(folder: Path) -> str:
    """Commit one file and return the commit."""
    (folder / "train.py").write_text("seed = 1", encoding="utf-8")
    git = ["git", "-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    assert describe_commit(tmp_path) == {}


def test_only_files_of_the_commit_make_a_folder_dirty(tmp_path: Path) -> None:
    commit = make_repository(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/report.json").write_text("{}", encoding="utf-8")
    assert describe_commit(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "train.py").write_text("seed = 2", encoding="utf-8")
    assert describe_commit(tmp_path) == {"commit": commit, "dirty": True}


def test_a_training_reports_the_commit_at_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = make_repository(tmp_path)
    monkeypatch.chdir(tmp_path)

    def edit(*_: object) -> None:
        (tmp_path / "train.py").write_text("seed = 2", encoding="utf-8")

    settings = Settings(epochs=1, batch_size=256)
    run = train_run(tmp_path / "run", settings=settings, progress=edit)
    assert run.report["git"] == {"commit": commit, "dirty": False}
    assert describe_commit(tmp_path)["dirty"]
