"""Drawn shapes: a data set of colour images that needs neither a network nor a file.

Ten shapes of random size, place, turn and colour on a darker, shaded and noisy ground: easy to
look at, and hard enough that a small network is right about 19 times in 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["draw_shapes", "SHAPES", "SIDE"]

SIDE = 28
"""Height and width of an image, in pixels."""

_SEED = 1
_FINE = 4  # drawn that many times larger, so that edges come out smooth
_LEAST_CONTRAST = 85.0  # between the colours of shape and ground, as distance in RGB
_NOISE = 16.0  # standard deviation, in levels of 255

Point = tuple[float, float]


def _list_corners(count: int, radii: Sequence[float] = (1.0,)) -> list[Point]:
    """Return points around the origin, at the radii in turn."""
    turns = [2 * math.pi * index / count for index in range(count)]
    return [
        (radii[index % len(radii)] * math.cos(turn), radii[index % len(radii)] * math.sin(turn))
        for index, turn in enumerate(turns)
    ]


def _list_heart() -> list[Point]:
    turns = [2 * math.pi * index / 40 for index in range(40)]
    return [
        (
            math.sin(turn) ** 3,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn)) / 16,
        )
        for turn in turns
    ]


_ARM = 0.3  # half the width of a cross's arm
# Polygons that fill a circle of radius 1; the round shapes are drawn by _draw_mask.
_POLYGONS: dict[str, list[Point]] = {
    "arrow": [(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)],
    "bar": [(1, 0.28), (-1, 0.28), (-1, -0.28), (1, -0.28)],
    "cross": [
        point
        for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))
        for point in (
            [(a, b * _ARM), (a * _ARM, b * _ARM), (a * _ARM, b)]
            if a * b > 0
            else [(a * _ARM, b), (a * _ARM, b * _ARM), (a, b * _ARM)]
        )
    ],
    "heart": _list_heart(),
    "square": _list_corners(4),
    "star": _list_corners(10, (1.0, 0.42)),
    "triangle": _list_corners(3),
}

SHAPES = tuple(sorted([*_POLYGONS, "circle", "crescent", "ring"]))
"""The classes, by name."""


def draw_shapes(count: int = 3_000) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return (N, 28, 28, 3) uint8 pixels and (N,) labels, indices into SHAPES; always the same.

    The edges are Pillow's: another release of it may shade some of them otherwise.
    """
    # The old generator, because numpy promises that its numbers never change.
    random = np.random.RandomState(_SEED)
    labels = random.permutation(np.arange(count) % len(SHAPES)).astype(np.int64)
    images = [_draw_image(SHAPES[label], random) for label in labels]
    return np.stack(images), labels


def _draw_image(shape: str, random: np.random.RandomState) -> npt.NDArray[np.uint8]:
    """Return (28, 28, 3) uint8."""
    radius = random.uniform(6, 12)
    middle = random.uniform(radius, SIDE - radius, 2)
    cover = _draw_mask(shape, radius, middle, random.uniform(0, 2 * math.pi))[:, :, None]
    ground = _shade_ground(random)
    colour = random.uniform(110, 255, 3)
    while np.linalg.norm(colour - ground.mean((0, 1))) < _LEAST_CONTRAST:
        colour = random.uniform(110, 255, 3)
    pixels = cover * colour + (1 - cover) * ground + random.normal(0, _NOISE, (SIDE, SIDE, 3))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _draw_mask(
    shape: str, radius: float, middle: npt.NDArray[np.float64], turn: float
) -> npt.NDArray[np.float64]:
    """Return (28, 28): the share of each pixel that the shape covers."""
    mask = Image.new("L", (SIDE * _FINE, SIDE * _FINE))
    draw = ImageDraw.Draw(mask)
    ahead = np.array([math.cos(turn), math.sin(turn)])
    aside = np.array([-ahead[1], ahead[0]])

    def fill_circle(share: float, offset: float, level: int) -> None:
        x, y = (middle + ahead * offset * radius) * _FINE
        reach = share * radius * _FINE
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=level)

    if shape in _POLYGONS:
        points = [middle + radius * (x * ahead + y * aside) for x, y in _POLYGONS[shape]]
        draw.polygon([(float(x) * _FINE, float(y) * _FINE) for x, y in points], fill=255)
    else:
        fill_circle(1.0, 0.0, 255)
        if shape == "ring":
            fill_circle(0.55, 0.0, 0)
        elif shape == "crescent":
            fill_circle(0.85, 0.5, 0)
    return np.asarray(mask.reduce(_FINE), np.float64) / 255


def _shade_ground(random: np.random.RandomState) -> npt.NDArray[np.float64]:
    """Return (28, 28, 3): from one colour to a neighbour of it, in any direction."""
    first = random.uniform(0, 120, 3)
    second = np.clip(first + random.uniform(-60, 60, 3), 0, 255)
    turn = random.uniform(0, 2 * math.pi)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    share = np.clip(0.5 + rows * math.sin(turn) + columns * math.cos(turn), 0, 1)[:, :, None]
    return np.asarray(first * (1 - share) + second * share)
