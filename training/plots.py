"""The pictures of a run: how it learnt, what it confuses, how sure it is, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .calibration import Bin
from .loop import Fit

__all__ = [
    "draw_attributions",
    "draw_calibration",
    "draw_confusion",
    "draw_curves",
    "draw_mistakes",
]

MOST_LABELLED = 30
"""Classes above which a confusion matrix is drawn without numbers and names."""


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
    named = len(classes) <= MOST_LABELLED
    size = max(4.0, 0.45 * len(classes) + 1) if named else 9.0
    figure = Figure(figsize=(size, size), layout="constrained", dpi=110)
    axes = figure.subplots()
    rows = confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow((confusion / rows).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if not named:
        figure.savefig(path)
        return
    upright = max(map(len, classes)) <= 3
    axes.set_xticks(range(len(classes)), classes, rotation=0 if upright else 90)
    axes.set_yticks(range(len(classes)), classes)
    for row, counts in enumerate(confusion.tolist()):
        for column, count in enumerate(counts):
            if count:
                shade = "white" if count > rows[row].item() / 2 else "black"
                axes.text(column, row, count, ha="center", va="center", color=shade)
    figure.savefig(path)


def draw_calibration(before: Sequence[Bin], after: Sequence[Bin], path: Path) -> None:
    """Draw accuracy against confidence, before and after the temperature."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="as sure as right")
    for bins, label in ((before, "as trained"), (after, "with temperature")):
        filled = [item for item in bins if item.count]
        axes.plot(
            [item.confidence for item in filled],
            [item.accuracy for item in filled],
            marker="o",
            markersize=4,
            label=label,
        )
    axes.set(xlabel="probability of the predicted class", ylabel="accuracy", xlim=(0, 1.02))
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def draw_mistakes(pictures: torch.Tensor, captions: Sequence[str], path: Path) -> None:
    """Draw (N, 3, H, W) pixels in [0, 1], each under its caption."""
    columns = min(6, len(captions))
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(1.33 * columns, 1.9 * rows), layout="constrained", dpi=110)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, picture, caption in zip(figure.axes, pictures, captions, strict=False):
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(caption, fontsize=8)
    figure.savefig(path)


def draw_attributions(
    attributions: torch.Tensor,
    means: torch.Tensor,
    classes: Sequence[str],
    columns: Sequence[str],
    path: Path,
) -> None:
    """Draw what attribute_classes found: a picture a class, or for a table a row of bars."""
    shown = list(classes)[:MOST_LABELLED]
    across = 5
    rows = -(-len(shown) // across)
    height = 1.9 if attributions.dim() == 3 else 0.9 + 0.16 * min(len(columns), 12)
    figure = Figure(figsize=(8, height * rows), layout="constrained", dpi=110)
    for axes in figure.subplots(rows, across, squeeze=False).flat:
        axes.set_axis_off()
    for index, (axes, label) in enumerate(zip(figure.axes, shown, strict=False)):
        axes.set_title(label, fontsize=8)
        values = attributions[index]
        if values.dim() == 2:
            most = values.abs().max().clamp(min=1e-12).item()
            axes.imshow(means[index].mean(0).numpy(), cmap="Greys", interpolation="nearest")
            axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.75)
            continue
        strongest = values.abs().argsort(descending=True)[:12].flip(0).tolist()
        axes.set_axis_on()
        axes.barh(range(len(strongest)), values[strongest].numpy())
        names = [columns[place] for place in strongest]
        axes.set_yticks(range(len(strongest)), names, fontsize=6)
        axes.tick_params(axis="x", labelsize=6)
    figure.savefig(path)
