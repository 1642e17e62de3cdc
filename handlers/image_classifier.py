"""Image classifier: the bytes of an image in, the most probable labels out.

In: the bytes of a PNG, JPEG, WebP, GIF or BMP as the body, as multipart parts, or as base64 in
JSON: {"data": "<base64>"}, {"instances": [...]} (KServe v1), {"inputs": [...]} (v2, BYTES).
Out: JSON, the labels with their probabilities, most probable first: {"7": 0.998, "9": 0.001, ...};
as npy, raw numbers and v2 the probabilities of all labels, in the order of classes.json.
At /explanations: how much each pixel speaks for a label; as image/png a heat map.

Settings, under `handler:` in model-config.yaml: image_size [height, width], top_k, max_pixels,
scaled_decoding, and those of attribution and batch_handler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attribution import Explainer, Explanation, choose_windows, find_target, write_explanations
from batch_handler import BatchHandler
from collation import Tensors
from heat_map import draw_answer
from image_features import IMAGE_FEATURES, measure_images
from image_input import ImageLimits, read_image, resize_image, resize_images, scale_pixels
from inference_request import InferenceRequest, Part
from inference_response import Arrays, InferenceResponse
from logits import find_best, fold_logits, score_logits
from prediction_log import Observation

__all__ = ["ImageClassifier"]

SMALL = 128 * 128 * 3
"""Bytes of pixels that may wait for their batch."""


class ImageClassifier(BatchHandler):
    """Classifies images with a model that gives one logit for each class.

    The model takes (N, 3, H, W) float32 in [0, 1] and gives (N, C) logits; normalisation belongs
    to the model, so that training and serving cannot differ.
    """

    def configure(self) -> None:
        """Load the labels and check that the model has one logit for each."""
        self.image_limits = ImageLimits(
            max_bytes=self.limits.max_bytes,
            max_pixels=int(self.settings.get("max_pixels", ImageLimits.max_pixels)),
        )
        height, width = self.settings.get("image_size", (224, 224))
        self.image_size = int(height), int(width)
        self.at_least = self.image_size if self.settings.get("scaled_decoding") else None
        self.labels = json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))
        self.top_k = min(int(self.settings.get("top_k", 5)), len(self.labels))
        self.explainer = Explainer(self.backend, self.settings, batch=self.max_batch)
        with torch.inference_mode():
            logits = self.backend.run(
                scale_pixels(self.make_example()[None].to(self.backend.device))
            )
        if logits.shape != (1, len(self.labels)):
            raise ValueError(
                f"expected (1, {len(self.labels)}) logits for the {len(self.labels)} labels of "
                f"classes.json, found {tuple(logits.shape)}; pack the model with its own classes"
            )

    def make_example(self) -> torch.Tensor:
        """Return a black image."""
        return torch.zeros(3, *self.image_size, dtype=torch.uint8)

    def decode(self, part: Part) -> torch.Tensor:
        """Decode an image: (H, W, 3) uint8, of the model's size if it was large.

        A batch of large ones would fill the memory. Small ones are resized together: decoding one
        after the other, then resizing, takes 0.6 times as long as in turns.
        """
        pixels = read_image(part.read_bytes(), self.image_limits, at_least=self.at_least)
        if pixels.numel() <= SMALL:
            return pixels
        return resize_image(pixels, self.image_size).permute(1, 2, 0)

    def make_tensors(self, decoded: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return (3, H, W) uint8 of the model's size; a byte a value is the least to stack."""
        return resize_images(decoded, self.image_size)

    def infer(self, *batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what images (N, 3, H, W) uint8 are: all logits, and the best labels.

        Shapes (N, C), (N, top_k) with the probabilities of the best, (N, top_k) with their indices.
        The best are found here, in one go for all; all probabilities are wanted by few.
        """
        (pixels,) = batch
        logits = self.backend.run(scale_pixels(pixels))
        return (logits, *torch.softmax(logits, dim=1).topk(self.top_k))

    def make_answer(self, output: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """Return the top labels with their probabilities."""
        values, indices = output[1:3]
        top = zip(indices.tolist(), values.tolist(), strict=True)
        return {self.labels[index]: round(value, 6) for index, value in top}

    def make_arrays(self, output: tuple[torch.Tensor, ...]) -> Arrays:
        """Return the probabilities of all labels, and the most probable one."""
        logits, _, indices = output
        probabilities = torch.softmax(logits, dim=0)
        return {"probabilities": probabilities, "label": [str(self.labels[int(indices[0])])]}

    def describe(self, inputs: Sequence[Tensors], outputs: Sequence[Any]) -> list[Observation]:
        """Return the image's features, the label with its probability, and the logits."""
        images = measure_images(torch.stack([pixels for (pixels,) in inputs])).numpy()
        logits = _stack_logits(outputs)
        columns = (
            images.astype(np.float64).round(6).tolist(),
            *(column.tolist() for column in find_best(logits)),
            fold_logits(logits).tolist(),
        )
        return [
            Observation(
                features=dict(zip(IMAGE_FEATURES, numbers, strict=True)),
                prediction=str(self.labels[best]),
                confidence=confidence,
                embedding=embedding,
            )
            for numbers, best, confidence, embedding in zip(*columns, strict=True)
        ]

    def score(self, outputs: Sequence[Any], kind: str) -> list[float]:
        """Return how far each image is from what the model learnt, by its logits."""
        scores: list[float] = score_logits(_stack_logits(outputs), kind).tolist()
        return scores

    def explain(self, request: InferenceRequest, inputs: Sequence[Tensors]) -> InferenceResponse:
        """Answer how much each pixel speaks for a label."""
        found = [self._explain_image(request, pixels) for (pixels,) in inputs]
        picture = draw_answer(request, found[0], self.image_limits)
        return picture or write_explanations(self.write, request, found)

    def _explain_image(self, request: InferenceRequest, pixels: torch.Tensor) -> Explanation:
        """Explain a logit: probabilities hardly move where the model is sure."""
        options = self.explainer.read_options(request)
        image = scale_pixels(pixels[None].to(self.backend.device))
        with torch.inference_mode():
            predicted = int(self.backend.run(image)[0].argmax())
        target = find_target(options.target, self.labels, predicted)
        window = choose_windows(image.shape[2:], self.explainer.most_windows)
        values, delta = self.explainer.attribute(
            options.method, (image,), target, windows=[(image.shape[1], *window)]
        )
        return Explanation(
            method=options.method,
            target=self.labels[target],
            prediction=self.labels[predicted],
            attributions={"attributions": values[0][0].sum(0)},
            delta=delta,
        )


def _stack_logits(outputs: Sequence[tuple[torch.Tensor, ...]]) -> np.ndarray[Any, Any]:
    return torch.stack([output[0] for output in outputs]).float().numpy()
