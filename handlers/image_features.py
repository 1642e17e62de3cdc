"""What images look like, in a dozen numbers each: what drift of images is seen in.

Training takes the reference with this file and handlers measure live images with it, so that the
two can differ in nothing but the images. Sums are of whole numbers, and results are rounded: the
same pixels give the same numbers on every machine. Computed by numpy: torch would start threads
of its own for the thread that calls this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["IMAGE_FEATURES", "measure_images"]

IMAGE_FEATURES = (
    "brightness",
    "contrast",
    "red",
    "green",
    "blue",
    "saturation",
    "sharpness",
    "noise",
    "edges",
    "direction",
    "centre_x",
    "centre_y",
    "tilt",
)
"""Names of the columns that measure_images returns."""
AT_ONCE = 1 << 17
"""Pixels looked at together: what lies between fits a processor's cache."""
EDGE = 32
"""Least step between two neighbours, of 255, that counts as an edge."""
SPREAD = 6 * 0.6745
"""Median of what the noise's mask gives for normal noise of deviation 1."""
DECIMALS = 6

Array = np.ndarray[Any, Any]


def measure_images(pixels: torch.Tensor) -> torch.Tensor:
    """Return (N, 13) float32 for images (N, 3, H, W) uint8; IMAGE_FEATURES names the columns."""
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(
            f"expected images (N, 3, H, W) uint8, found {tuple(pixels.shape)} {pixels.dtype}"
        )
    step = max(1, AT_ONCE // max(1, pixels.shape[2] * pixels.shape[3]))
    blocks = [_measure(block.contiguous().numpy()) for block in pixels.split(step) if block.numel()]
    found = np.concatenate([np.zeros((0, len(IMAGE_FEATURES))), *blocks])
    return torch.from_numpy(found.round(DECIMALS).astype(np.float32))


def _measure(images: Array) -> Array:
    red, green, blue = (images[:, channel] for channel in range(3))
    # BT.601's weights in 256ths.
    grey = (np.multiply(red, 77, dtype=np.uint16) + np.multiply(green, 150, dtype=np.uint16)) + (
        np.multiply(blue, 29, dtype=np.uint16)
    )
    grey = (grey >> 8).astype(np.int16)
    brightness = _mean(grey)
    # Its sum also says how much the pixels differ, for the contrast.
    weights = np.abs(grey - brightness.round().astype(np.int16)[:, None, None])
    columns = [
        brightness / 255,
        _mean(weights) / 255,
        *(_mean(channel) / 255 for channel in (red, green, blue)),
        _mean(images.max(axis=1) - images.min(axis=1)) / 255,
        *_measure_detail(grey),
        *_measure_place(weights),
    ]
    return np.stack(columns, axis=1)


def _measure_detail(grey: Array) -> Iterator[Array]:
    """Give sharpness, noise, edges and direction.

    Noise is taken by a mask that leaves out steps and ramps (Immerkaer, Fast noise variance
    estimation, 1996), but from the median where he has the mean: edges, few, do not move it.
    """
    across = grey[:, :, 1:] - grey[:, :, :-1]
    down = grey[:, 1:] - grey[:, :-1]
    bend_across = across[:, :, 1:] - across[:, :, :-1]
    bend_down = down[:, 1:] - down[:, :-1]
    yield _mean(np.abs(bend_across[:, 1:-1] + bend_down[:, :, 1:-1])) / (4 * 255)
    # The second difference both ways: 1 -2 1, -2 4 -2, 1 -2 1.
    rest = np.abs(bend_across[:, 2:] - 2 * bend_across[:, 1:-1] + bend_across[:, :-2])
    yield _median(rest) / (SPREAD * 255)
    across, down = np.abs(across), np.abs(down)
    steps = [(step >= EDGE).reshape(len(grey), -1) for step in (across, down)]
    found = sum(np.count_nonzero(step, axis=1) for step in steps)
    yield found / max(1, sum(step.shape[1] for step in steps))
    wide, high = _sum(across), _sum(down)
    yield np.where(wide + high > 0, wide / np.maximum(wide + high, 1), 0.5)


def _measure_place(weights: Array) -> Iterator[Array]:
    """Give where the image differs from its mean, 0 to 1 across and down, and along which slope.

    The slope is the correlation of across and down: turned images have another.
    """
    narrow = np.int32 if max(weights.shape) <= 4096 else np.int64
    by_column, by_row = (weights.sum(axis=axis, dtype=narrow).astype(np.int64) for axis in (1, 2))
    total = by_column.sum(axis=1)
    safe = np.maximum(total, 1)
    x, y = (np.arange(by.shape[1]) for by in (by_column, by_row))
    centre_x, centre_y = (by_column @ x) / safe, (by_row @ y) / safe
    spread_x = (by_column @ (x * x)) / safe - centre_x**2
    spread_y = (by_row @ (y * y)) / safe - centre_y**2
    moments = np.multiply(weights, x, dtype=narrow).sum(axis=2, dtype=narrow)
    both = (moments.astype(np.int64) @ y) / safe - centre_x * centre_y
    spread = np.sqrt(np.maximum(spread_x * spread_y, 0))
    for centre, places in ((centre_x, x), (centre_y, y)):
        yield np.where(total > 0, (centre + 0.5) / len(places), 0.5)
    is_flat = spread < 1e-9
    yield np.where(is_flat, 0.0, both / np.where(is_flat, 1.0, spread))


def _sum(values: Array) -> Array:
    flat = values.reshape(len(values), -1)
    narrow = flat.shape[1] < 1 << 19  # of values below 4096; int32 takes half the time
    total: Array = flat.sum(axis=1, dtype=np.int32 if narrow else np.int64)
    return total.astype(np.int64)


def _mean(values: Array) -> Array:
    """Return each image's mean; 0 where an image is too small to have such values."""
    mean: Array = _sum(values) / max(1, values[0].size)
    return mean


def _median(values: Array) -> Array:
    flat = values.reshape(len(values), -1)
    if not flat.shape[1]:
        return np.zeros(len(values))
    middle = flat.shape[1] // 2
    found: Array = np.partition(flat, middle, axis=1)[:, middle]
    return found
