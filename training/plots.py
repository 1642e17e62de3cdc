"""The pictures of a run: learning curves and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .loop import Fit

__all__ = ["draw_confusion", "draw_curves"]


def draw_curves(fit: Fit, path: Path) -> None:
    """Draw losses and validation accuracy by epoch."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in fit.epochs]
    left.plot(numbers, [epoch.train_loss for epoch in fit.epochs], label="training")
    left.plot(numbers, [epoch.validation_loss for epoch in fit.epochs], label="validation")
    left.set(xlabel="epoch", ylabel="cross entropy", yscale="log")
    left.legend(frameon=False)
    right.plot(
        numbers, [epoch.validation_accuracy for epoch in fit.epochs], color="C1", label="validation"
    )
    right.plot(fit.best.epoch, fit.best.validation_accuracy, "o", color="C2", label="kept")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def draw_confusion(confusion: torch.Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw a (C, C) matrix of counts: true class down, predicted class across."""
    size = max(4.0, 0.45 * len(classes) + 1)
    figure = Figure(figsize=(size, size), layout="constrained", dpi=110)
    axes = figure.subplots()
    rows = confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow((confusion / rows).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    for row, counts in enumerate(confusion.tolist()):
        for column, count in enumerate(counts):
            if count:
                shade = "white" if count > rows[row].item() / 2 else "black"
                axes.text(column, row, count, ha="center", va="center", color=shade)
    figure.savefig(path)
