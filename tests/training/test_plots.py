from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from marwright.training.calibration import count_bins
from marwright.training.loop import Epoch, Fit
from marwright.training.plots import (
    draw_attributions,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_mistakes,
)


def make_fit(epochs: int, *, last_loss: float | None = None) -> Fit:
    losses = [0.5 / number for number in range(1, epochs + 1)]
    if last_loss is not None:
        losses[-1] = last_loss
    made = tuple(
        Epoch(
            epoch=number,
            train_loss=loss,
            validation_loss=loss,
            validation_accuracy=1 - 0.5 / number,
            lr=0.01,
            seconds=0.1,
        )
        for number, loss in enumerate(losses, start=1)
    )
    return Fit(made, made[-1], 1.0, 100.0)


def count_colours(path: Path, least: int = 300) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= least
        return len(image.convert("RGB").getcolors(maxcolors=1 << 24) or ())


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_curves_are_a_readable_png(tmp_path: Path, epochs: int) -> None:
    draw_curves(make_fit(epochs), tmp_path / "curves.png")
    assert count_colours(tmp_path / "curves.png") > 10


def test_a_loss_of_0_does_not_break_the_logarithmic_axis(tmp_path: Path) -> None:
    draw_curves(make_fit(3, last_loss=0.0), tmp_path / "curves.png")
    assert count_colours(tmp_path / "curves.png") > 10


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 200])
def test_a_confusion_matrix_is_a_readable_png(tmp_path: Path, classes: int) -> None:
    confusion = torch.eye(classes, dtype=torch.int64) * 36
    draw_confusion(confusion, [str(n) for n in range(classes)], tmp_path / "confusion.png")
    assert count_colours(tmp_path / "confusion.png") > 10


def test_a_class_without_images_leaves_its_row_empty(tmp_path: Path) -> None:
    confusion = torch.tensor([[3, 1], [0, 0]])
    draw_confusion(confusion, ["a", "b"], tmp_path / "confusion.png")
    assert count_colours(tmp_path / "confusion.png") > 10


def test_another_matrix_is_another_picture(tmp_path: Path) -> None:
    for name, matrix in (("a", [[9, 1], [1, 9]]), ("b", [[1, 9], [9, 1]])):
        draw_confusion(torch.tensor(matrix), ["x", "y"], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("count", [1, 200])
def test_calibration_is_a_readable_png(tmp_path: Path, count: int) -> None:
    probabilities = torch.rand(count, 3).softmax(1)
    bins = count_bins(probabilities, torch.zeros(count, dtype=torch.int64))
    draw_calibration(bins, bins, tmp_path / "calibration.png")
    assert count_colours(tmp_path / "calibration.png") > 10


@pytest.mark.parametrize("count", [1, 6, 7, 12])
def test_mistakes_are_a_readable_png(tmp_path: Path, count: int) -> None:
    pictures = torch.rand(count, 3, 8, 8)
    draw_mistakes(pictures, ["a read as b, 90%"] * count, tmp_path / "mistakes.png")
    assert count_colours(tmp_path / "mistakes.png", least=140) > 10


@pytest.mark.parametrize("classes", [2, 7, 40])
def test_attributions_of_images_are_a_readable_png(tmp_path: Path, classes: int) -> None:
    values, means = torch.randn(classes, 6, 6), torch.rand(classes, 3, 6, 6)
    values[0] = 0  # nothing of that class was recognised
    names = [f"class {number}" for number in range(classes)]
    draw_attributions(values, means, names, (), tmp_path / "attributions.png")
    assert count_colours(tmp_path / "attributions.png", least=150) > 10


@pytest.mark.parametrize("columns", [1, 30])
def test_attributions_of_a_table_are_a_readable_png(tmp_path: Path, columns: int) -> None:
    values = torch.randn(3, columns)
    names = [f"column {number}" for number in range(columns)]
    draw_attributions(values, values, ["a", "b", "c"], names, tmp_path / "attributions.png")
    assert count_colours(tmp_path / "attributions.png", least=100) > 10
