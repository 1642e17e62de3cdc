from __future__ import annotations

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from marwright.training.shapes import SHAPES, SIDE, draw_shapes


def test_images_are_colour_bytes_and_classes_are_even() -> None:
    pixels, labels = draw_shapes(200)
    assert (pixels.shape, pixels.dtype) == ((200, SIDE, SIDE, 3), np.uint8)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [20] * len(SHAPES)
    assert tuple(sorted(SHAPES)) == SHAPES


def test_they_are_the_same_every_time_whatever_numpys_own_seed() -> None:
    np.random.seed(1)
    first = draw_shapes(30)
    np.random.seed(2)
    second = draw_shapes(30)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_no_two_are_alike() -> None:
    pixels, _ = draw_shapes(300)
    assert len({image.tobytes() for image in pixels}) == 300


def test_colour_alone_tells_nothing() -> None:
    pixels, labels = draw_shapes(1_000)
    means = pixels.reshape(1_000, -1, 3).mean(1)
    nearest = KNeighborsClassifier(5).fit(means[:800], labels[:800])
    assert nearest.score(means[800:], labels[800:]) < 0.3


def test_a_ring_has_its_ground_in_the_middle_and_a_circle_has_not() -> None:
    pixels, labels = draw_shapes(600)
    spans = {}
    for shape in ("ring", "circle"):
        images = pixels[labels == SHAPES.index(shape)].astype(float)
        # The middle of what stands out from the corners' colour.
        inside = []
        for image in images:
            ground = np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
            distance = np.linalg.norm(image - ground, axis=2)
            rows, columns = np.nonzero(distance > 90)
            row, column = int(np.median(rows)), int(np.median(columns))
            inside.append(distance[row, column] / np.percentile(distance, 90))
        spans[shape] = float(np.median(inside))
    assert spans["ring"] < 0.6 < spans["circle"]
