"""Image classifier: the bytes of an image in, the most probable labels out.

In: the bytes of a PNG, JPEG or WebP as the body or a multipart part, or JSON {"data": "<base64>"}.
Out: JSON, the labels with their probabilities, most probable first: {"7": 0.998, "9": 0.001, ...}.
A request that is no image gets its own 4xx and a problem (RFC 9457); its neighbours in the batch
are answered as if it were not there.

Settings, under `handler:` in model-config.yaml: image_size [height, width], top_k, threads,
max_bytes, max_pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from image_input import ImageLimits, RejectedInput, read_image

__all__ = ["ImageClassifier"]


class ImageClassifier:
    """Classifies images with a TorchScript model that gives one logit for each class.

    The model takes (N, 3, H, W) float32 in [0, 1] and gives (N, C) logits; normalisation belongs
    to the model, so that training and serving cannot differ.
    """

    def initialize(self, context: Any) -> None:
        """Load model and labels; TorchServe calls this once in each worker."""
        folder = Path(context.system_properties["model_dir"])
        settings = (context.model_yaml_config or {}).get("handler") or {}
        # One thread a worker: workers that each take every core slow one another down.
        torch.set_num_threads(int(settings.get("threads", 1)))
        gpu = context.system_properties.get("gpu_id")
        self.device = torch.device(
            f"cuda:{gpu}" if torch.cuda.is_available() and gpu is not None else "cpu"
        )
        self.limits = ImageLimits(
            **{key: settings[key] for key in ("max_bytes", "max_pixels") if key in settings}
        )
        self.height, self.width = settings.get("image_size", (224, 224))
        self.labels = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        self.top_k = min(int(settings.get("top_k", 5)), len(self.labels))
        weights = folder / context.manifest["model"]["serializedFile"]
        self.model = torch.jit.load(str(weights), map_location=self.device).eval()
        self._check_model()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer a batch: exactly one answer for each request, in order."""
        answers = [""] * len(data)
        tensors, accepted = [], []
        for index, row in enumerate(data):
            try:
                tensors.append(self._make_tensor(read_image(row, self.limits)))
                accepted.append(index)
            except RejectedInput as rejected:
                answers[index] = _refuse(context, index, rejected)
        if tensors:
            for index, scores in zip(accepted, self._infer(torch.stack(tensors)), strict=True):
                context.set_response_content_type(index, "application/json")
                answers[index] = self._render(scores)
        return answers

    def _check_model(self) -> None:
        """Run the model once, so that a wrong shape is told at start, not to the first client."""
        logits = self._infer(torch.zeros(1, 3, self.height, self.width))
        if logits.shape != (1, len(self.labels)):
            raise ValueError(
                f"expected (1, {len(self.labels)}) logits for the {len(self.labels)} labels of "
                f"classes.json, found {tuple(logits.shape)}; pack the model with its own classes"
            )

    def _make_tensor(self, image: Image.Image) -> torch.Tensor:
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.height, self.width, 3)  # (H, W, 3) uint8
        # Times 1/255, as torchvision scales: dividing by 255 differs in the last bit.
        return pixels.permute(2, 0, 1).float() * (1 / 255)  # (3, H, W) float32 in [0, 1]

    @torch.inference_mode()
    def _infer(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model(batch.to(self.device))  # (N, C) float32
        return torch.softmax(logits, dim=1).cpu()

    def _render(self, scores: torch.Tensor) -> str:
        values, indices = scores.topk(self.top_k)
        top = zip(indices.tolist(), values.tolist(), strict=True)
        return json.dumps({self.labels[i]: round(value, 6) for i, value in top})


def _refuse(context: Any, index: int, rejected: RejectedInput) -> str:
    """Set one request's status and return its problem (RFC 9457)."""
    context.set_response_status(rejected.status, rejected.title, index)
    context.set_response_content_type(index, "application/problem+json")
    problem = {"title": rejected.title, "status": rejected.status, "detail": rejected.detail}
    return json.dumps(problem)
