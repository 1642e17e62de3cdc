"""Changed copies of images, new ones for every batch: what a label should not depend on.

`flip` is done for the whole batch at once, with a coin for each image. torchvision's transforms
draw their parameters once a call, so that the others go image by image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from marwright.errors import UsageError

from .vision import transforms

__all__ = ["AUGMENTATIONS", "Augmentation", "make_augmentation"]

Augmentation = Callable[[torch.Tensor], torch.Tensor]
"""From (N, 3, H, W) uint8, or float in [0, 1], to the same shape and type."""


def make_augmentation(names: str) -> Augmentation:
    """Return what changes a batch as a comma-separated list says, in its order.

    "" and "none" change nothing. Chance comes from torch's global generator alone: one seed gives
    one batch. The batch that is given stays as it is.

    Raises:
        UsageError: there is no such augmentation, or it is named twice.
    """
    if names.strip() in ("", "none"):
        return lambda images: images
    steps = [name.strip() for name in names.split(",")]
    unknown = [name for name in steps if name not in AUGMENTATIONS]
    if unknown:
        raise UsageError(
            f"there is no augmentation {', '.join(map(repr, unknown))}",
            expected=f"none, or some of {', '.join(AUGMENTATIONS)}, with commas between",
        )
    if len(set(steps)) < len(steps):
        raise UsageError("an augmentation is named twice", found=names)

    def augment(images: torch.Tensor) -> torch.Tensor:
        for name in steps:
            images = AUGMENTATIONS[name](images)
        return images

    return augment


def _flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror every other image, left to right."""
    coins = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(coins.to(images.device), images.flip(-1), images)


def _change_each(transform: Augmentation) -> Augmentation:
    """Return what calls a transform for each image, (3, H, W), of a batch."""

    def change(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([transform(image) for image in images]) if len(images) else images

    return change


def _crop(image: torch.Tensor) -> torch.Tensor:
    """Cut out a part and stretch it to the image's own size, which only the image knows."""
    size = list(image.shape[-2:])
    cropped: torch.Tensor = transforms.RandomResizedCrop(size, scale=(0.6, 1.0))(image)
    return cropped


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": _flip,
    "rotate": _change_each(
        transforms.RandomRotation(15, interpolation=transforms.InterpolationMode.BILINEAR)
    ),
    "crop": _change_each(_crop),
    # Without hue: it takes longer than all the rest together.
    "colour": _change_each(transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)),
    "erase": _change_each(transforms.RandomErasing(p=0.5)),
    "trivial": _change_each(transforms.TrivialAugmentWide()),
}
"""Augmentations by name."""
