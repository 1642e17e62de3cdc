"""torchvision, importable beside a torch that was built without CUDA.

torchvision's wheels link their native operators against CUDA's torch libraries. Beside a CPU torch
those libraries are absent, `torchvision::nms` is never registered, and `import torchvision` itself
fails when it describes that operator. Declaring the two operators' schemas first lets everything in
Python work: transforms, data sets, models. What stays missing there is native: nms, decode_jpeg.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import library

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def has_native_operators() -> bool:
    """Return whether torchvision's own operators load into this torch; loads them if so."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for extension in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


if not has_native_operators():
    for _name, _schema in _SCHEMAS.items():
        # handlers/vision_operators.py may have been here before, in the same process.
        if not hasattr(torch.ops.torchvision, _name):
            library.define(f"torchvision::{_name}", _schema)

# The schemas have to come first.
from torchvision import datasets, models  # noqa: E402
from torchvision.transforms import v2 as transforms  # noqa: E402

__all__ = ["datasets", "has_native_operators", "models", "transforms"]
