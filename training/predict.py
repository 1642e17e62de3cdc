"""Predictions in this process: what a served model's answers are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .data import make_transform

__all__ = ["predict_images"]


@torch.inference_mode()
def predict_images(
    model_path: Path, images: Sequence[Image.Image], image_size: tuple[int, int]
) -> torch.Tensor:
    """Return (N, C) float32 probabilities from a TorchScript file, preprocessed as in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, TorchServe's own format
        model = torch.jit.load(str(model_path))
    model.eval()
    transform = make_transform(image_size)
    pixels = torch.stack([transform(image) for image in images])  # (N, 3, H, W) in [0, 1]
    return torch.cat([torch.softmax(model(batch), dim=1) for batch in pixels.split(256)])
