"""torchvision's operators for detectors, where the process has none: nms and roi_align.

A TorchScript file of a torchvision detector names them, and cannot even be read without their
declarations. TorchServe imports no torchvision; and beside a torch without CUDA the wheels of
torchvision cannot load their own. What is there already is never replaced.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import library
from torch.nn import functional

from boxes import suppress

__all__ = ["align_regions", "define_missing"]

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    # Declared only: files name them, for training and for quantised models.
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
}
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_library = library.Library("torchvision", "FRAGMENT")
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

CHUNK = 64
"""Regions sampled at once: 12 million numbers with 256 channels."""


def define_missing() -> tuple[str, ...]:
    """Define what this process lacks; return the names of the operators that are now ours."""
    _load_native()
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"torchvision::{name}", schema)
    ours = []
    for name, kernel in (("nms", suppress), ("roi_align", align_regions)):
        for device, key in DEVICES.items():
            operator = f"torchvision::{name}"
            if not _has_kernel(operator, key):
                library.impl(operator, device, kernel)
                ours.append(operator)
    if "torchvision::roi_align" in ours and not _has_kernel("torchvision::roi_align", "Autograd"):
        # It is made of operators that gradients flow through: nothing else is to be derived.
        _library.impl("roi_align", align_regions, "Autograd")
    return tuple(dict.fromkeys(ours))


def _load_native() -> None:
    """Load torchvision's own operators where they are installed and fit this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:  # it was linked against CUDA's libraries, or for another torch
            return


def align_regions(
    features: torch.Tensor,
    regions: torch.Tensor,
    scale: float,
    height: int,
    width: int,
    ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Sample each region (image, x1, y1, x2, y2) of features (N, C, H, W): (K, C, height, width).

    Each bin is the mean of `ratio` by `ratio` points; where that is 0 or less, of as many as it
    has pixels.
    """
    pooled = features.new_zeros(len(regions), features.shape[1], height, width)
    corners = regions[:, 1:] * scale - (0.5 if aligned else 0.0)
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    bins = size / size.new_tensor([width, height])
    points = torch.full_like(bins, ratio) if ratio > 0 else bins.ceil().clamp(min=1)
    keys = torch.cat([regions[:, :1], points], dim=1).long()  # image, points across, points down
    for key in keys.unique(dim=0):
        image, across, down = key.tolist()
        for chosen in (keys == key).all(1).nonzero()[:, 0].split(CHUNK):
            x = _place_points(start[chosen, 0], bins[chosen, 0], width, across)
            y = _place_points(start[chosen, 1], bins[chosen, 1], height, down)
            sampled = _sample(features[image], x, y)  # (C, K, height * down, width * across)
            means = functional.avg_pool2d(sampled, (down, across))
            pooled[chosen] = means.transpose(0, 1)
    return pooled


def _place_points(start: torch.Tensor, step: torch.Tensor, bins: int, points: int) -> torch.Tensor:
    """Return where along one axis the points of each region lie: (K, bins * points)."""
    places = (torch.arange(bins * points, device=start.device) + 0.5) / points
    return start[:, None] + step[:, None] * places


def _sample(feature: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Interpolate a feature map (C, H, W) where columns x (K, X) and rows y (K, Y) cross."""
    height, width = feature.shape[1:]
    # A point beyond the map's edge by more than a pixel counts as zero; others as on the edge.
    inside = ((x >= -1) & (x <= width))[:, None, :] & ((y >= -1) & (y <= height))[:, :, None]
    grid = torch.stack(
        [
            (x * (2 / max(width - 1, 1)) - 1)[:, None, :].expand(inside.shape),
            (y * (2 / max(height - 1, 1)) - 1)[:, :, None].expand(inside.shape),
        ],
        dim=-1,
    )
    flat = grid.flatten(0, 1)[None]  # (1, K * Y, X, 2)
    values: torch.Tensor = functional.grid_sample(
        feature[None], flat, mode="bilinear", padding_mode="border", align_corners=True
    )
    return values[0].view(-1, *inside.shape) * inside
