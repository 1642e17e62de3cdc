"""Data sets: inputs with labels, split by a seed, with a digest that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

from marwright.errors import DataError

from .vision import transforms

__all__ = ["DataSet", "make_transform", "scale", "Split", "split_data"]

FEWEST_OF_A_CLASS = 3
"""One for each part of the split."""


@dataclass(frozen=True)
class DataSet:
    """Everything a training learns from, as a model takes it but for scaling."""

    name: str
    """As it was asked for: digits, folder:DIR, table:FILE."""
    inputs: torch.Tensor
    """(N, 3, H, W) uint8 pixels, or a table's (N, columns) float32."""
    labels: torch.Tensor
    """(N,) int64 indices into `classes`."""
    classes: tuple[str, ...]
    digest: str
    """sha256 over inputs as they came, and labels."""
    open_sample: Callable[[int], Image.Image] | None = None
    """Returns an image as it came, before it was resized; None for a table."""
    columns: tuple[str, ...] = ()
    """A table's features, in order; empty for images."""
    unreadable: tuple[str, ...] = ()
    """Files that were left out, each with the reason."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_table(self) -> bool:
        """Whether the inputs are rows of numbers."""
        return bool(self.columns)


@dataclass(frozen=True)
class Split:
    """Indices of a stratified split; every item is in exactly one part."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def split_data(data: DataSet, *, seed: int, validation: float = 0.1, test: float = 0.2) -> Split:
    """Split by class and by seed into parts of the stated shares.

    Raises:
        DataError: there is one class, a class without items, or one with too few to split.
    """
    _check_classes(data)
    everything = np.arange(len(data))
    labels = data.labels.numpy()
    try:
        rest, test_part = train_test_split(
            everything, test_size=test, stratify=labels, random_state=seed
        )
        train_part, validation_part = train_test_split(
            rest, test_size=validation / (1 - test), stratify=labels[rest], random_state=seed
        )
    except ValueError as exc:  # a part would be smaller than the number of classes
        raise DataError(
            f"{len(data)} items are too few to split into training, validation and test",
            expected=f"some {round(1 / min(validation, test))} of each class",
            found=str(exc),
        ) from exc
    return Split(*(torch.from_numpy(part) for part in (train_part, validation_part, test_part)))


def _check_classes(data: DataSet) -> None:
    counts = torch.bincount(data.labels, minlength=len(data.classes)).tolist()
    if sum(count > 0 for count in counts) < 2:
        raise DataError(
            f"{data.name} has one class", expected="two or more", found=", ".join(data.classes)
        )
    scarce = [
        f"{label} ({count})"
        for label, count in zip(data.classes, counts, strict=True)
        if count < FEWEST_OF_A_CLASS
    ]
    if scarce:
        raise DataError(
            f"classes of {data.name} have too few items to be split",
            expected=f"at least {FEWEST_OF_A_CLASS}: training, validation and test need one each",
            found=", ".join(scarce),
            remedy="add items, or take the class out",
        )


def make_transform(image_size: tuple[int, int]) -> transforms.Transform:
    """Return what turns an image into (3, H, W) uint8 pixels.

    handlers/image_classifier.py does the same to a request; tests/training/test_data.py holds
    the two together.
    """
    return transforms.Compose(
        [
            transforms.RGB(),
            transforms.PILToTensor(),  # first: torch resizes bytes 3 times faster than Pillow
            transforms.Resize(list(image_size), transforms.InterpolationMode.BILINEAR),
        ]
    )


def scale(inputs: torch.Tensor) -> torch.Tensor:
    """Return pixels as float32 in [0, 1]; what is no pixel stays as it is.

    A product, as torchvision and the handlers have it: dividing by 255 differs in the last bit.
    """
    return inputs.float() * (1 / 255) if inputs.dtype == torch.uint8 else inputs
