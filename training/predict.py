"""Predictions in this process: what a served model's answers are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .data import make_transform
from .loop import compute_logits

__all__ = ["predict_images", "predict_inputs"]


def predict_images(
    model_path: Path, images: Sequence[Image.Image], image_size: tuple[int, int]
) -> torch.Tensor:
    """Return (N, C) float32 probabilities from a TorchScript file, preprocessed as in training."""
    transform = make_transform(image_size)
    return predict_inputs(model_path, torch.stack([transform(image) for image in images]))


def predict_inputs(model_path: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Return (N, C) float32 probabilities from a TorchScript file, for a data set's inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, TorchServe's own format
        model = torch.jit.load(str(model_path))
    return torch.softmax(compute_logits(model, inputs), dim=1)
