"""Where a trained network becomes the file of a variant."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from marwright.errors import UsageError

from ..forms import convert_openvino, export_model, write_openvino
from .prune import count_nonzero, finish_weights, prune_channels, prune_weights
from .quantise import (
    quantise_aware,
    quantise_dynamic,
    quantise_onnx,
    quantise_onnx_dynamic,
    quantise_openvino,
    quantise_program,
    quantise_static,
)

if TYPE_CHECKING:
    from ..models import Exported
    from .variant import Variant

__all__ = ["Built", "Fit", "Workshop"]

Fit = Callable[[nn.Module, int, "nn.Module | None", float], None]
"""Trains a model further in place: the model, epochs, a teacher or None, and the share of the
training's learning rate. The model takes what the exported one takes, float32 in [0, 1] or rows,
and normalises inside."""
RELEARN, MEND = 1.0, 0.1
"""Shares of the rate: with channels gone a network learns anew; where weights only became coarser,
or some of them 0, the whole rate destroys more than it mends."""


@dataclass(frozen=True)
class Built:
    """A variant's file, and what it has to answer like."""

    path: Path
    reference: nn.Module
    """The network whose logits the file must reproduce: before it was quantised, but for "aware",
    which has trained the quantised one."""
    parameters: int
    nonzero: int
    companions: tuple[Path, ...] = ()
    """Files that have to lie beside it: OpenVINO's weights."""


class Workshop:
    """Builds variants of one trained network; what two of them share is made once."""

    def __init__(
        self, model: Exported, example: torch.Tensor, calibration: torch.Tensor, fit: Fit
    ) -> None:
        """Take a trained model, a batch of what it takes, and training inputs to calibrate with."""
        self.model = copy.deepcopy(model).eval()
        self.example = example
        self.calibration = calibration
        self.fit = fit
        self._networks: dict[tuple[float, float, bool, int], Exported] = {}

    def make_network(self, variant: Variant) -> Exported:
        """Return the float network of a variant: pruned, and fine-tuned after that.

        Raises:
            ExportError: its channels cannot be pruned.
        """
        if variant.keep == 1 and not variant.sparsity:
            return self.model  # the epochs of "aware" are spent on the quantised network
        key = (variant.keep, variant.sparsity, variant.distil, variant.epochs)
        if key not in self._networks:
            self._networks[key] = self._prune(variant)
        return self._networks[key]

    def build(self, variant: Variant, path: Path) -> Built:
        """Write a variant's file.

        Raises:
            UsageError: no file can be both of this backend and quantised so.
            ExportError: the network cannot be pruned, quantised or written so.
            StorageError: the file cannot be written.
        """
        _check(variant)
        network = self.make_network(variant)
        reference = _BUILDERS[variant.backend, variant.quantise](self, network, variant, path)
        weights = path.with_suffix(".bin")
        return Built(
            path=path,
            reference=reference,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            nonzero=count_nonzero(network),
            companions=(weights,) if variant.backend == "openvino" else (),
        )

    def choose_teacher(self, variant: Variant) -> Exported | None:
        """Return the network as it was trained where the variant is to learn from it."""
        return self.model if variant.distil else None

    def _prune(self, variant: Variant) -> Exported:
        network = prune_channels(self.model, self.example, variant.keep)
        if variant.sparsity:
            prune_weights(network, variant.sparsity)
        if variant.epochs:
            rate = RELEARN if variant.keep < 1 else MEND
            self.fit(network, variant.epochs, self.choose_teacher(variant), rate)
        finish_weights(network)
        return network.eval()


def _check(variant: Variant) -> None:
    if (variant.backend, variant.quantise) not in _BUILDERS:
        ways = [backend for backend, way in _BUILDERS if way == variant.quantise]
        raise UsageError(
            f"variant {variant.name} cannot be built: {variant.quantise or 'not quantised'}"
            f" for {variant.backend}",
            expected=f"backend {' or '.join(ways)}",
        )
    if variant.quantise == "aware" and variant.sparsity:
        raise UsageError(
            f"variant {variant.name} cannot be built: training while quantised fills its zeros",
            expected="sparsity 0, or quantise: static",
        )


Builder = Callable[[Workshop, "Exported", "Variant", Path], nn.Module]
"""Writes the file and returns what it has to answer like."""


def _build_plain(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    export_model(network, variant.backend, path, shop.example)
    return network


def _build_dynamic(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    export_model(quantise_dynamic(network), variant.backend, path, shop.example)
    return network


def _build_static(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    quantised = quantise_static(network, shop.calibration, shop.example)
    export_model(quantised, variant.backend, path, shop.example)
    return network


def _build_aware(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    def fit(model: nn.Module) -> None:
        shop.fit(model, variant.epochs, shop.choose_teacher(variant), MEND)

    quantised = quantise_aware(network, fit, shop.example)
    export_model(quantised, variant.backend, path, shop.example)
    return quantised


def _build_program(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    quantised = quantise_program(network, shop.calibration, shop.example)
    export_model(quantised, variant.backend, path, shop.example)
    return network


def _build_onnx(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        export_model(network, "onnx", source, shop.example)
        if variant.quantise == "dynamic":
            quantise_onnx_dynamic(source, path)
        else:
            quantise_onnx(source, path, shop.calibration)
    return network


def _build_openvino(shop: Workshop, network: Exported, variant: Variant, path: Path) -> nn.Module:
    converted = convert_openvino(network, shop.example)
    write_openvino(quantise_openvino(converted, shop.calibration), path)
    return network


_BUILDERS: dict[tuple[str, str], Builder] = {
    ("torchscript", ""): _build_plain,
    ("torchscript", "dynamic"): _build_dynamic,
    ("torchscript", "static"): _build_static,
    ("torchscript", "aware"): _build_aware,
    ("onnx", ""): _build_plain,
    ("onnx", "dynamic"): _build_onnx,
    ("onnx", "static"): _build_onnx,
    ("exported", ""): _build_plain,
    ("exported", "static"): _build_program,
    ("aotinductor", ""): _build_plain,
    ("aotinductor", "static"): _build_program,
    ("openvino", ""): _build_plain,
    ("openvino", "static"): _build_openvino,
}
"""By backend and quantisation; what is not here is not possible."""
