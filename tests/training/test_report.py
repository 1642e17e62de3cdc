from __future__ import annotations

import platform

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from marwright.training.report import count_confusion, list_versions, measure_classes


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
