"""Where data comes from: a name or a path becomes a DataSet.

    digits                         1,797 real scans of handwritten digits (UCI, 8 x 8 pixels)
    shapes                         3,000 drawn shapes in colour, 28 x 28
    mnist, fashion-mnist, cifar10  published sets, from files or downloaded
    folder:DIR                     images as DIR/class/*
    table:FILE                     rows of numbers with a label, CSV or Parquet

The first two need no network.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits

from marwright.errors import DataError, UsageError

from .data import DataSet, make_transform
from .downloads import PUBLISHED, read_published
from .folder import load_folder
from .shapes import SHAPES, SIDE, draw_shapes
from .table import load_table

__all__ = ["default_image_size", "load_data"]

_IMAGE_SIZES = {
    "digits": (24, 24),
    "shapes": (SIDE, SIDE),
    "mnist": (28, 28),
    "fashion-mnist": (28, 28),
    "cifar10": (32, 32),
    "folder": (64, 64),
}
_KNOWN = "digits, shapes, mnist, fashion-mnist, cifar10, folder:DIR or table:FILE"


def load_data(
    source: str,
    *,
    image_size: tuple[int, int] | None = None,
    label: str | None = None,
    data_root: Path | None = None,
    download: bool = False,
    most_unreadable: float = 0.1,
) -> DataSet:
    """Load a data set; every image passes make_transform once.

    `image_size` is (height, width), default_image_size where it is None. `label` names a table's
    label column. `data_root` holds the files of published sets. A folder may have a share of
    `most_unreadable` of images that cannot be read.

    Raises:
        DataError: no such data, or data that no training can use.
        UsageError: a label without a table, or an image size with one.
    """
    kind, path = _parse_source(source)
    if kind == "table":
        if image_size is not None:
            raise UsageError("a table has no image size", found=f"{image_size} with {source}")
        return load_table(source, path, label=label)
    if label is not None:
        raise UsageError(
            "only a table has a label column", expected="table:FILE", found=f"{label!r}, {source}"
        )
    size = image_size or default_image_size(source)
    if kind == "folder":
        return load_folder(source, path, image_size=size, most_unreadable=most_unreadable)
    if kind == "digits":
        return _load_digits(size)
    if kind == "shapes":
        return _make_data(kind, *draw_shapes(), SHAPES, size)
    return _make_data(kind, *read_published(kind, data_root=data_root, download=download), size)


def default_image_size(source: str) -> tuple[int, int]:
    """Return (height, width) that a source's images are resized to unless told otherwise.

    Raises:
        DataError: no such source.
        UsageError: the source is a table.
    """
    kind, _ = _parse_source(source)
    if kind == "table":
        raise UsageError("a table has no image size", found=source)
    return _IMAGE_SIZES[kind]


def _parse_source(source: str) -> tuple[str, Path]:
    """Return the kind, and the path of a folder or table."""
    kind, colon, path = source.partition(":")
    if kind in ("folder", "table"):
        if not path:
            raise DataError(f"{source!r} names no path", expected=f"{kind}:PATH")
        return kind, Path(path).expanduser()
    if colon or kind not in ("digits", "shapes", *PUBLISHED):
        raise DataError(f"there is no data set {source!r}", expected=_KNOWN)
    return kind, Path()


def _load_digits(image_size: tuple[int, int]) -> DataSet:
    bunch = load_digits()
    # The levels 0..16 become 0..255, so that a scan is an ordinary 8-bit grey image.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8) uint8
    labels = bunch.target.astype(np.int64)
    return _make_data("digits", pixels, labels, tuple(map(str, bunch.target_names)), image_size)


def _make_data(
    name: str,
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    classes: tuple[str, ...],
    image_size: tuple[int, int],
) -> DataSet:
    """Make a data set of (N, H, W) or (N, H, W, 3) uint8 pixels."""
    transform = make_transform(image_size)
    inputs = torch.empty(len(pixels), 3, *image_size, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        inputs[index] = transform(Image.fromarray(image))
    return DataSet(
        name=name,
        inputs=inputs,
        labels=torch.from_numpy(labels),
        classes=classes,
        digest=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(),
        open_sample=lambda index: Image.fromarray(pixels[index]),
    )
