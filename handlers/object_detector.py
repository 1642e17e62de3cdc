"""Object detector: the bytes of an image in, labelled boxes out.

In: images, as image_classifier takes them.
Out: JSON, [{"label": "cat", "score": 0.98, "box": [x1, y1, x2, y2]}, ...], the highest score first,
in pixels of the client's upright image; as npy the boxes alone; as v2 boxes, scores and labels.
At /explanations: how much each pixel speaks for one of these, by `target` its place in the list;
as image/png a heat map.

Settings, under `handler:` in model-config.yaml, and batch_handler's:
  image_size        [height, width] that images are resized to; without it they stay as they are
  letterbox         resize with the sides' ratio kept and grey bars around; default false
  takes             batch: (N, 3, H, W) in, boxes (N, A, 4) and scores (N, A, classes) out
                    list: torchvision's, a list of (3, H, W) in, a list of boxes, labels, scores out
                    image: the same for one (3, H, W), as torchvision's ONNX files are
                    default: batch with image_size; without it image for backend onnx, else list
  box_format        of `batch`: xyxy, xywh or cxcywh; default xyxy
  box_units         of `batch`: pixels of the model's input, or relative (0 to 1); default pixels
  background        whether class 0 is the background, as torchvision's; default true
  score_threshold   default 0.5
  iou_threshold     of boxes of one class that overlap by more the best stays; default of batch
                    0.5, of list and image 1 (none goes: the model has seen to it)
  max_detections    default 100
  max_pixels        of an image
  explain_method, explain_steps     see attribution
classes.json lists the labels in the model's order, the background among them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from attribution import Explainer, Explanation, choose_windows, find_place, write_explanations
from batch_handler import BatchHandler
from boxes import FORMATS, measure_presence, suppress, to_corners
from collation import Tensors
from heat_map import draw_answer
from image_input import ImageLimits, read_image, scale_pixels
from inference_request import InferenceRequest, Part
from inference_response import Arrays, InferenceResponse
from letterbox import cut_frame, fit_image, restore_boxes
from prediction_log import Observation
from problem import RejectedInput
from vision_operators import define_missing

__all__ = ["ObjectDetector"]

Detections = dict[str, torch.Tensor]
"""boxes (n, 4), scores (n) and labels (n) of one image; indices (n) of those that are told."""

WARM_UP_SIZE = (320, 320)
CANDIDATES = 5000
"""Boxes of one image that are compared with one another; the time grows with the square."""
FAINT = 0.01
"""The least score that an explanation follows."""


class ObjectDetector(BatchHandler):
    """Finds objects with a model that takes float32 in [0, 1]; see the module."""

    def initialize(self, context: Any) -> None:
        """Load the model; a file of torchvision's needs its operators first."""
        define_missing()
        super().initialize(context)

    def configure(self) -> None:
        """Read settings and labels, and try the model once."""
        settings = self.settings
        size = settings.get("image_size")
        self.image_size = None if size is None else (int(size[0]), int(size[1]))
        usual = "image" if self.backend.name in ("onnx", "openvino") else "list"
        self.takes = str(settings.get("takes", usual if size is None else "batch"))
        _check_choice("takes", self.takes, ("batch", "list", "image"))
        self.box_format = str(settings.get("box_format", "xyxy"))
        _check_choice("box_format", self.box_format, FORMATS)
        self.box_units = str(settings.get("box_units", "pixels"))
        _check_choice("box_units", self.box_units, ("pixels", "relative"))
        self.score_threshold = float(settings.get("score_threshold", 0.5))
        self.iou_threshold = float(
            settings.get("iou_threshold", 0.5 if self.takes == "batch" else 1)
        )
        self.max_detections = int(settings.get("max_detections", 100))
        self.background = bool(settings.get("background", True))
        self.labels = json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))
        self.image_limits = ImageLimits(
            max_bytes=self.limits.max_bytes,
            max_pixels=int(settings.get("max_pixels", ImageLimits.max_pixels)),
        )
        self.detect = self._adapt(self.backend.run, self.score_threshold)
        module = self.backend.module
        self.explainer = Explainer(
            replace(
                self.backend,
                run=self._adapt(self.backend.run, FAINT),
                module=None if module is None else self._adapt(module, FAINT),
            ),
            settings,
            batch=self.max_batch,
        )
        # torchvision's scripted models say so each time anew: (losses, detections).
        warnings.filterwarnings("ignore", ".*tuple in scripting")
        with torch.inference_mode():
            self.infer(*(item[None].to(self.backend.device) for item in self.make_example()))

    def make_example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a black image."""
        size = self.image_size or WARM_UP_SIZE
        return self.make_tensor(torch.zeros(*size, 3, dtype=torch.uint8))

    def decode(self, part: Part) -> torch.Tensor:
        """Decode an image: (H, W, 3) uint8."""
        return read_image(part.read_bytes(), self.image_limits)

    def make_tensor(self, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's input, (3, H, W) uint8, and the frame that leads back from it."""
        size = self.image_size or (decoded.shape[0], decoded.shape[1])
        return fit_image(decoded, size, keep_ratio=bool(self.settings.get("letterbox")))

    def infer(self, *batch: torch.Tensor) -> list[Detections]:
        """Return the detections of each image, in its client's pixels, the highest score first."""
        pixels, frames = batch
        pairs = zip(self.detect(scale_pixels(pixels)), frames.cpu(), strict=True)
        return [self._choose(detections, frame) for detections, frame in pairs]

    def make_answer(self, output: Detections) -> list[dict[str, Any]]:
        """Return the detections, the highest score first."""
        columns = (output["boxes"].tolist(), output["scores"].tolist(), self._name_labels(output))
        return [
            {
                "label": label,
                "score": round(score, 6),
                "box": [round(value, 2) for value in box],
            }
            for box, score, label in zip(*columns, strict=True)
        ]

    def make_arrays(self, output: Detections) -> Arrays:
        """Return boxes, scores and labels."""
        labels = np.array(self._name_labels(output), dtype=np.str_)
        return {"boxes": output["boxes"], "scores": output["scores"], "labels": labels}

    def describe(self, inputs: Sequence[Tensors], outputs: Sequence[Any]) -> list[Observation]:
        """Return how many boxes were found and how sure they are; the surest one's label."""
        return [self._observe(output) for output in outputs]

    def _observe(self, output: Detections) -> Observation:
        scores = output["scores"].tolist()
        if not scores:
            return Observation(features={"boxes": 0.0}, prediction="nothing")
        return Observation(
            features={"boxes": float(len(scores)), "confidence": sum(scores) / len(scores)},
            prediction=self._name_labels(output)[0],
            confidence=scores[0],
        )

    def explain(self, request: InferenceRequest, inputs: Sequence[Tensors]) -> InferenceResponse:
        """Answer how much each pixel speaks for one detection."""
        found = [self._explain_image(request, *tensors) for tensors in inputs]
        picture = draw_answer(request, found[0], self.image_limits)
        return picture or write_explanations(self.write, request, found)

    def _explain_image(
        self, request: InferenceRequest, pixels: torch.Tensor, frame: torch.Tensor
    ) -> Explanation:
        options = self.explainer.read_options(request)
        images = scale_pixels(pixels[None].to(self.backend.device))
        with torch.inference_mode():
            (found,) = self.detect(images)
        told = self._choose(found, frame)
        answer = self.make_answer(told)
        if not answer:
            raise RejectedInput(422, "expected an image with something to explain, found nothing")
        target = find_place(options.target, (len(answer),), 0)
        place = int(told["indices"][target])
        box, label = found["boxes"][place].clone(), found["labels"][place].clone()

        def pick(detections: Sequence[Detections]) -> torch.Tensor:
            same = [item["labels"] == label for item in detections]
            presence = [
                measure_presence(item["boxes"][chosen], item["scores"][chosen], box)
                for item, chosen in zip(detections, same, strict=True)
            ]
            return torch.stack(presence)[:, None]

        window = choose_windows(images.shape[2:], self.explainer.most_windows)
        values, delta = self.explainer.attribute(
            options.method, (images,), 0, pick=pick, windows=[(images.shape[1], *window)]
        )
        return Explanation(
            method=options.method,
            target=target,
            prediction=answer[target],
            attributions={"attributions": cut_frame(values[0][0].sum(0), frame)},
            delta=delta,
        )

    def _adapt(
        self, run: Callable[..., Any], threshold: float
    ) -> Callable[[torch.Tensor], list[Detections]]:
        """Return a model as a function of images (N, 3, H, W), whatever it takes and gives."""

        def detect(images: torch.Tensor) -> list[Detections]:
            if self.takes == "batch":
                return self._split(run(images), images.shape, threshold)
            if self.takes == "list":
                return _find_list(run(list(images)), len(images))
            return [_name_outputs(run(image)) for image in images]

        return detect

    def _split(self, outputs: Any, shape: Sequence[int], threshold: float) -> list[Detections]:
        """Take a batch of raw boxes and scores apart: an entry for each box and class."""
        columns = _name_outputs(outputs)
        boxes = to_corners(columns["boxes"].float(), self.box_format)
        if self.box_units == "relative":
            boxes = boxes * boxes.new_tensor([shape[3], shape[2]] * 2)
        if "labels" in columns:
            names = ("scores", "labels")
            return [
                {"boxes": boxes[i], **{name: columns[name][i] for name in names}}
                for i in range(shape[0])
            ]
        scores = columns["scores"].float()
        if scores.shape != (*boxes.shape[:2], len(self.labels)):
            raise ValueError(
                f"expected scores {(*boxes.shape[:2], len(self.labels))} for "
                f"{len(self.labels)} labels in classes.json, found {tuple(scores.shape)}; "
                "pack the model with its own classes"
            )
        found = []
        for i in range(shape[0]):
            place, label = (scores[i] > threshold).nonzero(as_tuple=True)
            found.append(
                {"boxes": boxes[i][place], "scores": scores[i][place, label], "labels": label}
            )
        return found

    def _choose(self, found: Detections, frame: torch.Tensor) -> Detections:
        """Return what is good enough to be told, in the client's pixels."""
        boxes, scores, labels = (found[name].cpu() for name in ("boxes", "scores", "labels"))
        boxes, scores = restore_boxes(boxes.float(), frame), scores.float()
        wanted = scores > self.score_threshold
        wanted &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # what lies outside the image is empty
        if self.background:
            wanted &= labels != 0
        chosen = wanted.nonzero()[:, 0]
        order = scores[chosen].argsort(descending=True, stable=True)[:CANDIDATES]
        chosen = chosen[order]
        if self.iou_threshold < 1:
            kept = suppress(boxes[chosen], scores[chosen], self.iou_threshold, labels[chosen])
            chosen = chosen[kept]
        chosen = chosen[: self.max_detections]
        return {
            "boxes": boxes[chosen],
            "scores": scores[chosen],
            "labels": labels[chosen],
            "indices": chosen,
        }

    def _name_labels(self, output: Detections) -> list[str]:
        indices = output["labels"].tolist()
        if indices and max(indices) >= len(self.labels):
            raise ValueError(
                f"expected labels below {len(self.labels)}, as many as classes.json holds, "
                f"found {max(indices)}; pack the model with its own classes"
            )
        return [str(self.labels[index]) for index in indices]


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected handler.{key} to be one of {choices}, found {value!r}")


def _find_list(outputs: Any, count: int) -> list[Detections]:
    """Return one mapping an image; a scripted torchvision model gives (losses, detections)."""
    if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], list):
        outputs = outputs[1]
    if not isinstance(outputs, list) or len(outputs) != count:
        raise ValueError(f"expected a list of {count} detections, found {type(outputs).__name__}")
    return [_name_outputs(item) for item in outputs]


def _name_outputs(outputs: Any) -> Detections:
    """Name a model's outputs: in order boxes and scores; whole numbers are labels."""
    named: Detections = {}
    if isinstance(outputs, Mapping):
        named = {name: outputs[name] for name in ("boxes", "scores", "labels") if name in outputs}
    else:
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            is_label = not output.is_floating_point()
            named["labels" if is_label else "scores" if "boxes" in named else "boxes"] = output
    if not {"boxes", "scores"} <= set(named):
        raise ValueError(f"expected boxes and scores from the model, found {sorted(named)}")
    return named
