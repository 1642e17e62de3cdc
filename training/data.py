"""Data sets: images with labels, split by a seed, with a digest that names them.

`digits` is 1,797 real scans of handwritten digits (UCI, 8 x 8 pixels, 16 grey levels) that ship
with scikit-learn, so it needs no network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from marwright.errors import DataError

from .vision import transforms

__all__ = ["Images", "load_images", "make_transform", "Split", "split_images"]


@dataclass(frozen=True)
class Images:
    """Images as they come, before any preprocessing."""

    name: str
    scans: tuple[Image.Image, ...]
    labels: torch.Tensor
    """(N,) int64 indices into `classes`."""
    classes: tuple[str, ...]
    digest: str
    """sha256 over pixels and labels."""

    def __len__(self) -> int:
        return len(self.scans)


@dataclass(frozen=True)
class Split:
    """Indices of a stratified split; every image is in exactly one part."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def load_images(name: str) -> Images:
    """Load a data set by name.

    Raises:
        DataError: no such data set.
    """
    if name != "digits":
        raise DataError(f"there is no data set {name!r}", expected="digits")
    bunch = load_digits()
    # The levels 0..16 become 0..255, so that a scan is an ordinary 8-bit grey image.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8) uint8
    labels = bunch.target.astype(np.int64)
    return Images(
        name=name,
        scans=tuple(Image.fromarray(scan) for scan in pixels),
        labels=torch.from_numpy(labels),
        classes=tuple(str(label) for label in bunch.target_names),
        digest=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
    )


def split_images(images: Images, *, seed: int, validation: float = 0.1, test: float = 0.2) -> Split:
    """Split by class and by seed into parts of the stated shares."""
    everything = np.arange(len(images))
    labels = images.labels.numpy()
    rest, test_part = train_test_split(
        everything, test_size=test, stratify=labels, random_state=seed
    )
    train_part, validation_part = train_test_split(
        rest, test_size=validation / (1 - test), stratify=labels[rest], random_state=seed
    )
    return Split(*(torch.from_numpy(part) for part in (train_part, validation_part, test_part)))


def make_transform(image_size: tuple[int, int]) -> transforms.Transform:
    """Return what turns an image into (3, H, W) float32 in [0, 1].

    handlers/image_classifier.py does the same to a request; tests/training/test_data.py holds
    the two together.
    """
    return transforms.Compose(
        [
            transforms.RGB(),
            transforms.PILToTensor(),  # first: torch resizes bytes 3 times faster than Pillow
            transforms.Resize(list(image_size), transforms.InterpolationMode.BILINEAR),
            transforms.ToDtype(torch.float32, scale=True),
        ]
    )
