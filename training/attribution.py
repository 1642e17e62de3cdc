"""What speaks for each class: attributions averaged over the items that were recognised."""

from __future__ import annotations

import torch
from captum.attr import IntegratedGradients
from torch import nn

from .data import scale

__all__ = ["attribute_classes"]

ITEMS_PER_CLASS = 16
STEPS = 16
"""Of the path's integral; 32 and 64 gave the same pictures."""


def attribute_classes(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what speaks for each class, and the mean of the items it was measured on.

    Integrated gradients (Sundararajan, Taly and Yan 2017) of the class's logit, from black, or from
    a row of zeros, over the items that the model gets right. (C, H, W) and (C, 3, H, W) for
    images, (C, columns) twice for tables; a class without such items has zeros.
    """
    model = model.cpu().eval()
    explainer = IntegratedGradients(model)
    found, means = [], []
    for label in range(classes):
        mine = inputs[labels == label]
        with torch.no_grad():
            right = mine[model(scale(mine)).argmax(1) == label] if len(mine) else mine
        items = scale(right[:ITEMS_PER_CLASS])
        if not len(items):
            found.append(torch.zeros(inputs.shape[1:]))
            means.append(torch.zeros(inputs.shape[1:]))
            continue
        values = explainer.attribute(items, target=label, n_steps=STEPS, internal_batch_size=64)
        found.append(values.detach().mean(0).float())
        means.append(items.mean(0))
    attributions = torch.stack(found)
    if attributions.dim() == 4:
        attributions = attributions.sum(1)
    return attributions, torch.stack(means)
