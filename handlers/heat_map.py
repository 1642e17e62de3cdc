"""A picture of an explanation: red where the image speaks for the target, blue where against it."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

__all__ = ["draw_heat_map"]

LEAST_SIDE = 224
MOST_SIDE = 1024
"""TorchServe refuses answers above max_response_size (6,553,500 bytes)."""
RED = (202, 0, 32)
BLUE = (5, 80, 190)
OPACITY = 0.8


def draw_heat_map(pixels: torch.Tensor, attributions: torch.Tensor) -> bytes:
    """Return a PNG of an image (H, W, 3) uint8 with attributions (h, w) laid over it.

    It is as large as the image; a smaller one is enlarged, a larger one reduced.
    """
    image = Image.fromarray(pixels.numpy()).convert("L")
    size = _choose_size(image.size)
    # Lightened, so that the colours show on black.
    grey = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) * 0.6 + 102
    heat = attributions.detach().cpu().float().numpy()
    peak = float(np.quantile(np.abs(heat), 0.995)) or float(np.abs(heat).max()) or 1.0
    scaled = Image.fromarray(np.ascontiguousarray(heat / peak, np.float32))
    values = np.asarray(scaled.resize(size, Image.Resampling.BILINEAR))[..., None]
    opacity = np.clip(np.abs(values), 0, 1) * OPACITY
    colour = np.where(values > 0, RED, BLUE)
    blended = grey[..., None] * (1 - opacity) + colour * opacity
    buffer = io.BytesIO()
    Image.fromarray(np.rint(blended).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _choose_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = max(1.0, LEAST_SIDE / min(size))
    factor = min(factor, MOST_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
