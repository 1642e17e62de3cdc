"""Pruning: whole channels, which makes a network smaller, and single weights, which does not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import prune

from marwright.errors import ExportError, UsageError

from ..extras import import_extra
from ..origin import find_failing_layer, list_frames, read_first_line

if TYPE_CHECKING:
    from ..models import Exported

__all__ = [
    "count_nonzero",
    "finish_weights",
    "prune_channels",
    "prune_weights",
    "round_channels",
    "scan_sensitivity",
]

VECTOR = 8
"""float32 values in a register of AVX2, and channels in a block of oneDNN's convolutions."""
SHORT_VECTOR = 4

_REMEDY = "leave out the variants with pruned channels"
_WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def prune_channels(model: Exported, example: torch.Tensor, keep: float) -> Exported:
    """Return a copy of which each layer keeps about `keep` of its channels, those of largest norm.

    The inputs and the classifier's outputs stay. `example` is a batch of what the model takes.

    Raises:
        UsageError: `keep` is not above 0 and at most 1.
        ExportError: the network cannot be pruned; names the layer.
    """
    _check_share("keep", keep, 0 < keep <= 1)
    pruned = _copy(model)
    if keep == 1:
        return pruned
    before = _count_parameters(pruned)
    with _explain_failure(pruned, example):
        shape = _read_shape(pruned, example)
        widths = dict(_list_groups(pruned, example))
        wanted = {name: round_channels(width, keep) for name, width in widths.items()}
        _prune_to(pruned, example, wanted, widths)
        found = _read_shape(pruned, example)
    if found != shape:
        raise ExportError(
            "the pruned network answers otherwise", expected=str(shape), found=str(found)
        )
    if _count_parameters(pruned) >= before:
        raise ExportError(
            "no channel of this network could be pruned",
            expected="layers between the inputs and the classifier whose widths are free",
            remedy=_REMEDY,
        )
    return pruned


def round_channels(channels: int, keep: float) -> int:
    """Return how many of a layer's channels to keep: a multiple of 8, or of 4 below 16.

    What is no multiple of the vector's width is computed as if it were the next one.
    """
    wanted = channels * keep
    step = VECTOR if wanted >= 2 * VECTOR else SHORT_VECTOR if wanted >= SHORT_VECTOR else 1
    return min(channels, max(step, round(wanted / step) * step))


def scan_sensitivity(
    model: Exported,
    example: torch.Tensor,
    measure: Callable[[nn.Module], float],
    shares: Sequence[float] = (0.75, 0.5, 0.25),
) -> dict[str, dict[float, float]]:
    """Return, by layer and share kept, what `measure` gives when only that layer is pruned.

    Layers that can only shrink together (around a residual connection) stand under the first one's
    name. Nothing is fine-tuned.

    Raises:
        ExportError: the network cannot be pruned; names the layer.
    """
    with _explain_failure(model, example):
        widths = dict(_list_groups(_copy(model), example))
    scores: dict[str, dict[float, float]] = {name: {} for name in widths}
    for name, width in widths.items():
        for share in shares:
            _check_share("keep", share, 0 < share <= 1)
            pruned = _copy(model)
            with _explain_failure(pruned, example):
                _prune_to(pruned, example, {name: round_channels(width, share)}, widths)
                _read_shape(pruned, example)
            scores[name][share] = measure(pruned)
    return scores


def prune_weights(model: nn.Module, sparsity: float) -> None:
    """Zero, in place, the share of weights of linear layers and convolutions nearest to 0.

    They stay 0 while the model is trained, until `finish_weights`.

    Raises:
        UsageError: `sparsity` is not from 0 to below 1, or nothing can be pruned.
    """
    _check_share("sparsity", sparsity, 0 <= sparsity < 1)
    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, _WEIGHTED)]
    if not layers:
        raise UsageError("this network has no weights to prune", expected="convolutions or linears")
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)


def finish_weights(model: nn.Module) -> None:
    """Make the zeros of `prune_weights` plain weights again: masks cannot be exported."""
    for layer in model.modules():
        if isinstance(layer, _WEIGHTED) and prune.is_pruned(layer):
            prune.remove(layer, "weight")


def count_nonzero(model: nn.Module) -> int:
    """Return how many of the model's parameters are not 0."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def _check_share(name: str, share: float, is_sound: bool) -> None:
    if not is_sound:
        expected = "above 0, at most 1" if name == "keep" else "from 0 to below 1"
        raise UsageError(f"cannot prune with {name} {share}", expected=expected)


def _copy(model: Exported) -> Exported:
    """Return a copy whose layers torch-pruning can follow: it walks the graph of gradients."""
    return copy.deepcopy(model).eval().requires_grad_(True)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _list_groups(model: Exported, example: torch.Tensor) -> Iterator[tuple[str, int]]:
    """Yield each layer whose channels can be pruned, with how many a group of it has."""
    pruning = _import_pruning()
    network, inputs = model.network, _normalise(model, example)
    graph = pruning.DependencyGraph().build_dependency(network, example_inputs=inputs)
    names = {module: name for name, module in network.named_modules()}
    for group in graph.get_all_groups(
        ignored_layers=_find_heads(network, inputs), root_module_types=list(_WEIGHTED)
    ):
        layer = group[0].dep.target.module
        yield names[layer], graph.get_out_channels(layer) // _count_groups(group)


def _count_groups(group: Any) -> int:
    """Return the groups of a grouped convolution among the layers that shrink together."""
    layers = [dep.target.module for dep, _ in group]
    # A depthwise convolution has one channel a group: it follows, and shares nothing.
    return max(
        (
            layer.groups
            for layer in layers
            if hasattr(layer, "groups") and layer.groups != layer.out_channels
        ),
        default=1,
    )


def _prune_to(
    model: Exported, example: torch.Tensor, wanted: dict[str, int], widths: dict[str, int]
) -> None:
    """Prune in place, from `widths` down to so many channels of each layer `wanted`."""
    pruning = _import_pruning()
    network, inputs = model.network, _normalise(model, example)
    # torch-pruning cuts the kept channels down to a whole number; a tenth saves them from rounding.
    ratios = {
        network.get_submodule(name): 1 - (width + 0.1) / widths[name]
        for name, width in wanted.items()
        if width < widths[name]
    }
    pruning.pruner.MagnitudePruner(
        network,
        inputs,
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=_find_heads(network, inputs),
        # Its defaults for these are shared between calls, and grow.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    ).step()


def _normalise(model: Exported, example: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = (example - model.mean) / model.deviation
    return normalised


def _find_heads(network: nn.Module, inputs: torch.Tensor) -> list[nn.Module]:
    """Return the layer with weights that runs last: its outputs are the classes."""
    called: list[nn.Module] = []
    hooks = [
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
        for layer in network.modules()
        if isinstance(layer, _WEIGHTED)
    ]
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1:]


@contextmanager
def _explain_failure(model: Exported, example: torch.Tensor) -> Iterator[None]:
    """Raise ExportError for whatever torch-pruning came upon."""
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # about parameters it cannot follow; checked after
            yield
    except (ExportError, UsageError):
        raise
    except Exception as exc:  # its walk through the graph raises anything
        layer = _find_last_layer(model, exc) or find_failing_layer(model, example, exc)
        raise ExportError(
            f"channels of this network cannot be pruned{layer}",
            found=read_first_line(exc),
            remedy=_REMEDY,
        ) from exc


def _find_last_layer(model: Exported, error: Exception) -> str:
    """Return " behind layer NAME" where torch-pruning stopped at an operation between layers."""
    names = {module: name for name, module in model.network.named_modules()}
    node_type = _import_pruning().dependency.Node
    for frame, _ in reversed(list(list_frames(error))):
        node = next((v for v in frame.f_locals.values() if isinstance(v, node_type)), None)
        while node is not None and node.module not in names:
            node = node.inputs[0] if node.inputs else None
        if node is not None:
            return f" behind layer {names[node.module]}"
    return ""


def _read_shape(model: Exported, example: torch.Tensor) -> list[int]:
    with torch.no_grad():
        return list(model(example).shape)


def _import_pruning() -> Any:
    return import_extra("torch_pruning", "pruning channels")
