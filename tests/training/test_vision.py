from __future__ import annotations

import importlib

import torch

from marwright.training.vision import has_native_operators, transforms


def test_transforms_work_beside_this_torch() -> None:
    resized = transforms.Resize([4, 6])(torch.zeros(3, 8, 8))
    assert resized.shape == (3, 4, 6)


def test_the_operator_that_torchvision_describes_is_known() -> None:
    assert hasattr(torch.ops.torchvision, "nms")
    assert isinstance(has_native_operators(), bool)


def test_torchvision_itself_imports_afterwards() -> None:
    assert importlib.import_module("torchvision").__version__
