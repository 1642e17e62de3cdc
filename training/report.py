"""What a training says of its result: accuracy, precision and recall, size, versions, commit."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marwright.archive.worktree import WorkTree

__all__ = [
    "count_confusion",
    "count_parameters",
    "describe_commit",
    "list_versions",
    "measure_classes",
]


@torch.inference_mode()
def count_confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return a (C, C) int64 matrix: true class down, predicted class across."""
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.view(classes, classes)


def measure_classes(confusion: torch.Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return precision, recall and support by class; a ratio of nothing is None."""
    hits = confusion.diagonal()
    columns, rows = confusion.sum(0), confusion.sum(1)

    def share(index: int, whole: torch.Tensor) -> float | None:
        return hits[index].item() / whole[index].item() if whole[index] else None

    return {
        label: {
            "precision": share(index, columns),
            "recall": share(index, rows),
            "support": int(rows[index]),
        }
        for index, label in enumerate(classes)
    }


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the model has learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


def list_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("marwright", "torch", "torchvision", "numpy", "scikit-learn", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def describe_commit(folder: Path) -> dict[str, Any]:
    """Return the git commit that a folder stands at, and whether tracked files differ from it.

    Empty where git knows none. Untracked files do not count: the runs of earlier trainings may lie
    among them, and one seed must give one report.
    """
    tree = WorkTree.find(folder)
    return {"commit": tree.commit, "dirty": bool(tree.changed)} if tree else {}
