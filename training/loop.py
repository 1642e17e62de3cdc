"""The training loop: cross entropy by gradient descent, the best weights by validation kept.

Given the same seed, data and machine it gives the same weights, bit for bit, interrupted or not:
what is random in a step depends on the seed and the number of that step alone.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from marwright.errors import DataError, RunError, UsageError

from .augment import make_augmentation
from .data import scale
from .distil import TEACHER_SHARE, compute_distillation_loss
from .optimizers import make_optimizer, make_schedule
from .processes import ALONE, Group
from .settings import Settings

__all__ = [
    "compute_logits",
    "Epoch",
    "find_device",
    "Fit",
    "measure",
    "Penalty",
    "train_model",
    "Training",
]

CLIP_UNDER_TEACHER = 1.0
"""Largest norm of the gradient where none is set: the student's logits may lie far from the
teacher's, and without a bound the first steps threw a pruned one out (accuracy 0.1 of 0.9)."""
EXPLODED = 1000.0
"""Times the first loss, above which nothing is learnt any more."""
MEASURED_AT_ONCE = 256


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
    items_per_second: float
    """Training items, validation left out of the time."""


Tensors = tuple[torch.Tensor, torch.Tensor]
"""(N, 3, H, W) uint8 or (N, columns) float32, and (N,) int64."""
Progress = Callable[[int, int, float, float], None]
"""Called after each batch: steps done, steps in all, running loss, last validation accuracy."""
Penalty = Callable[[nn.Module], torch.Tensor]
"""A scalar of the weights that is added to each batch's mean loss, and not to what is reported."""


def train_model(
    model: nn.Module,
    train: Tensors,
    validation: Tensors,
    settings: Settings,
    progress: Progress = lambda *_: None,
    *,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
) -> Fit:
    """Train in place and leave the model with its best weights by validation accuracy.

    Raises:
        DataError: the loss stopped being a number, or grew beyond all measure.
    """
    training = Training(model, train, validation, settings, teacher=teacher, penalty=penalty)
    return training.run(progress)


def find_device(name: str) -> torch.device:
    """Return the device of a setting: cpu, cuda, or auto.

    Raises:
        UsageError: there is no such device here.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UsageError("there is no CUDA device here", remedy="pass --device cpu, or auto")
    return torch.device("cuda" if has_cuda and name in ("auto", "cuda") else "cpu")


class Training:
    """One training, which can say where it stands and go on from there."""

    def __init__(
        self,
        model: nn.Module,
        train: Tensors,
        validation: Tensors,
        settings: Settings,
        *,
        teacher: nn.Module | None = None,
        penalty: Penalty | None = None,
        group: Group = ALONE,
    ) -> None:
        self.device = find_device(settings.device)
        self.model = model.to(self.device)
        self.inputs, self.labels = train
        self.validation = validation
        self.settings = settings
        self.teacher = teacher.to(self.device).eval() if teacher is not None else None
        self.penalty = penalty
        self.group = group
        self.augment = make_augmentation(settings.augment)
        whole = settings.optimizer == "gd"
        self.batch_size = len(self.labels) if whole else settings.batch_size
        self.steps = math.ceil(len(self.labels) / self.batch_size)
        """An epoch's."""
        self.optimizer = make_optimizer(self.model.parameters(), settings)
        self.schedule = make_schedule(self.optimizer, settings, self.steps * settings.epochs)
        # float16 has too short a range for small gradients; bfloat16 has float32's.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=settings.precision == "float16"
        )
        self.epochs: list[Epoch] = []
        self.best_state = copy.deepcopy(self.model.state_dict())
        self.step = 0
        """Steps done of the epoch that is under way."""
        self.total = 0.0
        """Sum of that epoch's losses so far, an item each; this process's part of it."""
        self.rate = settings.lr
        """Learning rate at that epoch's start."""
        self.first_loss = math.nan
        self.seconds = 0.0
        """Of training, without validation."""

    def run(
        self,
        progress: Progress = lambda *_: None,
        *,
        on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> Fit:
        """Train to the end; `on_checkpoint` gets the state every `checkpoint_steps` steps."""
        started = time.perf_counter()
        parallel = self.group.wrap(self.model)
        while len(self.epochs) < self.settings.epochs and not self._is_stale():
            self._train_epoch(parallel, progress, on_checkpoint)
            if on_epoch is not None:
                on_epoch(self.epochs[-1])
        self.model.load_state_dict(self.best_state)
        # The last of equals: the learning rate has fallen further by then.
        best = max(reversed(self.epochs), key=lambda epoch: epoch.validation_accuracy)
        rate = len(self.labels) * len(self.epochs) / max(self.seconds, 1e-9)
        return Fit(tuple(self.epochs), best, time.perf_counter() - started, rate)

    def get_state(self) -> dict[str, Any]:
        """Return where the training stands: tensors, numbers and text only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best_state,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "step": self.step,
            "total": self.total,
            "rate": self.rate,
            "first_loss": self.first_loss,
            "seconds": self.seconds,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from where another training stood.

        Raises:
            RunError: that one had another architecture or another optimiser.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            self.best_state = state["best"]
            self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
            self.step, self.total = state["step"], state["total"]
            self.rate = state["rate"]
            self.first_loss, self.seconds = state["first_loss"], state["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise RunError(
                "the checkpoint belongs to another architecture or optimiser",
                found="; ".join(line.strip() for line in str(exc).splitlines()[:3]),
                remedy="resume with the options it was begun with, or train anew",
            ) from exc

    def _is_stale(self) -> bool:
        """Whether the validation loss has not fallen for as many epochs as patience lasts."""
        losses = [epoch.validation_loss for epoch in self.epochs]
        if not self.settings.patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.settings.patience

    def _train_epoch(
        self,
        parallel: nn.Module,
        progress: Progress,
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        started = time.perf_counter()
        number = len(self.epochs) + 1
        accuracy = self.epochs[-1].validation_accuracy if self.epochs else math.nan
        if self.step == 0:  # else it was begun before a checkpoint
            self.rate = float(self.schedule.get_last_lr()[0])
        order = torch.randperm(len(self.labels), generator=self._make_generator(number, -1))
        every = self.settings.checkpoint_steps
        self.model.train()
        for chosen in order.split(self.batch_size)[self.step :]:
            loss = self._take_step(parallel, chosen, number)
            self.step += 1
            done = (number - 1) * self.steps + self.step
            progress(done, self.steps * self.settings.epochs, loss, accuracy)
            # Not at the epoch's last step: validation comes first, and the next step writes it.
            if every and done % every == 0 and self.step < self.steps:
                self.total = self._add_total() / self.group.size  # a part that suits any process
                if on_checkpoint:
                    on_checkpoint(self.get_state())
        total = self._add_total()
        self.seconds += time.perf_counter() - started
        validation_loss, accuracy = measure(self.model, self.validation, self.group)
        self._check(validation_loss, "validation", number)
        self.epochs.append(
            Epoch(
                epoch=number,
                train_loss=total / len(self.labels),
                validation_loss=validation_loss,
                validation_accuracy=accuracy,
                lr=self.rate,
                seconds=time.perf_counter() - started,
            )
        )
        if accuracy >= max(epoch.validation_accuracy for epoch in self.epochs):
            self.best_state = copy.deepcopy(self.model.state_dict())
        self.step, self.total = 0, 0.0
        if every and on_checkpoint and number * self.steps % every < min(every, self.steps):
            on_checkpoint(self.get_state())

    def _take_step(self, parallel: nn.Module, chosen: torch.Tensor, epoch: int) -> float:
        """Learn from one batch and return the mean loss of this process's part of it."""
        batch, labels = self._make_batch(chosen, epoch)
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self._compute_loss(parallel(batch), batch, labels)
        mean = loss.sum() / len(chosen)
        # DistributedDataParallel divides the sum of the gradients by the processes.
        parted = self.group.parts(chosen)
        objective = mean * self.group.size if parted else mean
        if self.penalty is not None:
            objective = objective + self.penalty(self.model)
        self.scaler.scale(objective).backward()
        if clip := self.settings.clip or (CLIP_UNDER_TEACHER if self.teacher else 0.0):
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        value = loss.sum().item()
        self._check(value / len(loss), "training", epoch)
        self.total += value if parted else value / self.group.size
        return value / len(loss)

    def _add_total(self) -> float:
        """Return the epoch's sum over all processes: once, not at each step, to save the wait."""
        return self.group.add_up(torch.tensor(self.total, dtype=torch.float64)).item()

    def _make_batch(self, chosen: torch.Tensor, epoch: int) -> Tensors:
        """Return this process's part of a batch, moved and augmented."""
        generator = self._make_generator(epoch, self.step)
        # Dropout and the augmentations draw from torch's own generator.
        torch.manual_seed(generator.initial_seed() + self.group.rank)
        own = self.group.share(chosen)
        batch = self.inputs[own]
        if batch.dim() == 4:
            batch = _shift(batch, self.settings.shift, generator)
        batch = scale(self.augment(batch))
        return batch.to(self.device), self.labels[own].to(self.device)

    def _compute_loss(
        self, logits: torch.Tensor, batch: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return (N,) losses."""
        loss = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.settings.label_smoothing
        )
        if self.teacher is None:
            return loss
        with torch.no_grad():
            answers = self.teacher(batch)
        distance = compute_distillation_loss(logits, answers)
        return (1 - TEACHER_SHARE) * loss + TEACHER_SHARE * distance

    def _autocast(self) -> AbstractContextManager[None]:
        precision = self.settings.precision
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type,
            dtype=torch.float16 if precision == "float16" else torch.bfloat16,
            enabled=precision != "float32",
        )
        return context

    def _make_generator(self, epoch: int, step: int) -> torch.Generator:
        """Return what draws a step's random numbers, or with step -1 the epoch's order."""
        seed = (self.settings.seed * 100_003 + epoch) * 1_000_003 + step + 1
        return torch.Generator().manual_seed(seed % (1 << 63))

    def _check(self, loss: float, kind: str, epoch: int) -> None:
        if not math.isfinite(loss):
            raise DataError(
                f"the {kind} loss is {loss} in epoch {epoch}",
                expected="a number",
                remedy="lower --lr, or pass --clip 1",
            )
        if math.isnan(self.first_loss):
            self.first_loss = loss
        if loss > EXPLODED * max(self.first_loss, 1.0):
            raise DataError(
                f"the {kind} loss explodes: {loss:.3g} in epoch {epoch}",
                expected=f"about the first, {self.first_loss:.3g}, or less",
                remedy="lower --lr, or pass --clip 1",
            )


@torch.inference_mode()
def compute_logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return (N, classes) float32 on the CPU, for inputs as a data set holds them."""
    model.eval()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    batches = inputs.split(MEASURED_AT_ONCE)
    return torch.cat([model(scale(batch).to(device)).float().cpu() for batch in batches])


@torch.inference_mode()
def measure(model: nn.Module, tensors: Tensors, group: Group = ALONE) -> tuple[float, float]:
    """Return mean cross entropy and accuracy; several processes share the work."""
    inputs, labels = tensors
    own = slice(group.rank, None, group.size) if len(labels) >= group.size else slice(None)
    logits = compute_logits(model, inputs[own])
    right = (logits.argmax(1) == labels[own]).double().sum()
    loss = functional.cross_entropy(logits.double(), labels[own], reduction="sum")
    sums = torch.stack([loss, right, torch.tensor(float(len(logits)), dtype=torch.float64)])
    loss_sum, hits, count = group.add_up(sums).tolist()
    return loss_sum / count, hits / count


def _shift(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Move a batch by up to `most` pixels each way; what comes in at the edge is black."""
    if most == 0:
        return images
    height, width = images.shape[2:]
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    padded = functional.pad(images, (most, most, most, most))
    return padded[:, :, down : down + height, right : right + width]
