"""Models: the CNN, and what is exported of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["CNN", "Exported"]


class CNN(nn.Module):
    """Two convolutions and two linear layers for 24 x 24 RGB images.

    3x24x24 -> conv 32 -> ReLU -> pool 2x2 -> conv 64 -> ReLU -> pool 2x2 -> 2304 -> 128 -> classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 6 * 6, 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, classes) logits for (N, 3, 24, 24) float32."""
        maps = functional.max_pool2d(functional.relu(self.conv1(images)), 2)  # (N, 32, 12, 12)
        maps = functional.max_pool2d(functional.relu(self.conv2(maps)), 2)  # (N, 64, 6, 6)
        features = functional.relu(self.fc1(maps.flatten(1)))  # (N, 128)
        # Annotated for mypy; TorchScript would read a type comment on the line as its own.
        logits: torch.Tensor = self.fc2(features)
        return logits


class Exported(nn.Module):
    """A network with its normalisation inside: (N, 3, H, W) float32 in [0, 1] in, logits out.

    What a server has to do before the network is part of the file, so that it cannot be forgotten
    there or done differently.
    """

    def __init__(self, network: nn.Module, *, mean: float = 0.5, deviation: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.mean = mean
        self.deviation = deviation

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise and run the network."""
        logits: torch.Tensor = self.network((pixels - self.mean) / self.deviation)
        return logits
