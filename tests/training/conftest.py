"""What the tests of training share: a table, and a small trained network."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from marwright.training.models import CNN, Exported

ANSWER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from backend import load_backend
loaded = load_backend(sys.argv[2], Path(sys.argv[3]), device=torch.device("cpu"), threads=1)
with torch.inference_mode():
    answers = [loaded.run(batch) for batch in torch.load(sys.argv[4]).split(int(sys.argv[5]))]
torch.save(torch.cat(answers), sys.argv[6])
"""


@pytest.fixture(scope="session")
def items() -> tuple[torch.Tensor, torch.Tensor]:
    """(256, 3, 12, 12) images in [0, 1] of four classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(4, 3, 12, 12, generator=generator)
    labels = torch.randint(0, 4, (256,), generator=generator)
    noise = torch.randn(256, 3, 12, 12, generator=generator)
    return (patterns[labels] + 0.3 * noise).clamp(0, 1), labels


@pytest.fixture(scope="session")
def fit(
    items: tuple[torch.Tensor, torch.Tensor],
) -> Callable[[nn.Module, int, nn.Module | None, float], None]:
    """Return a function that trains a model on the items."""
    inputs, labels = items

    def train(
        model: nn.Module, epochs: int, teacher: nn.Module | None = None, rate: float = 1.0
    ) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * rate, momentum=0.9)
        model.train()
        for _ in range(epochs):
            for batch, wanted in zip(inputs.split(32), labels.split(32), strict=True):
                optimizer.zero_grad()
                functional.cross_entropy(model(batch), wanted).backward()
                optimizer.step()
        model.eval()

    return train


@pytest.fixture(scope="session")
def trained(
    items: tuple[torch.Tensor, torch.Tensor],
    fit: Callable[[nn.Module, int, nn.Module | None, float], None],
) -> Exported:
    """A CNN that tells the four classes apart; tests leave it as it is."""
    torch.manual_seed(0)
    model = Exported(CNN(4, (12, 12), (8, 16, 32)))
    model.temperature.fill_(1.5)
    fit(model, 15, None, 1.0)
    inputs, labels = items
    with torch.no_grad():
        assert (model(inputs).argmax(1) == labels).float().mean() > 0.95
    return model


@pytest.fixture(scope="session")
def answer(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path, torch.Tensor], torch.Tensor]:
    """Return a function that asks a model file in a process of its own, as a server's worker."""

    def run(backend: str, path: Path, inputs: torch.Tensor, batch: int = 32) -> torch.Tensor:
        folder = tmp_path_factory.mktemp("answer")
        torch.save(inputs, folder / "inputs.pt")
        arguments = [root / "handlers", backend, path, folder / "inputs.pt", batch]
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ANSWER]
            + [str(argument) for argument in [*arguments, folder / "answers.pt"]],
            check=True,
            timeout=100,
        )
        answers: torch.Tensor = torch.load(folder / "answers.pt")
        return answers

    return run


@pytest.fixture(scope="session")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 90 rows whose three kinds are easy to tell; its columns differ much in size."""
    chance = random.Random(0)
    lines = ["length,depth,kind"]
    for row in range(90):
        kind = row % 3
        lines.append(f"{chance.gauss(4000 * kind, 500):.1f},{chance.gauss(-kind, 0.2):.3f},k{kind}")
    path = tmp_path_factory.mktemp("tables") / "measurements.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
