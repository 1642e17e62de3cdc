from __future__ import annotations

import torch
from torch import nn

from marwright.training.attribution import attribute_classes


def make_linear(weights: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weights)
    return nn.Sequential(nn.Flatten(), layer)


def test_of_a_linear_model_each_input_speaks_by_its_weight() -> None:
    weights = torch.tensor([[2.0, -1.0, 0.5], [-2.0, 1.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0, 1.0], [3.0, 1.0, 2.0], [-1.0, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    found, means = attribute_classes(make_linear(weights), rows, labels, 2)
    torch.testing.assert_close(means, torch.stack([rows[:2].mean(0), rows[2]]))
    torch.testing.assert_close(found, weights * means, rtol=1e-4, atol=1e-5)


def test_only_items_that_were_recognised_count() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = torch.tensor([[2.0, 1.0], [0.0, 9.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])  # the second and the third are mistakes
    found, means = attribute_classes(make_linear(weights), rows, labels, 3)
    assert means.tolist() == [[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(found[0], torch.tensor([2.0, 0.0]))
    assert not found[1:].any()


def test_of_images_there_is_one_value_a_pixel() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    weights = torch.ones(2, 60)
    weights[1] = -1
    found, means = attribute_classes(
        make_linear(weights), images, torch.zeros(6, dtype=torch.int64), 2
    )
    assert found.shape == (2, 4, 5)
    assert means.shape == (2, 3, 4, 5)
    torch.testing.assert_close(found[0], means[0].sum(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means[0], images.float().mean(0) / 255)
