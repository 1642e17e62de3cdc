"""Models: the networks that can be trained, and what is exported of them."""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from marwright.errors import DataError, RunError, UsageError
from marwright.storage import translate_os_errors

from .vision import models as torchvision_models

__all__ = ["build_model", "CNN", "Exported", "load_weights", "MLP"]


class CNN(nn.Module):
    """Two convolutions and two linear layers for small RGB images.

    3xHxW -> conv 32 -> ReLU -> pool 2x2 -> conv 64 -> ReLU -> pool 2x2 -> 128 -> classes.
    """

    def __init__(
        self,
        classes: int = 10,
        image_size: tuple[int, int] = (24, 24),
        widths: tuple[int, int, int] = (32, 64, 128),
    ) -> None:
        super().__init__()
        first, second, third = widths
        height, width = image_size
        self.conv1 = nn.Conv2d(3, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.fc1 = nn.Linear(second * (height // 4) * (width // 4), third)
        self.fc2 = nn.Linear(third, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, classes) logits for (N, 3, H, W) float32."""
        maps = functional.max_pool2d(functional.relu(self.conv1(images)), 2)  # (N, 32, H/2, W/2)
        maps = functional.max_pool2d(functional.relu(self.conv2(maps)), 2)  # (N, 64, H/4, W/4)
        features = functional.relu(self.fc1(maps.flatten(1)))  # (N, 128)
        # Annotated for mypy; TorchScript would read a type comment on the line as its own.
        logits: torch.Tensor = self.fc2(features)
        return logits


class MLP(nn.Module):
    """Linear layers with ReLU between them, for the rows of a table."""

    def __init__(self, columns: int, classes: int, widths: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        sizes = [columns, *widths]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (N, classes) logits for (N, columns) float32."""
        logits: torch.Tensor = self.layers(rows)
        return logits


class Exported(nn.Module):
    """A network with its normalisation before it and its temperature behind it.

    In: (N, 3, H, W) float32 in [0, 1], or (N, columns) float32. Out: (N, classes) logits. What a
    server has to do around the network is part of the file, so that it cannot be forgotten there
    or done differently.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: torch.Tensor | float = 0.5,
        deviation: torch.Tensor | float = 0.5,
    ) -> None:
        super().__init__()
        self.network = network
        # nn.Buffer and not register_buffer with an annotation: TorchScript would read the latter.
        self.mean = nn.Buffer(torch.as_tensor(mean, dtype=torch.float32))
        self.deviation = nn.Buffer(torch.as_tensor(deviation, dtype=torch.float32))
        self.temperature = nn.Buffer(torch.tensor(1.0))
        """Divides the logits: above 1 it makes the probabilities less sure (calibration.py)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise, run the network, and divide by the temperature."""
        logits: torch.Tensor = self.network((inputs - self.mean) / self.deviation)
        return logits / self.temperature


def build_model(name: str, *, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Return a network with random weights: cnn, mlp, torchvision:NAME or module:Class.

    `input_shape` is (3, H, W) or (columns,). A class of the user's is called with those of
    `classes` and `input_shape` that it takes.

    Raises:
        UsageError: no such model.
        DataError: the network does not take such inputs, or does not answer (N, classes).
    """
    kind, _, rest = name.partition(":")
    is_image = len(input_shape) == 3
    if name == "cnn" and is_image:
        _check_size(input_shape)
        network: nn.Module = CNN(classes, (input_shape[1], input_shape[2]))
    elif name == "mlp":
        network = MLP(math.prod(input_shape), classes)
        network = nn.Sequential(nn.Flatten(), *network.layers) if is_image else network
    elif kind == "torchvision" and rest:
        network = _build_torchvision(rest, classes)
    elif kind and rest:
        network = _build_own(kind, rest, classes, input_shape)
    else:
        raise UsageError(
            f"there is no model {name!r}" + ("" if is_image else " for a table"),
            expected="cnn (images), mlp (tables), torchvision:NAME or module:Class",
        )
    _try(network, name, classes, input_shape)
    return network


def _check_size(input_shape: tuple[int, ...]) -> None:
    if min(input_shape[1:]) < 4:
        raise UsageError(
            f"images of {input_shape[1]} x {input_shape[2]} pixels are too small for the CNN",
            expected="4 x 4 or more: it halves them twice",
            remedy="pass --height and --width",
        )


def _build_torchvision(name: str, classes: int) -> nn.Module:
    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        raise UsageError(
            f"torchvision has no classifier {name!r}", expected=f"one of {', '.join(known)}"
        )
    # These two answer a tuple in training unless they are asked not to.
    extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if extra:
        extra["init_weights"] = False  # takes half a minute
    network: nn.Module = torchvision_models.get_model(
        name, weights=None, num_classes=classes, **extra
    )
    return network


def _build_own(module: str, name: str, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build a class of the user's, found from the current folder as `python -m` would."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name)
        offered = {"classes": classes, "input_shape": input_shape}
        taken = inspect.signature(factory).parameters
        network = factory(**{key: value for key, value in offered.items() if key in taken})
    except Exception as exc:  # whatever the user's own code raises
        raise UsageError(
            f"cannot make the model {module}:{name}",
            expected="a module that Python finds from this folder, with a class in it that takes "
            "classes, input_shape, or nothing",
            found=f"{type(exc).__name__}: {exc}",
        ) from exc
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{module}:{name} is no network",
            expected="a torch.nn.Module, or a function that returns one",
            found=type(network).__name__,
        )
    return network


def _try(network: nn.Module, name: str, classes: int, input_shape: tuple[int, ...]) -> None:
    """Run the network once, so that what cannot work is told before the data are read."""
    network.eval()
    try:
        with torch.inference_mode():
            answer = network(torch.zeros(2, *input_shape))
    except (RuntimeError, ValueError, TypeError) as exc:
        raise DataError(
            f"{name} cannot take inputs of shape {list(input_shape)}",
            found=str(exc).strip().splitlines()[0],
            remedy="pass a larger --height and --width" if len(input_shape) == 3 else "",
        ) from exc
    finally:
        network.train()
    shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
    if shape != [2, classes]:
        raise DataError(
            f"{name} does not answer one number a class",
            expected=f"[N, {classes}]",
            found=str(shape),
        )


def load_weights(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a state dict; return the names of what stays random: a head for other classes.

    Nothing of a pickle but tensors is loaded.

    Raises:
        RunError: no such file, no state dict, or one of another architecture.
    """
    state = _read_state(path)
    own = network.state_dict()
    if "temperature" in state and "temperature" not in own:
        # A run's, whose network stands between normalisation and temperature.
        inside = [name for name in state if name.startswith("network.")]
        state = {name.removeprefix("network."): state[name] for name in inside}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    head = list(own)[-1].rpartition(".")[0]
    if missing or surplus or any(name.rpartition(".")[0] != head for name in other):
        facts = [f"{name} is missing" for name in missing]
        facts += [f"{name} is not known" for name in surplus]
        facts += [
            f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
            for name in sorted(other)
        ]
        raise RunError(
            f"{path} holds the weights of another architecture",
            found="; ".join(facts[:5]) + (f"; {len(facts) - 5} more" if len(facts) > 5 else ""),
            remedy="pass the --model that these weights were made with",
        )
    network.load_state_dict({k: v for k, v in state.items() if k not in other}, strict=False)
    return tuple(sorted(other))


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    with translate_os_errors(f"read the weights {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about old formats
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as exc:  # torch raises whatever its reader came upon
            raise RunError(
                f"{path} holds no weights that can be read safely",
                expected="a state dict written by torch.save",
                found=str(exc).strip().splitlines()[0] if str(exc) else type(exc).__name__,
            ) from exc
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]  # a checkpoint of ours
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise RunError(f"{path} holds no state dict", found=type(state).__name__)
    return dict(state)
