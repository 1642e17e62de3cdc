"""The training loop: SGD on cross entropy, the best weights by validation kept.

Given the same seed, data and machine it gives the same weights, bit for bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from marwright.errors import DataError, UsageError

__all__ = ["Epoch", "Fit", "measure", "Settings", "train_model"]


@dataclass(frozen=True)
class Settings:
    """The knobs of one training."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.01
    """Learning rate at the start; it falls to 0 along a cosine."""
    momentum: float = 0.9
    """Nesterov's."""
    weight_decay: float = 5e-4
    shift: int = 2
    """Pixels by which each training batch is moved at most, in each direction."""
    seed: int = 0
    threads: int = 1
    """torch threads. On two cores two trained this CNN in 0.7 times the time of one, but in 2.7
    times the time beside another training: threads that wait for a core stop one another."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers, all at once."""
        problems = []
        if self.epochs < 1:
            problems.append(f"epochs {self.epochs}, at least 1")
        if self.batch_size < 1:
            problems.append(f"batch size {self.batch_size}, at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            problems.append(f"learning rate {self.lr}, above 0")
        if not 0 <= self.momentum < 1:
            problems.append(f"momentum {self.momentum}, from 0 to below 1")
        if not 0 <= self.weight_decay < 1:
            problems.append(f"weight decay {self.weight_decay}, from 0 to below 1")
        if self.shift < 0:
            problems.append(f"shift {self.shift}, at least 0")
        if not 0 <= self.seed < 1 << 32:  # what numpy takes, which splits the data
            problems.append(f"seed {self.seed}, from 0 to {(1 << 32) - 1}")
        if self.threads < 1:
            problems.append(f"threads {self.threads}, at least 1")
        if problems:
            raise UsageError("these settings cannot be used", found="; ".join(problems))


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data gave; a line of metrics.jsonl."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A finished training."""

    epochs: tuple[Epoch, ...]
    best: Epoch
    seconds: float


Tensors = tuple[torch.Tensor, torch.Tensor]
"""(N, 3, H, W) float32 in [0, 1] and (N,) int64."""
Progress = Callable[[int, int, float, float], None]
"""Called after each batch: steps done, steps in all, running loss, last validation accuracy."""


def train_model(
    model: nn.Module, train: Tensors, validation: Tensors, settings: Settings, progress: Progress
) -> Fit:
    """Train in place and leave the model with its best weights by validation accuracy.

    Raises:
        DataError: the loss stopped being a number.
    """
    images, labels = train
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    steps = math.ceil(len(labels) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * settings.epochs)
    epochs: list[Epoch] = []
    best_state = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    for number in range(1, settings.epochs + 1):
        epoch_started = time.perf_counter()
        rate = float(schedule.get_last_lr()[0])
        model.train()
        total = 0.0
        order = torch.randperm(len(labels), generator=generator)
        for step, chosen in enumerate(order.split(settings.batch_size), start=1):
            batch = _shift(images[chosen], settings.shift, generator)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(batch), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
            done = (number - 1) * steps + step
            accuracy = epochs[-1].validation_accuracy if epochs else math.nan
            progress(done, steps * settings.epochs, loss.item(), accuracy)
        loss_now, accuracy = measure(model, validation)
        for kind, value in (("training", total), ("validation", loss_now)):
            if not math.isfinite(value):
                raise DataError(
                    f"the {kind} loss is {value} in epoch {number}",
                    expected="a number",
                    remedy="lower --lr",
                )
        epochs.append(
            Epoch(
                epoch=number,
                train_loss=total / len(labels),
                validation_loss=loss_now,
                validation_accuracy=accuracy,
                lr=rate,
                seconds=time.perf_counter() - epoch_started,
            )
        )
        if accuracy >= max(epoch.validation_accuracy for epoch in epochs):
            best_state = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    # The last of equals: the learning rate has fallen further by then.
    best = max(reversed(epochs), key=lambda epoch: epoch.validation_accuracy)
    return Fit(tuple(epochs), best, time.perf_counter() - started)


@torch.inference_mode()
def measure(model: nn.Module, tensors: Tensors) -> tuple[float, float]:
    """Return mean cross entropy and accuracy."""
    model.eval()
    images, labels = tensors
    logits = torch.cat([model(batch) for batch in images.split(256)])
    loss = functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()


def _shift(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Move a batch by up to `most` pixels each way; what comes in at the edge is black."""
    if most == 0:
        return images
    height, width = images.shape[2:]
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = functional.pad(images, (most, most, most, most))
    return padded[:, :, down : down + height, right : right + width]
