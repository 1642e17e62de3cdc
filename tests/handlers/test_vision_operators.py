from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Import = Callable[[str], Any]


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
    boxes = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)).sort().values
    scores = torch.arange(50) / 50
    kept = torch.ops.torchvision.nms(boxes, scores, 0.4)
    assert 0 < len(kept) < 50
    assert torch.equal(kept, handlers("boxes").suppress(boxes, scores, 0.4))


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
