"""Boxes in plain torch: their formats, their overlap, and which of them say the same.

`suppress` keeps exactly the boxes that torchvision.ops.nms keeps (its CPU kernel), and needs no
torchvision: its wheels lack their operators beside a torch without CUDA.
"""

from __future__ import annotations

import math

import torch

__all__ = ["FORMATS", "measure_overlap", "measure_presence", "suppress", "to_corners"]

FORMATS = ("xyxy", "xywh", "cxcywh")
"""Two corners; a corner and a size; the centre and a size."""
BLOCK = 256


def to_corners(boxes: torch.Tensor, format: str) -> torch.Tensor:
    """Return boxes (..., 4) of one of FORMATS as x1, y1, x2, y2."""
    if format == "xyxy":
        return boxes
    position, size = boxes[..., :2], boxes[..., 2:]
    start = position if format == "xywh" else position - size / 2
    return torch.cat([start, start + size], dim=-1)


def measure_overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return intersection over union, (N, M), of boxes (N, 4) and (M, 4) given by corners.

    NaN where two empty boxes lie on one spot.
    """
    start = torch.maximum(one[:, None, :2], other[:, :2])
    end = torch.minimum(one[:, None, 2:], other[:, 2:])
    width, height = (end - start).clamp(min=0).unbind(-1)
    shared = width * height
    return shared / (_area(one)[:, None] + _area(other) - shared)


def measure_presence(boxes: torch.Tensor, scores: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Return how surely a box is among others: the most of score times overlap; 0 among none.

    Its gradient reaches boxes and scores (D-RISE, Petsiuk et al., 2021).
    """
    if not len(boxes):
        return boxes.sum() + scores.sum()
    return (measure_overlap(box[None], boxes)[0].nan_to_num() * scores).amax()


def suppress(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    threshold: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return indices of the boxes to keep, the highest score first.

    A box goes where one that is kept has a higher score, overlaps it by more than `threshold`, and
    is of the same group.
    """
    limit = _round_down(threshold, boxes.dtype)
    kept = boxes.new_empty(0, dtype=torch.int64)
    # In blocks: the memory is that of one block against all that are kept.
    for block in scores.argsort(descending=True, stable=True).split(BLOCK):
        covered = _covers(boxes, groups, kept, block, limit).any(0)
        # A box is covered by earlier ones only, so that each round settles at least one more.
        within = _covers(boxes, groups, block, block, limit).triu(1)
        keep, before = ~covered, covered
        while not torch.equal(keep, before):
            before = keep
            keep = ~(covered | (within & keep[:, None]).any(0))
        kept = torch.cat([kept, block[keep]])
    return kept


def _covers(
    boxes: torch.Tensor,
    groups: torch.Tensor | None,
    one: torch.Tensor,
    other: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    covers = measure_overlap(boxes[one], boxes[other]) > limit
    return covers if groups is None else covers & (groups[one][:, None] == groups[other])


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _round_down(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number of this type that is not above the threshold.

    torchvision compares with the threshold in double precision. torch would round it first, and
    0.3 becomes larger.
    """
    rounded = torch.tensor(threshold, dtype=dtype)
    if rounded.item() > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return float(rounded.item())
