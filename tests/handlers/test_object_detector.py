from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

Import = Callable[[str], Any]

LABELS = ["nothing", "cat", "dog"]
KEYS = ("labels", "scores", "boxes")


class Raw(nn.Module):
    """Gives the same boxes (A, 4) and scores (A, classes) for every image of a batch."""

    def __init__(self, boxes: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.boxes = nn.Buffer(torch.tensor(boxes).float())
        self.scores = nn.Buffer(torch.tensor(scores).float())

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = images.shape[0]
        return self.boxes.expand(count, -1, -1), self.scores.expand(count, -1, -1)


class Finder(nn.Module):
    """Gives the box around all bright pixels of an image, as a cat."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bright = images.amin(1) > 0.7
        columns, rows = bright.any(1).float(), bright.any(2).float()
        start = torch.stack([columns.argmax(1), rows.argmax(1)], 1)
        after = torch.stack([columns.flip(1).argmax(1), rows.flip(1).argmax(1)], 1)
        size = torch.tensor([images.shape[3], images.shape[2]])
        boxes = torch.cat([start, size - after], 1).float()
        return boxes[:, None], torch.tensor([0.0, 0.9, 0.0]).expand(len(images), 1, 3)


class ListFinder(nn.Module):
    """The same as torchvision's detectors have it when they are scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.finder = Finder()

    def forward(
        self, images: list[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        losses: dict[str, torch.Tensor] = {}
        found: list[dict[str, torch.Tensor]] = []
        for image in images:
            if image.mean() > 0.9:
                raise ValueError("too bright")
            boxes, scores = self.finder(image[None])
            found.append(
                {"boxes": boxes[0], "labels": torch.tensor([1]), "scores": scores[0, :, 1]}
            )
        return losses, found


@pytest.fixture
def detect(
    handlers: Import, start: Callable[..., Any], tmp_path: Path
) -> Callable[..., Callable[..., Any]]:
    """Return a function that starts a detector; that is a function of images' bytes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/classes.json").write_text(json.dumps(LABELS))

    def start_detector(network: nn.Module, **settings: Any) -> Any:
        kind = handlers("object_detector").ObjectDetector
        return start(kind, network, warm_up=False, **settings)

    return start_detector


def draw(size: tuple[int, int], box: tuple[int, int, int, int], **saved: Any) -> bytes:
    """Draw a white box on black."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **saved)
    return buffer.getvalue()


def ask(handler: Any, *incoming: Any) -> Any:
    """Answer one request, or a batch; a JSON body parsed."""
    responses = handler.answer(incoming)
    for response in responses:
        if "json" in response.content_type:
            response.body = json.loads(response.body)
    return responses if len(incoming) > 1 else responses[0]


# Suppression.


def suppress_one_by_one(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """Do what torchvision's nms_kernel.cpp does, in its order and its precision."""
    x1, y1, x2, y2 = boxes.numpy().T
    areas = (x2 - x1) * (y2 - y1)
    kept: list[int] = []
    for i in scores.sort(stable=True, descending=True).indices.tolist():
        width = np.maximum(np.float32(0), np.minimum(x2[i], x2[kept]) - np.maximum(x1[i], x1[kept]))
        height = np.maximum(
            np.float32(0), np.minimum(y2[i], y2[kept]) - np.maximum(y1[i], y1[kept])
        )
        with np.errstate(invalid="ignore"):  # two empty boxes: 0 / 0
            overlap = width * height / (areas[kept] + areas[i] - width * height)
        if not (overlap.astype(np.float64) > threshold).any():
            kept.append(i)
    return kept


def make_boxes(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make boxes on a grid of quarters, with few different scores, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 60
    size = torch.rand(count, 2, generator=generator) * 30
    scores = torch.randint(0, 40, (count,), generator=generator) / 40
    return (torch.cat([start, start + size], 1) * 4).round() / 4, scores


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 40, 256, 257, 900])
def test_the_boxes_kept_are_exactly_torchvisions(
    handlers: Import, count: int, threshold: float
) -> None:
    for seed in range(20 if count < 300 else 2):
        boxes, scores = make_boxes(count, seed=seed)
        expected = suppress_one_by_one(boxes, scores, threshold)
        assert handlers("boxes").suppress(boxes, scores, threshold).tolist() == expected


def test_the_threshold_is_compared_in_double_precision(handlers: Import) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])  # 3 / 10 as float32 is above 0.3
    scores = torch.tensor([0.9, 0.8])
    assert suppress_one_by_one(boxes, scores, 0.3) == [0]
    assert handlers("boxes").suppress(boxes, scores, 0.3).tolist() == [0]


def test_groups_do_not_suppress_one_another(handlers: Import) -> None:
    boxes, scores = make_boxes(400, seed=5)
    groups = torch.arange(400) % 3
    kept = handlers("boxes").suppress(boxes, scores, 0.3, groups).tolist()
    expected = []
    for group in range(3):
        (places,) = (groups == group).nonzero(as_tuple=True)
        own = suppress_one_by_one(boxes[places], scores[places], 0.3)
        expected += places[own].tolist()
    assert sorted(kept) == sorted(expected)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)


def test_a_long_chain_is_settled_box_by_box(handlers: Import) -> None:
    # Each box covers the next alone, so that every second one stays.
    start = torch.arange(300.0)
    boxes = torch.stack([start, 0 * start, start + 2, 0 * start + 1], 1)
    kept = handlers("boxes").suppress(boxes, -start, 0.3)
    assert kept.tolist() == list(range(0, 300, 2))


@pytest.mark.parametrize(
    ("format", "box"), [("xyxy", [2, 4, 8, 10]), ("xywh", [2, 4, 6, 6]), ("cxcywh", [5, 7, 6, 6])]
)
def test_every_format_becomes_corners(handlers: Import, format: str, box: list[float]) -> None:
    corners = handlers("boxes").to_corners(torch.tensor([[box]]).float(), format)
    assert corners.tolist() == [[[2, 4, 8, 10]]]


# Torchvision's operators.


def align_point_by_point(
    features: torch.Tensor, regions: torch.Tensor, scale: float, ratio: int, *, aligned: bool
) -> torch.Tensor:
    """Do what torchvision's roi_align_kernel.cpp does, for bins of 2 by 3."""
    height, width = features.shape[2:]
    pooled = torch.zeros(len(regions), features.shape[1], 2, 3)
    for k, (image, *corners) in enumerate(regions.tolist()):
        x1, y1, x2, y2 = (value * scale - 0.5 * aligned for value in corners)
        least = -math.inf if aligned else 1.0
        bins = max(y2 - y1, least) / 2, max(x2 - x1, least) / 3
        counts = [ratio if ratio > 0 else math.ceil(size) for size in bins]
        for p, q, i, j in np.ndindex(2, 3, *counts):
            y = y1 + p * bins[0] + (i + 0.5) * bins[0] / counts[0]
            x = x1 + q * bins[1] + (j + 0.5) * bins[1] / counts[1]
            if -1 <= y <= height and -1 <= x <= width:
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                for row, column in np.ndindex(2, 2):
                    at = min(int(y) + row, height - 1), min(int(x) + column, width - 1)
                    weight = abs(1 - row - y % 1) * abs(1 - column - x % 1)
                    pooled[k, :, p, q] += weight * features[int(image), :, at[0], at[1]]
        pooled[k] /= max(1, math.prod(counts))
    return pooled


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [2, 3, 0, -1])
def test_regions_are_sampled_as_torchvision_samples_them(
    handlers: Import, ratio: int, aligned: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.rand(2, 4, 6, 9, generator=generator)
    start = torch.rand(12, 2, generator=generator) * 60 - 20  # some begin outside, some end there
    images = torch.arange(12)[:, None] % 2
    size = torch.rand(12, 2, generator=generator) * 40
    regions = torch.cat([images, start, start + size], 1)
    found = handlers("vision_operators").align_regions(features, regions, 0.2, 2, 3, ratio, aligned)
    expected = align_point_by_point(features, regions, 0.2, ratio, aligned=aligned)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_operators_are_defined_once_and_callable_by_torchvisions_names(handlers: Import) -> None:
    operators = handlers("vision_operators")
    operators.define_missing()
    assert operators.define_missing() == ()
    boxes, scores = make_boxes(50, seed=1)
    kept = torch.ops.torchvision.nms(boxes, scores, 0.4)
    assert kept.tolist() == suppress_one_by_one(boxes, scores, 0.4)


def test_no_operator_that_is_there_is_replaced(root: Path) -> None:
    code = (
        "import torch; from torch import library\n"
        "library.define('torchvision::nms', '(Tensor d, Tensor s, float t) -> Tensor')\n"
        "library.impl('torchvision::nms', 'cpu', lambda d, s, t: s + t)\n"
        "import vision_operators; print(vision_operators.define_missing())\n"
        "print(torch.ops.torchvision.nms(torch.ones(1, 4), torch.ones(1), 5.0).item())\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "handlers", capture_output=True, text=True
    )
    assert told.stdout.split() == ["('torchvision::nms',", "'torchvision::roi_align')", "6.0"]


# Where the boxes are.


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (300, 100), (90, 400), (32, 32), (7, 200)])
def test_a_box_comes_back_in_the_clients_pixels(
    detect: Callable[..., Any], post: Callable[..., Any], size: tuple[int, int], letterbox: bool
) -> None:
    width, height = size
    box = (width // 4, height // 2, width // 4 + max(2, width // 2), height // 2 + height // 4)
    handler = detect(Finder(), image_size=[64, 64], letterbox=letterbox)
    (found,) = ask(handler, post(draw(size, box))).body
    pixel = max(size) / 64 if letterbox else np.array([width, height] * 2) / 64
    assert found["label"] == "cat"
    assert (np.abs(np.array(found["box"]) - box) <= np.maximum(pixel, 1)).all()


@pytest.mark.parametrize("size", [(64, 48), (300, 100), (5, 9)])
def test_models_of_any_size_take_an_image_as_it_is(
    detect: Callable[..., Any], post: Callable[..., Any], size: tuple[int, int]
) -> None:
    box = (1, 2, 4, 7)
    (found,) = ask(detect(ListFinder()), post(draw(size, box))).body
    assert found == {"label": "cat", "score": 0.9, "box": [1.0, 2.0, 4.0, 7.0]}


def test_a_box_lies_in_the_upright_image(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its left side: 20 wide and 40 high when upright
    png = draw((40, 20), (0, 0, 10, 5), exif=exif)
    (found,) = ask(detect(ListFinder()), post(png)).body
    assert found["box"] == [15, 0, 20, 10]


def test_boxes_end_at_the_images_edges(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    boxes = [[-5, -5, 20, 20], [70, 10, 90, 20], [10, 10, 900, 900]]
    handler = detect(Raw(boxes, [[0, 0.9, 0]] * 3), image_size=[64, 64], letterbox=True)
    found = [item["box"] for item in ask(handler, post(draw((64, 32), (0, 0, 1, 1)))).body]
    assert found == [[0, 0, 20, 4], [10, 0, 64, 32]]


@pytest.mark.parametrize(
    ("given", "box"),
    [
        ({"box_format": "xyxy"}, [8, 16, 24, 48]),
        ({"box_format": "xywh"}, [8, 16, 16, 32]),
        ({"box_format": "cxcywh"}, [16, 32, 16, 32]),
        ({"box_format": "cxcywh", "box_units": "relative"}, [0.25, 0.5, 0.25, 0.5]),
    ],
)
def test_every_form_of_boxes_is_told_as_corners(
    detect: Callable[..., Any], post: Callable[..., Any], given: dict[str, str], box: list[float]
) -> None:
    handler = detect(Raw([box], [[0, 0, 0.9]]), image_size=[64, 64], **given)
    (found,) = ask(handler, post(draw((128, 64), (0, 0, 1, 1)))).body
    assert found == {"label": "dog", "score": 0.9, "box": [16, 16, 48, 48]}


# Which boxes are told.

ROWS = [[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [50, 50, 60, 60]]
SCORES = [[0.1, 0.6, 0.7], [0.0, 0.8, 0.1], [0.99, 0.55, 0.2], [0.3, 0.3, 0.4]]


def find(handler: Any, incoming: Any) -> list[tuple[str, float]]:
    return [(item["label"], item["score"]) for item in ask(handler, incoming).body]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [("cat", 0.8), ("dog", 0.7), ("cat", 0.55)]),
        ({"iou_threshold": 1}, [("cat", 0.8), ("dog", 0.7), ("cat", 0.6), ("cat", 0.55)]),
        ({"iou_threshold": 0.9}, [("cat", 0.8), ("dog", 0.7), ("cat", 0.6), ("cat", 0.55)]),
        ({"score_threshold": 0.65}, [("cat", 0.8), ("dog", 0.7)]),
        ({"score_threshold": 0.8}, []),
        ({"max_detections": 1}, [("cat", 0.8)]),
        ({"background": False}, [("nothing", 0.99), ("cat", 0.8), ("dog", 0.7), ("cat", 0.55)]),
    ],
)
def test_the_best_box_of_each_thing_is_told_best_first(
    detect: Callable[..., Any],
    post: Callable[..., Any],
    given: dict[str, Any],
    expected: list[tuple[str, float]],
) -> None:
    handler = detect(Raw(ROWS, SCORES), image_size=[64, 64], **given)
    found = find(handler, post(draw((64, 64), (0, 0, 1, 1))))
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_a_batch_is_answered_as_its_images_are_alone(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    for handler in (detect(Finder(), image_size=[64, 64]), detect(ListFinder())):
        images = [draw((60 + n, 50), (n, 10, 20 + n, 30)) for n in (0, 5, 5, 9)]
        together = ask(handler, *(post(image) for image in images))
        assert [item.body for item in together] == [ask(handler, post(i)).body for i in images]


def test_an_image_that_makes_inference_fail_fails_alone(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = detect(ListFinder())
    good, bad = draw((20, 20), (2, 2, 9, 9)), draw((20, 20), (0, 0, 20, 20))
    answers = ask(handler, *(post(image) for image in (good, bad, good, b"no image", bad, good)))
    assert [answer.status for answer in answers] == [200, 500, 200, 415, 500, 200]
    assert [answers[i].body[0]["box"] for i in (0, 2, 5)] == [[2, 2, 9, 9]] * 3


# Forms of answers.


def test_npy_holds_boxes_and_v2_all_three(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler, image = detect(Raw(ROWS, SCORES), image_size=[64, 64]), draw((64, 64), (0, 0, 1, 1))
    boxes = np.load(io.BytesIO(ask(handler, post(image, accept="application/x-npy")).body))
    assert boxes.tolist() == [[1, 0, 11, 10], [0, 0, 10, 10], [30, 30, 40, 40]]
    data = [base64.b64encode(image).decode()]
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": data}
    outputs = ask(handler, post({"inputs": [tensor]})).body["outputs"]
    shown = {item["name"]: (item["datatype"], item["shape"]) for item in outputs}
    assert shown == {
        "boxes": ("FP32", [1, 3, 4]),
        "scores": ("FP32", [1, 3]),
        "labels": ("BYTES", [1, 3]),
    }
    assert outputs[2]["data"] == ["cat", "dog", "cat"]


def test_nothing_found_is_an_empty_list_and_empty_arrays(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = detect(Raw(ROWS, SCORES), image_size=[64, 64], score_threshold=0.995)
    image = draw((64, 64), (0, 0, 1, 1))
    assert ask(handler, post(image)).body == []
    boxes = np.load(io.BytesIO(ask(handler, post(image, accept="application/x-npy")).body))
    assert boxes.shape == (0, 4)
    data = [base64.b64encode(image).decode()]
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": data}
    outputs = ask(handler, post({"inputs": [tensor]})).body["outputs"]
    assert [(item["datatype"], item["data"]) for item in outputs][2] == ("BYTES", [])


def test_explanations_of_boxes_are_refused(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    answer = ask(detect(ListFinder()), post(draw((9, 9), (1, 1, 3, 3)), explain=True))
    assert answer.status == 501


# What stops the worker, with a reason.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"takes": "array"}, "handler.takes"),
        ({"box_format": "yolo"}, "handler.box_format"),
        ({"box_units": "inches"}, "handler.box_units"),
    ],
)
def test_a_setting_that_means_nothing_stops_the_worker(
    detect: Callable[..., Any], given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        detect(Finder(), image_size=[64, 64], **given)


def test_a_model_of_other_classes_stops_the_worker(detect: Callable[..., Any]) -> None:
    network = Raw([[0, 0, 1, 1]], [[0.1, 0.2, 0.3, 0.4]])
    with pytest.raises(ValueError, match=r"expected scores \(1, 1, 3\) for 3 labels"):
        detect(network, image_size=[64, 64])


def test_a_model_that_gives_no_boxes_stops_the_worker(detect: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="expected boxes and scores"):
        detect(nn.Flatten(), image_size=[64, 64])


# Explanations.


class Glow(nn.Module):
    """Sees a cat in the left half and a dog in the right, as surely as the half is bright."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count, _, height, width = images.shape
        middle = width // 2
        boxes = torch.tensor([[0, 0, middle, height], [middle, 0, width, height]]).float()
        cat = images[..., :middle].mean((1, 2, 3))
        dog = images[..., middle:].mean((1, 2, 3))
        none = torch.zeros_like(cat)
        scores = torch.stack([none, cat, none, none, none, dog], 1).view(count, 2, 3)
        return boxes.expand(count, -1, -1), scores


class Steps(nn.Module):
    """The same of an image in black and white: nothing that a gradient could flow through."""

    def __init__(self) -> None:
        super().__init__()
        self.glow = Glow()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.glow(images.gt(0.5).float())


class ListGlow(nn.Module):
    """The same in torchvision's form."""

    def __init__(self) -> None:
        super().__init__()
        self.glow = Glow()

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found: list[dict[str, torch.Tensor]] = []
        for image in images:
            boxes, scores = self.glow(image[None])
            labels = torch.tensor([1, 2])
            found.append({"boxes": boxes[0], "labels": labels, "scores": scores[0, [0, 1], [1, 2]]})
        return found


FORMS = pytest.mark.parametrize(
    ("network", "given"), [(Glow, {"image_size": [32, 32]}), (ListGlow, {})]
)


def draw_halves(left: int, right: int, size: tuple[int, int] = (32, 32)) -> bytes:
    image = Image.new("RGB", size, (right,) * 3)
    image.paste((left,) * 3, (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def explain_halves(handler: Any, post: Callable[..., Any], **asked: Any) -> Any:
    data = base64.b64encode(draw_halves(204, 153)).decode()
    return ask(handler, post({"data": data, **asked}, explain=True))


@FORMS
@pytest.mark.parametrize("method", ["integrated_gradients", "saliency", "occlusion"])
@pytest.mark.parametrize(("target", "label", "score"), [(0, "cat", 0.8), (1, "dog", 0.6)])
def test_what_speaks_for_a_detection_lies_where_the_model_looks(
    detect: Callable[..., Any],
    post: Callable[..., Any],
    network: type[nn.Module],
    given: dict[str, Any],
    method: str,
    target: int,
    label: str,
    score: float,
) -> None:
    told = explain_halves(detect(network(), **given), post, method=method, target=target).body
    heat = np.array(told["attributions"])
    halves = heat[:, :16], heat[:, 16:]
    assert (told["method"], told["target"], told["prediction"]["label"]) == (method, target, label)
    assert told["prediction"]["score"] == pytest.approx(score, abs=1e-5)
    assert (halves[target] > 0).all()
    inner = halves[1 - target][:, 4:-4]  # occlusion's windows may cross the middle
    assert not inner.any()
    if method == "integrated_gradients":
        assert heat.sum() == pytest.approx(score, abs=0.02)
        assert told["convergence_delta"] == pytest.approx(0, abs=0.02)


@FORMS
def test_the_surest_detection_is_explained_where_none_is_named(
    detect: Callable[..., Any],
    post: Callable[..., Any],
    network: type[nn.Module],
    given: dict[str, Any],
) -> None:
    told = explain_halves(detect(network(), **given), post).body
    assert (told["target"], told["prediction"]["label"]) == (0, "cat")
    assert told["prediction"]["box"] == [0, 0, 16, 32]


def test_an_explanation_covers_the_image_and_not_the_bars_beside_it(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = detect(Glow(), image_size=[32, 32], letterbox=True, score_threshold=0.1)
    png = draw_halves(204, 153, (100, 50))
    asked = {"data": base64.b64encode(png).decode(), "method": "saliency"}
    assert np.array(ask(handler, post(asked, explain=True)).body["attributions"]).shape == (16, 32)
    picture = ask(handler, post(png, explain=True, accept="image/png"))
    assert picture.content_type == "image/png"
    assert Image.open(io.BytesIO(picture.body)).size == (448, 224)
    assert picture.headers == {"x-method": "integrated_gradients", "x-target": "0"}


@pytest.mark.parametrize(("target", "words"), [(2, "a place in"), ("cat", "a place in")])
def test_a_detection_that_is_not_there_is_not_explained(
    detect: Callable[..., Any], post: Callable[..., Any], target: Any, words: str
) -> None:
    answer = explain_halves(detect(Glow(), image_size=[32, 32]), post, target=target)
    assert (answer.status, words in answer.body["detail"]) == (422, True)


def test_where_nothing_is_found_there_is_nothing_to_explain(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = detect(Glow(), image_size=[32, 32], score_threshold=0.9)
    answer = explain_halves(handler, post)
    assert (answer.status, answer.body["detail"][-13:]) == (422, "found nothing")


def test_a_model_without_gradients_is_explained_by_occlusion(
    detect: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = detect(Steps(), image_size=[32, 32])
    refused = explain_halves(handler, post, method="saliency")
    assert (refused.status, "occlusion" in refused.body["detail"]) == (501, True)
    heat = np.array(explain_halves(handler, post, method="occlusion").body["attributions"])
    assert (heat[:, :16] > 0).all()
    assert not heat[:, 20:].any()


# Torchvision's own detectors, with random weights.

BUILD = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
import torch
import vision_operators
vision_operators.define_missing()
import torchvision.extension
from torchvision.models import detection

def _has_ops() -> bool:  # they are there now, by whatever means
    return True

torchvision.extension._has_ops = _has_ops
sys.modules["torchvision.ops.roi_align"]._has_ops = _has_ops
torch.manual_seed(0)
if sys.argv[1] == "ssdlite":
    model = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, detections_per_img=20)
    heads = [layer[-1] for layer in model.head.classification_head.module_list]
else:
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, box_detections_per_img=20)
    heads = [model.rpn.head.cls_logits, model.roi_heads.box_predictor.cls_score]
model.backbone.train()  # so that its layers' outputs are not all but zero
with torch.no_grad():
    for _ in range(8):
        model.backbone(torch.rand(2, 3, 320, 320))
for head in heads:
    torch.nn.init.normal_(head.weight, std=0.5)
model.eval()
torch.jit.script(model).save(sys.argv[1] + ".pt")
if importlib.util.find_spec("onnx"):
    torch.onnx.export(
        model, ([torch.rand(3, 200, 300)],), sys.argv[1] + ".onnx", dynamo=False,
        opset_version=18, input_names=["image"], dynamic_axes={"image": {1: "height", 2: "width"}})
"""


@pytest.fixture(scope="module")
def build(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes NAME.pt and NAME.onnx into a folder, in a process of its own.

    There torchvision is told that its operators are there; that must not stay in this process.
    """
    folder = tmp_path_factory.mktemp("torchvision")

    def build_detector(name: str) -> Path:
        if not (folder / f"{name}.pt").exists():
            (folder / "build.py").write_text(BUILD)
            path = {**os.environ, "PYTHONPATH": str(root / "handlers")}
            subprocess.run([sys.executable, "build.py", name], cwd=folder, env=path, check=True)
        return folder

    return build_detector


@pytest.fixture
def photo() -> bytes:
    rows, columns = np.mgrid[0:180, 0:260]
    waves = [128 + 120 * np.sin(rows / a + columns / b) for a, b in ((9, 14), (21, 5), (6, 30))]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def load_file(handlers: Import, folder: Path, file: Path, backend: str) -> Any:
    """Start a detector of a model file, as a worker does."""
    from ts.context import Context

    shutil.copy(file, folder)
    (folder / "classes.json").write_text(json.dumps(LABELS))
    manifest = {"model": {"modelName": "m", "modelVersion": "1", "serializedFile": file.name}}
    settings = {"backend": backend, "score_threshold": 0.2, "threads": 1}
    config = {"handler": settings}
    handler = handlers("object_detector").ObjectDetector()
    handler.initialize(
        Context("m", str(folder), manifest, 2, None, "0.12.0", model_yaml_config=config)
    )
    return handler


def count_found_again(found: list[dict[str, Any]], others: list[dict[str, Any]]) -> int:
    """Count detections that others hold too; random weights make many all but equal scores."""

    def is_same(item: dict[str, Any], other: dict[str, Any]) -> bool:
        return (
            item["label"] == other["label"]
            and item["score"] == pytest.approx(other["score"], abs=1e-3)
            and item["box"] == pytest.approx(other["box"], abs=0.5)
        )

    return sum(any(is_same(item, other) for other in others) for item in found)


NAMES = pytest.mark.parametrize(
    "name", ["ssdlite", pytest.param("faster_rcnn", marks=pytest.mark.slow)]
)


@NAMES
def test_torchvisions_detectors_run_as_torchscript(
    handlers: Import,
    post: Callable[..., Any],
    build: Callable[[str], Path],
    tmp_path: Path,
    photo: bytes,
    name: str,
) -> None:
    file = build(name) / f"{name}.pt"
    found = ask(load_file(handlers, tmp_path, file, "torchscript"), post(photo)).body
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(photo)))).permute(2, 0, 1)
    _, (plain,) = torch.jit.load(file).eval()([pixels.float() * (1 / 255)])
    expected = [
        {"label": LABELS[label], "score": score, "box": box}
        for label, score, box in zip(*(plain[key].tolist() for key in KEYS), strict=True)
    ]
    scores = [item["score"] for item in found]
    assert len(found) > 10
    assert scores == sorted(scores, reverse=True)
    assert count_found_again(found, expected) > 0.8 * len(found)


@NAMES
def test_torchvisions_detectors_answer_alike_as_onnx(
    handlers: Import,
    post: Callable[..., Any],
    build: Callable[[str], Path],
    tmp_path: Path,
    photo: bytes,
    name: str,
) -> None:
    pytest.importorskip("onnx", reason="exports ONNX: pip install onnx")
    pytest.importorskip("onnxruntime", reason="runs ONNX: pip install onnxruntime")
    folder = build(name)
    found, others = (
        ask(load_file(handlers, tmp_path, folder / f"{name}.{suffix}", backend), post(photo)).body
        for suffix, backend in (("onnx", "onnx"), ("pt", "torchscript"))
    )
    assert len(found) > 10
    assert count_found_again(found, others) > 0.8 * len(found)


@NAMES
def test_gradients_reach_the_pixels_through_torchvisions_detectors(
    handlers: Import,
    post: Callable[..., Any],
    build: Callable[[str], Path],
    tmp_path: Path,
    photo: bytes,
    name: str,
) -> None:
    handler = load_file(handlers, tmp_path, build(name) / f"{name}.pt", "torchscript")
    asked = {"data": base64.b64encode(photo).decode(), "method": "saliency"}
    answer = ask(handler, post(asked, explain=True))
    assert answer.status == 200, answer.body
    heat = np.array(answer.body["attributions"])
    assert heat.shape == (180, 260)
    assert np.count_nonzero(heat) > 1000
