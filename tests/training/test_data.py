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
from marwright.training.data import Images, load_images, make_transform, split_images


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits")


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
    trained = make_transform(image_size)(image)
    # The handler gets what read_image gives it, which is RGB.
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    served = handler.resize_image(pixels, image_size).float() * (1 / 255)
    assert trained.shape == served.shape == (3, height, width)
    assert trained.dtype == served.dtype == torch.float32
    assert torch.equal(trained, served)


def test_a_tensor_spans_0_to_1() -> None:
    transform = make_transform((24, 24))
    assert transform(Image.new("L", (8, 8), 0)).unique().tolist() == [0.0]
    assert transform(Image.new("L", (8, 8), 255)).unique().tolist() == [1.0]


def test_digits_are_the_scans_of_scikit_learn(digits: Images) -> None:
    bunch = load_digits()
    assert len(digits) == len(digits.scans) == 1797
    assert digits.classes == tuple("0123456789")
    assert digits.labels.tolist() == bunch.target.tolist()
    for scan, image in zip(digits.scans, bunch.images, strict=True):
        assert (scan.mode, scan.size) == ("L", (8, 8))
        assert np.array_equal(np.rint(np.asarray(scan) * (16 / 255)), image)


def test_a_data_set_has_one_digest(digits: Images) -> None:
    assert load_images("digits").digest == digits.digest
    assert len(digits.digest) == 64


@pytest.mark.parametrize("name", ["", "mnist", "../digits"])
def test_an_unknown_data_set_is_refused_with_the_known(name: str) -> None:
    with pytest.raises(DataError, match=r"no data set .*expected digits"):
        load_images(name)


def test_every_image_is_in_exactly_one_part(digits: Images) -> None:
    split = split_images(digits, seed=0)
    parts = torch.cat([split.train, split.validation, split.test])
    assert sorted(parts.tolist()) == list(range(len(digits)))


def test_parts_have_their_shares(digits: Images) -> None:
    split = split_images(digits, seed=0, validation=0.25, test=0.15)
    assert len(split.validation) == pytest.approx(0.25 * len(digits), abs=1)
    assert len(split.test) == pytest.approx(0.15 * len(digits), abs=1)


def test_every_part_holds_every_class_in_its_share(digits: Images) -> None:
    split = split_images(digits, seed=3)
    whole = digits.labels.bincount() / len(digits)
    for part in (split.train, split.validation, split.test):
        counts = digits.labels[part].bincount(minlength=10)
        assert (counts - whole * len(part)).abs().max() <= 1


def test_a_seed_decides_the_split(digits: Images) -> None:
    first, again, other = (split_images(digits, seed=seed) for seed in (1, 1, 2))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
