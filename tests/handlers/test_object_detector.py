from __future__ import annotations

import base64
import io
import json
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


def test_the_prediction_log_has_how_many_boxes_there_are_and_the_surest_ones_label(
    detect: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    log = {"folder": str(tmp_path / "log"), "share": 100, "score": "energy"}
    image = post(draw((64, 64), (0, 0, 1, 1)))
    for threshold in (0.65, 0.8):
        handler = detect(
            Raw(ROWS, SCORES),
            image_size=[64, 64],
            score_threshold=threshold,
            prediction_log=log,
        )
        handler.answer([image])
        handler.prediction_log.close()
    found, nothing = (
        json.loads(path.read_text()) for path in sorted((tmp_path / "log/spool").iterdir())
    )
    assert found["features"] == {"boxes": 2, "confidence": pytest.approx(0.75)}
    assert (found["prediction"], found["confidence"]) == ("cat", pytest.approx(0.8))
    assert (nothing["features"], nothing["prediction"]) == ({"boxes": 0}, "nothing")
    assert "score" not in found


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
