"""From the tensors of several things to a batch, and from a model's output to each thing's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["group_shapes", "scatter", "stack", "Tensors", "WAYS"]

Tensors = tuple[torch.Tensor, ...]
"""The model's inputs for one thing, without a batch axis."""
WAYS = ("bucket", "pad", "refuse")
"""What becomes of unlike shapes: inferred apart, padded to one shape, or answered 422."""
MOST_PADDING = 4
"""How many times as large as it is a thing may become."""


def group_shapes(things: Sequence[Tensors], way: str) -> list[list[int]]:
    """Return the indices of things that are inferred together."""
    groups: dict[Any, list[int]] = {}
    for index, tensors in enumerate(things):
        if way == "pad":
            key: Any = tuple([(t.dim(), t.dtype) for t in tensors])
        else:
            key = tuple([(t.shape, t.dtype) for t in tensors])
        groups.setdefault(key, []).append(index)
    if way == "pad":
        return [part for group in groups.values() for part in _split_by_padding(things, group)]
    return list(groups.values())


def _split_by_padding(things: Sequence[Tensors], indices: Sequence[int]) -> list[list[int]]:
    """Split things to pad so that one long thing does not blow up all of its neighbours."""

    def count(index: int) -> int:
        return sum(tensor.numel() for tensor in things[index])

    groups: list[list[int]] = []
    shapes: list[list[int]] = []
    for index in sorted(indices, key=count, reverse=True):  # the last is the smallest
        wider = [
            [max(pair) for pair in zip(tensor.shape, shape, strict=True)]
            for tensor, shape in zip(things[index], shapes, strict=bool(shapes))
        ]
        if groups and sum(map(math.prod, wider)) <= MOST_PADDING * count(index):
            groups[-1].append(index)
            shapes = wider
        else:
            groups.append([index])
            shapes = [list(tensor.shape) for tensor in things[index]]
    return groups


def stack(tensors: Sequence[torch.Tensor], pad_value: float = 0.0) -> torch.Tensor:
    """Stack tensors along a new first axis; unlike shapes are padded to the largest."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    sizes = [max(lengths) for lengths in zip(*[t.shape for t in tensors], strict=True)]
    stacked = tensors[0].new_full((len(tensors), *sizes), pad_value)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple([slice(length) for length in tensor.shape])] = tensor
    return stacked


def scatter(outputs: Any, count: int) -> list[Any]:
    """Split a model's output into one for each thing.

    Raises:
        ValueError: it does not have one for each.
    """
    if isinstance(outputs, Mapping):
        columns = {name: scatter(value, count) for name, value in outputs.items()}
        return [{name: values[i] for name, values in columns.items()} for i in range(count)]
    if isinstance(outputs, tuple) and outputs:
        return list(zip(*[scatter(value, count) for value in outputs], strict=True))
    if len(outputs) != count:
        raise ValueError(f"expected {count} outputs for {count} inputs, found {len(outputs)}")
    if isinstance(outputs, torch.Tensor):
        return list(outputs.cpu())
    return list(outputs)
