from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from marwright.errors import DataError, UsageError
from marwright.training.data import make_transform
from marwright.training.sources import default_image_size, load_data


def test_digits_are_the_scans_of_scikit_learn() -> None:
    data, bunch = load_data("digits"), load_digits()
    assert data.digest == "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
    assert data.labels.tolist() == bunch.target.tolist()
    assert (data.inputs.shape, data.inputs.dtype) == ((1797, 3, 24, 24), torch.uint8)
    assert data.open_sample is not None
    for index in (0, 1000, 1796):
        scan = data.open_sample(index)
        assert (scan.mode, scan.size) == ("L", (8, 8))
        assert np.array_equal(np.rint(np.asarray(scan) * (16 / 255)), bunch.images[index])
        assert torch.equal(data.inputs[index], make_transform((24, 24))(scan))


def test_shapes_come_without_a_file() -> None:
    data = load_data("shapes", image_size=(14, 20))
    assert data.inputs.shape == (3000, 3, 14, 20)
    assert len(data.classes) == 10
    assert data.open_sample is not None
    assert torch.equal(data.inputs[7], make_transform((14, 20))(data.open_sample(7)))


@pytest.mark.parametrize(
    ("source", "size"),
    [("digits", 24), ("shapes", 28), ("mnist", 28), ("cifar10", 32), ("folder:x", 64)],
)
def test_every_source_of_images_has_a_size(source: str, size: int) -> None:
    assert default_image_size(source) == (size, size)


@pytest.mark.parametrize("source", ["", "imagenet", "../digits", "digits:8", "Folder:x", "table"])
def test_an_unknown_source_is_refused_with_the_known(source: str) -> None:
    with pytest.raises(DataError, match=r"(no data set .*expected digits, shapes|names no path)"):
        load_data(source)


@pytest.mark.parametrize("source", ["folder:", "table:"])
def test_a_source_without_its_path_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="names no path"):
        load_data(source)


def test_only_a_table_has_a_label_and_no_size() -> None:
    with pytest.raises(UsageError, match="only a table"):
        load_data("digits", label="kind")
    with pytest.raises(UsageError, match="no image size"):
        default_image_size("table:x.csv")
