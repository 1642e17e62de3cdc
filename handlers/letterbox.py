"""An image made as large as a model's input, and the way back from there to its own pixels."""

from __future__ import annotations

import torch

from image_input import resize_image

__all__ = ["cut_frame", "fit_image", "restore_boxes"]

GREY = 114
"""What bars are filled with, as YOLO's are in training."""


def fit_image(
    pixels: torch.Tensor, size: tuple[int, int], *, keep_ratio: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image (H, W, 3) uint8 as (3, height, width), and its frame.

    Where the ratio of its sides is kept it stands in the middle, between grey bars. The frame is
    (left, top, x scale, y scale, width, height): where in the input the image lies.
    """
    height, width = pixels.shape[:2]
    inner, top, left = size, 0, 0
    if keep_ratio:
        scale = min(size[0] / height, size[1] / width)
        inner = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    image = pixels.permute(2, 0, 1) if inner == (height, width) else resize_image(pixels, inner)
    if inner != size:
        canvas = torch.full((3, *size), GREY, dtype=torch.uint8)
        canvas[:, top : top + inner[0], left : left + inner[1]] = image
        image = canvas
    scales = inner[1] / width, inner[0] / height
    return image.contiguous(), torch.tensor([left, top, *scales, width, height])


def cut_frame(values: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Return of values (height, width) of the input those that lie on the image."""
    left, top, across, down, width, height = frame.tolist()
    bottom, right = round(top + down * height), round(left + across * width)
    return values[int(top) : bottom, int(left) : right]


def restore_boxes(boxes: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Return boxes (n, 4) in the image's own pixels, cut off at its edges."""
    start, scale, size = frame.view(3, 2)
    corners = (boxes.reshape(-1, 2, 2) - start) / scale
    limited: torch.Tensor = torch.minimum(corners.clamp(min=0), size)
    return limited.view(-1, 4)
