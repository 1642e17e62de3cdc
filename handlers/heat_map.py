"""A picture of an explanation: red where the image speaks for the target, blue where against it."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from attribution import Explanation
from image_input import ImageLimits, read_image
from inference_request import InferenceRequest
from inference_response import (
    JSON_TYPE,
    NPY_TYPE,
    PNG_TYPE,
    RAW_TYPE,
    InferenceResponse,
    choose_type,
)

__all__ = ["draw_answer", "draw_heat_map"]

LEAST_SIDE = 224
MOST_SIDE = 1024
"""TorchServe refuses answers above max_response_size (6,553,500 bytes)."""
RED = (202, 0, 32)
BLUE = (5, 80, 190)
OPACITY = 0.8


def draw_answer(
    request: InferenceRequest, explanation: Explanation, limits: ImageLimits
) -> InferenceResponse | None:
    """Return the heat map over the request's image, or None where the client asks for no picture.

    Raises:
        RejectedInput: 406 where the client accepts nothing that an explanation can be.
    """
    offered = (JSON_TYPE, NPY_TYPE, RAW_TYPE, PNG_TYPE)
    if request.form != "one" or choose_type(request.accept, offered) != PNG_TYPE:
        return None
    image = read_image(request.parts[0].read_bytes(), limits)
    picture = draw_heat_map(image, explanation.attributions["attributions"])
    return InferenceResponse(200, PNG_TYPE, picture, explanation.to_headers())


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
