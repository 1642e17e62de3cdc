"""What every contestant but marwright and plain TorchServe does with a request: one way for all.

Pillow decodes to RGB and resizes to 24 x 24, bilinear; float / 255; the CNN; softmax; the five best
as JSON. The servers import it, so that they differ in what they are and in nothing else.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["Classifier", "Pixels"]

SIZE = (24, 24)
TOP = 5
BATCHES = (1, 2, 32)
"""Sizes the model is run at once before it is served: TorchScript compiles in its first runs."""

Pixels = np.ndarray
"""(24, 24, 3) uint8."""


class Classifier:
    """The model of `folder` (model.pt, classes.json) with one torch thread."""

    def __init__(self, folder: Path, *, optimized: bool) -> None:
        torch.set_num_threads(1)
        # Otherwise each new batch size compiles the model again, in front of a waiting client.
        torch.jit.set_fusion_strategy([("DYNAMIC", 1)])
        self.labels = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        self.model = torch.jit.load(str(folder / "model.pt")).eval()
        if optimized:
            self.model = torch.jit.optimize_for_inference(torch.jit.freeze(self.model))
        for size in 2 * BATCHES:
            self.predict([np.zeros((*SIZE, 3), np.uint8)] * size)

    @classmethod
    def from_environment(cls) -> Classifier:
        """Return what benchmarks/serving.py wants served."""
        optimized = os.environ.get("BENCH_OPTIMIZED") == "1"
        return cls(Path(os.environ["BENCH_MODEL"]), optimized=optimized)

    def classify(self, images: Sequence[bytes]) -> list[str]:
        """Return one JSON answer for each encoded image: labels with probabilities, best first."""
        return self.predict([self.decode(image) for image in images])

    def decode(self, image: bytes) -> Pixels:
        """Decode and resize one image."""
        with Image.open(io.BytesIO(image)) as opened:
            picture = opened.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR)
        return np.asarray(picture)

    @torch.inference_mode()
    def predict(self, pixels: Sequence[Pixels]) -> list[str]:
        """Run the model on a batch of decoded images."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        scores = torch.softmax(self.model(batch), dim=1)  # (N, 3, 24, 24) -> (N, classes)
        values, indices = scores.topk(min(TOP, len(self.labels)), dim=1)
        rows = zip(indices.tolist(), values.tolist(), strict=True)
        return [
            json.dumps({self.labels[i]: round(p, 6) for i, p in zip(*row, strict=True)})
            for row in rows
        ]
