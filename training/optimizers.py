"""What changes the weights, and the rate at which it does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import lr_scheduler

from .settings import Settings

__all__ = ["make_optimizer", "make_schedule"]


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name; gd is sgd whose batch is all data."""
    momentum, decay = settings.momentum, settings.weight_decay
    if settings.optimizer == "gd":  # Cauchy's: a step straight down the gradient
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=momentum,
            weight_decay=decay,
            nesterov=momentum > 0,
        )
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=settings.lr, betas=(momentum, 0.999), weight_decay=decay)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: Settings, steps: int
) -> lr_scheduler.LRScheduler:
    """Return the schedule over that many steps in all."""
    if settings.schedule == "cosine":  # Loshchilov and Hutter 2017, without restarts
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if settings.schedule == "step":
        return lr_scheduler.StepLR(optimizer, max(1, -(-steps // 3)), gamma=0.1)
    if settings.schedule == "onecycle":  # Smith 2018
        return lr_scheduler.OneCycleLR(
            optimizer, settings.lr, total_steps=steps + 1, cycle_momentum=False
        )
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)
