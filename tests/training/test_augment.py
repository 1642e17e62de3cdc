from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from marwright.errors import UsageError
from marwright.training.augment import AUGMENTATIONS, make_augmentation


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 255, (12, 3, 16, 20), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("names", ["", "none", " none "])
def test_none_changes_nothing(images: torch.Tensor, names: str) -> None:
    assert torch.equal(make_augmentation(names)(images), images)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shape_and_type_stay_and_the_batch_given_is_not_touched(
    images: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    batch = images if dtype == torch.uint8 else images / 255
    before = batch.clone()
    torch.manual_seed(0)
    changed = make_augmentation(name)(batch)
    assert (changed.shape, changed.dtype) == (batch.shape, dtype)
    assert torch.equal(batch, before)
    assert not torch.equal(changed, batch)
    assert changed.min() >= 0
    assert changed.max() <= (255 if dtype == torch.uint8 else 1)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_chance_is_torchs_alone(images: torch.Tensor, name: str) -> None:
    augment = make_augmentation(name)
    results = []
    for seed, other in ((3, 1), (3, 2), (4, 1)):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_equal_images_are_changed_differently(images: torch.Tensor, name: str) -> None:
    torch.manual_seed(0)
    changed = make_augmentation(name)(images[:1].expand(12, -1, -1, -1))
    assert len({image.numpy().tobytes() for image in changed}) > 1


def test_flip_mirrors_some_and_leaves_the_others(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    changed = make_augmentation("flip")(images)
    pairs = list(zip(changed, images, strict=True))
    flipped = sum(torch.equal(after, before.flip(-1)) for after, before in pairs)
    kept = sum(torch.equal(after, before) for after, before in pairs)
    assert flipped + kept == 12
    assert 0 < flipped < 12


def test_erase_blackens_a_rectangle(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    changed = make_augmentation("erase")(images)
    other = changed != images
    assert (changed[other] == 0).all()
    touched = [bool(image.any()) for image in other]
    assert 0 < sum(touched) < 12


def test_steps_follow_each_other_in_their_order(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    both = make_augmentation("flip, erase")(images)
    torch.manual_seed(0)
    after = make_augmentation("erase")(make_augmentation("flip")(images))
    assert torch.equal(both, after)


def test_an_empty_batch_stays_empty(images: torch.Tensor) -> None:
    assert make_augmentation("flip,rotate,crop")(images[:0]).shape == (0, 3, 16, 20)


@pytest.mark.parametrize("names", ["flop", "flip,flop", "flip,", "none,flip", "Flip"])
def test_an_unknown_one_is_refused_with_the_known(names: str) -> None:
    with pytest.raises(UsageError, match=r"no augmentation .*flip, rotate, crop, colour, erase"):
        make_augmentation(names)


def test_one_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="named twice"):
        make_augmentation("flip,erase,flip")
