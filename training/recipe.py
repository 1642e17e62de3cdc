"""What one training is to make: of which data, which network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from marwright.errors import UsageError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """The choices of a training that are no numbers of its loop."""

    dataset: str = "digits"
    """digits, shapes, mnist, fashion-mnist, cifar10, folder:DIR or table:FILE."""
    model: str = ""
    """cnn, mlp, torchvision:NAME or module:Class; cnn for images, mlp for tables if empty."""
    height: int = 0
    """Pixels that images are resized to; 0 takes the data set's own."""
    width: int = 0
    weights: str = ""
    """A file of weights to start from."""
    teacher: str = ""
    """A run folder whose model the network is to answer like (distillation)."""
    label: str = ""
    """A table's column of labels."""
    data_root: str = ""
    """Where torchvision's data sets lie."""
    download: bool = False
    """Whether torchvision may fetch what is missing."""
    most_unreadable: float = 0.1
    """The share of unreadable images above which a folder is refused."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        problems = [
            f"{name} {size}, at least 1 (0 for the data set's own)"
            for name, size in (("height", self.height), ("width", self.width))
            if size < 0
        ]
        if bool(self.height) != bool(self.width):
            problems.append("one of height and width, both or none")
        if not 0 <= self.most_unreadable <= 1:
            problems.append(f"most unreadable {self.most_unreadable}, from 0 to 1")
        if problems:
            raise UsageError("this recipe cannot be used", found="; ".join(problems))

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) where they are stated."""
        return (self.height, self.width) if self.height else None

    @property
    def root(self) -> Path | None:
        """The folder of torchvision's data sets where one is stated."""
        return Path(self.data_root) if self.data_root else None
