from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

Import = Callable[[str], Any]


def suppress_one_by_one(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Do what torchvision's nms_kernel.cpp does, in its order and its precision."""
    x1, y1, x2, y2 = boxes.numpy().T
    areas = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    for i in scores.sort(stable=True, descending=True).indices.tolist():
        width = np.maximum(np.float32(0), np.minimum(x2[i], x2[kept]) - np.maximum(x1[i], x1[kept]))
        height = np.maximum(
            np.float32(0), np.minimum(y2[i], y2[kept]) - np.maximum(y1[i], y1[kept])
        )
        with np.errstate(invalid="ignore"):  # two empty boxes: 0 / 0
            overlap = width * height / (areas[kept] + areas[i] - width * height)
        if not (overlap.astype(np.float64) > threshold).any():
            kept.append(i)
    return kept


def make_boxes(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make boxes on a grid of quarters, with few different scores, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 60
    size = torch.rand(count, 2, generator=generator) * 30
    scores = torch.randint(0, 40, (count,), generator=generator) / 40
    return (torch.cat([start, start + size], 1) * 4).round() / 4, scores


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 40, 256, 257, 900])
def test_the_boxes_kept_are_exactly_torchvisions(
    handlers: Import, count: int, threshold: float
) -> None:
    for seed in range(20 if count < 300 else 2):
        boxes, scores = make_boxes(count, seed=seed)
        expected = suppress_one_by_one(boxes, scores, threshold)
        assert handlers("boxes").suppress(boxes, scores, threshold).tolist() == expected


def test_the_threshold_is_compared_in_double_precision(handlers: Import) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])  # 3 / 10 as float32 is above 0.3
    scores = torch.tensor([0.9, 0.8])
    assert suppress_one_by_one(boxes, scores, 0.3) == [0]
    assert handlers("boxes").suppress(boxes, scores, 0.3).tolist() == [0]


def test_groups_do_not_suppress_one_another(handlers: Import) -> None:
    boxes, scores = make_boxes(400, seed=5)
    groups = torch.arange(400) % 3
    kept = handlers("boxes").suppress(boxes, scores, 0.3, groups).tolist()
    expected = []
    for group in range(3):
        (places,) = (groups == group).nonzero(as_tuple=True)
        own = suppress_one_by_one(boxes[places], scores[places], 0.3)
        expected += places[own].tolist()
    assert sorted(kept) == sorted(expected)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)


def test_a_long_chain_is_settled_box_by_box(handlers: Import) -> None:
    # Each box covers the next alone, so that every second one stays.
    start = torch.arange(300.0)
    boxes = torch.stack([start, 0 * start, start + 2, 0 * start + 1], 1)
    kept = handlers("boxes").suppress(boxes, -start, 0.3)
    assert kept.tolist() == list(range(0, 300, 2))


@pytest.mark.parametrize(
    ("format", "box"), [("xyxy", [2, 4, 8, 10]), ("xywh", [2, 4, 6, 6]), ("cxcywh", [5, 7, 6, 6])]
)
def test_every_format_becomes_corners(handlers: Import, format: str, box: list[float]) -> None:
    corners = handlers("boxes").to_corners(torch.tensor([[box]]).float(), format)
    assert corners.tolist() == [[[2, 4, 8, 10]]]


def test_a_box_is_as_present_as_the_surest_one_that_lies_on_it(handlers: Import) -> None:
    measure = handlers("boxes").measure_presence
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [90, 90, 99, 99]], requires_grad=True)
    scores = torch.tensor([0.3, 0.8, 0.9], requires_grad=True)
    presence = measure(boxes, scores, torch.tensor([0.0, 0, 10, 10]))
    assert presence.item() == pytest.approx(0.4)  # half of the second box, at 0.8
    presence.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [0, 0.5, 0]


def test_a_box_among_none_is_absent(handlers: Import) -> None:
    boxes, scores = torch.zeros(0, 4, requires_grad=True), torch.zeros(0)
    presence = handlers("boxes").measure_presence(boxes, scores, torch.tensor([0.0, 0, 1, 1]))
    assert (presence.item(), presence.requires_grad) == (0, True)
