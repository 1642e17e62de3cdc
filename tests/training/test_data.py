from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from marwright.errors import DataError
from marwright.training.data import DataSet, make_transform, scale, split_data
from marwright.training.sources import load_data


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")


@pytest.fixture(scope="module")
def handler(root: Path) -> Iterator[Any]:
    """The handler's decoding, imported as a worker imports it."""
    sys.path.insert(0, str(root / "handlers"))
    yield importlib.import_module("image_input")
    sys.path.remove(str(root / "handlers"))
    for path in (root / "handlers").glob("*.py"):
        sys.modules.pop(path.stem, None)


def make_image(size: tuple[int, int], mode: str, seed: int = 0) -> Image.Image:
    """Return noise of (width, height) pixels."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(8, 8), (24, 24), (1, 1), (7, 100), (301, 199)])
@pytest.mark.parametrize("image_size", [(24, 24), (17, 40)])
def test_training_and_the_handler_make_identical_tensors(
    handler: Any, mode: str, size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    image = make_image(size, mode)
    height, width = image_size
    trained = scale(make_transform(image_size)(image))
    # The handler gets what read_image gives it, which is RGB.
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    served = handler.resize_image(pixels, image_size).float() * (1 / 255)
    assert trained.shape == served.shape == (3, height, width)
    assert trained.dtype == served.dtype == torch.float32
    assert torch.equal(trained, served)


def test_a_tensor_spans_0_to_1() -> None:
    transform = make_transform((24, 24))
    for grey, value in ((0, 0.0), (255, 1.0)):
        pixels = transform(Image.new("L", (8, 8), grey))
        assert pixels.dtype == torch.uint8
        assert scale(pixels).unique().tolist() == [value]


def test_rows_of_a_table_are_not_scaled() -> None:
    rows = torch.tensor([[255.0, -3.0]])
    assert torch.equal(scale(rows), rows)


def test_digits_are_the_scans_of_scikit_learn(digits: DataSet) -> None:
    bunch = load_digits()
    assert len(digits) == len(digits.inputs) == 1797
    assert digits.open_sample is not None
    assert not digits.is_table
    assert digits.classes == tuple("0123456789")
    assert digits.labels.tolist() == bunch.target.tolist()
    for index, image in enumerate(bunch.images):
        scan = digits.open_sample(index)
        assert (scan.mode, scan.size) == ("L", (8, 8))
        assert np.array_equal(np.rint(np.asarray(scan) * (16 / 255)), image)


def test_a_data_set_has_one_digest(digits: DataSet) -> None:
    assert load_data("digits").digest == digits.digest
    assert len(digits.digest) == 64


@pytest.mark.parametrize("name", ["", "kmnist", "../digits"])
def test_an_unknown_data_set_is_refused_with_the_known(name: str) -> None:
    with pytest.raises(DataError, match=r"no data set .*expected digits"):
        load_data(name)


def test_every_image_is_in_exactly_one_part(digits: DataSet) -> None:
    split = split_data(digits, seed=0)
    parts = torch.cat([split.train, split.validation, split.test])
    assert sorted(parts.tolist()) == list(range(len(digits)))


def test_parts_have_their_shares(digits: DataSet) -> None:
    split = split_data(digits, seed=0, validation=0.25, test=0.15)
    assert len(split.validation) == pytest.approx(0.25 * len(digits), abs=1)
    assert len(split.test) == pytest.approx(0.15 * len(digits), abs=1)


def test_every_part_holds_every_class_in_its_share(digits: DataSet) -> None:
    split = split_data(digits, seed=3)
    whole = digits.labels.bincount() / len(digits)
    for part in (split.train, split.validation, split.test):
        counts = digits.labels[part].bincount(minlength=10)
        assert (counts - whole * len(part)).abs().max() <= 1


def test_a_seed_decides_the_split(digits: DataSet) -> None:
    first, again, other = (split_data(digits, seed=seed) for seed in (1, 1, 2))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def make_data(counts: list[int]) -> DataSet:
    """Return a table that has so many rows of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    classes = tuple("abcdef"[: len(counts)])
    return DataSet("table:x", torch.rand(len(labels), 2), labels, classes, "", columns=("p", "q"))


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="table:x has one class: expected two or more, found a"):
        split_data(make_data([30]), seed=0)
    with pytest.raises(DataError, match="one class"):
        split_data(make_data([0, 30]), seed=0)


def test_classes_too_small_to_be_split_are_all_named() -> None:
    with pytest.raises(DataError, match=r"too few items.*found b \(0\), d \(2\)"):
        split_data(make_data([30, 0, 30, 2]), seed=0)


def test_fewer_items_than_the_parts_need_are_refused() -> None:
    with pytest.raises(DataError, match="12 items are too few to split"):
        split_data(make_data([3, 3, 3, 3]), seed=0)
