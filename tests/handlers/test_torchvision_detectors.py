"""torchvision's own detectors, with random weights."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

Import = Callable[[str], Any]

LABELS = ["nothing", "cat", "dog"]
KEYS = ("labels", "scores", "boxes")

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


def find(handler: Any, incoming: Any) -> Any:
    (answer,) = handler.answer([incoming])
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


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
    found = find(load_file(handlers, tmp_path, file, "torchscript"), post(photo))
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
        find(load_file(handlers, tmp_path, folder / f"{name}.{suffix}", backend), post(photo))
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
    heat = np.array(find(handler, post(asked, explain=True))["attributions"])
    assert heat.shape == (180, 260)
    assert np.count_nonzero(heat) > 1000
