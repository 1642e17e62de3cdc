"""The knobs of one training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from marwright.errors import UsageError

__all__ = ["Settings"]

CHOICES = {
    "optimizer": ("gd", "sgd", "adam", "adamw"),
    "schedule": ("cosine", "constant", "step", "onecycle"),
    "precision": ("float32", "bfloat16", "float16"),
    "device": ("cpu", "cuda", "auto"),
}


@dataclass(frozen=True)
class Settings:
    """How a network is trained; what it is trained on stands in recipe.py."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.01
    """Learning rate at the start; the schedule changes it step by step."""
    momentum: float = 0.9
    """Nesterov's for sgd; beta1 of adam and adamw."""
    weight_decay: float = 5e-4
    shift: int = 2
    """Pixels by which each training batch is moved at most, in each direction."""
    seed: int = 0
    threads: int = 1
    """torch threads. On two cores two trained this CNN in 0.7 times the time of one, but in 2.7
    times the time beside another training: threads that wait for a core stop one another."""
    optimizer: str = "sgd"
    """gd (one step an epoch, over all data), sgd, adam, adamw."""
    schedule: str = "cosine"
    """Of the learning rate: cosine to 0, constant, step (a tenth after each third), onecycle."""
    label_smoothing: float = 0.0
    clip: float = 0.0
    """The largest norm of the gradient; 0 does not clip."""
    patience: int = 0
    """Epochs without a better validation loss after which training stops; 0 never does."""
    augment: str = ""
    """Comma-separated names of augment.py's transforms, besides the shift."""
    precision: str = "float32"
    """bfloat16 or float16 compute forward passes so (torch.amp); weights stay float32."""
    device: str = "cpu"
    """cpu, cuda, or auto: cuda where there is one."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0 writes none."""

    def __post_init__(self) -> None:
        """Refuse impossible values, all at once."""
        problems = [
            f"{name} {getattr(self, name)!r}, one of {', '.join(known)}"
            for name, known in CHOICES.items()
            if getattr(self, name) not in known
        ]
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("shift", 0),
            ("threads", 1),
            ("patience", 0),
            ("checkpoint_steps", 0),
        ):
            if getattr(self, name) < least:
                problems.append(f"{name.replace('_', ' ')} {getattr(self, name)}, at least {least}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            problems.append(f"learning rate {self.lr}, above 0")
        for name in ("momentum", "weight_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(
                    f"{name.replace('_', ' ')} {getattr(self, name)}, from 0 to below 1"
                )
        if not (self.clip >= 0 and math.isfinite(self.clip)):
            problems.append(f"clip {self.clip}, at least 0")
        if not 0 <= self.seed < 1 << 32:  # what numpy takes, which splits the data
            problems.append(f"seed {self.seed}, from 0 to {(1 << 32) - 1}")
        if self.precision == "float16" and self.device == "cpu":
            problems.append("precision float16 on a CPU, bfloat16 or float32")
        if problems:
            raise UsageError("these settings cannot be used", found="; ".join(problems))
