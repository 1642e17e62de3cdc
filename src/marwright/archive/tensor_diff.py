"""What differs between two weights files, tensor by tensor.

Numbers are read in blocks, so that memory does not grow with the files; torch is imported only
where some differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from marwright.archive.tensors import ITEM_BYTES, Tensor, Weights
from marwright.errors import ArchiveError

if TYPE_CHECKING:
    import torch

__all__ = ["compare_weights", "TensorChange", "WeightsChange"]

BLOCK_BYTES = 4 << 20
BLOCK_NUMBERS = 1 << 20


@dataclass(frozen=True)
class TensorChange:
    """One tensor that is not the same in both files."""

    name: str
    kind: Literal["added", "removed", "shape", "dtype", "values"]
    before: str
    """Type and shape; empty where it was added."""
    after: str
    max_abs: float | None = None
    """Largest difference of two numbers; None where the shapes differ, infinite for a new NaN."""
    max_rel: float | None = None
    """That, relative to the largest number before."""
    changed: int | None = None
    """How many numbers differ."""
    count: int | None = None
    """Of how many."""


@dataclass(frozen=True)
class WeightsChange:
    """One weights file that is not the same in both archives."""

    member: str
    format: str
    """What wrote it; `bytes` where its tensors cannot be told apart."""
    tensors: tuple[TensorChange, ...] = ()
    equal: int = 0
    """How many tensors are the same in both."""
    values: tuple[tuple[str, Any, Any], ...] = ()
    """(name, before, after) of numbers and texts beside the tensors."""
    parts: tuple[str, ...] = ()
    """What else differs: a network's code."""
    note: str = ""
    """Why only bytes were compared, or that they differ where nothing is told of."""


def compare_weights(member: str, before: Weights, after: Weights) -> WeightsChange:
    """Return what differs; the files must be open."""
    changes = []
    for name in sorted({*before.tensors, *after.tensors}):
        change = _compare(name, before, after)
        if change is not None:
            changes.append(change)
    shared = before.tensors.keys() & after.tensors.keys()
    values = tuple(
        (name, before.values.get(name), after.values.get(name))
        for name in sorted({*before.values, *after.values})
        if not _is_same(before.values.get(name), after.values.get(name))
    )
    parts = tuple(
        sorted(
            name
            for name in {*before.parts, *after.parts}
            if before.parts.get(name) != after.parts.get(name)
        )
    )
    return WeightsChange(
        member,
        before.format if before.format == after.format else f"{before.format}, {after.format}",
        tuple(changes),
        len(shared) - sum(change.kind not in ("added", "removed") for change in changes),
        values,
        parts,
        "" if changes or values or parts else "the bytes differ, the tensors do not",
    )


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and repr(one) == repr(other)  # repr: NaN is the same as NaN


def _compare(name: str, before: Weights, after: Weights) -> TensorChange | None:
    one, other = before.tensors.get(name), after.tensors.get(name)
    if one is None or other is None:
        kind: Literal["added", "removed"] = "added" if one is None else "removed"
        return TensorChange(name, kind, str(one or ""), str(other or ""))
    if one.shape != other.shape:
        return TensorChange(name, "shape", str(one), str(other))
    is_same_type = one.dtype == other.dtype
    if is_same_type and _has_same_bytes(before, one, after, other):
        return None
    changed, max_abs, largest = _measure(_list_blocks(before, one), _list_blocks(after, other))
    if is_same_type and not changed:
        return None  # the same numbers, standing in another order
    return TensorChange(
        name,
        "values" if is_same_type else "dtype",
        str(one),
        str(other),
        max_abs=max_abs,
        max_rel=max_abs / largest if largest else math.inf if max_abs else 0.0,
        changed=changed,
        count=one.count,
    )


def _has_same_bytes(before: Weights, one: Tensor, after: Weights, other: Tensor) -> bool:
    """Compare without looking at numbers, which needs no torch."""
    if one.stride != other.stride:
        return False
    at = 0
    while at < one.span_bytes:
        size = min(BLOCK_BYTES, one.span_bytes - at)
        if _read(before, one.offset + at, size) != _read(after, other.offset + at, size):
            return False
        at += size
    return True


def _read(weights: Weights, offset: int, size: int) -> bytes:
    weights.stream.seek(offset)
    content = weights.stream.read(size)
    if len(content) < size:
        raise ArchiveError("a weights file ends before its tensors do", remedy="get it again")
    return content


def _list_blocks(weights: Weights, tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor's numbers in the order of their indices: (n) float64, complex128 or int64."""
    import torch

    kind = getattr(torch, tensor.dtype.removeprefix("q"))  # a quantised tensor's whole numbers
    wide = torch.complex128 if kind.is_complex else torch.float64
    if not (kind.is_complex or kind.is_floating_point):
        wide = torch.int64  # float64 does not tell large ones apart
    if tensor.is_contiguous:
        item = ITEM_BYTES[tensor.dtype]
        for first in range(0, tensor.count, BLOCK_NUMBERS):
            count = min(BLOCK_NUMBERS, tensor.count - first)
            content = bytearray(_read(weights, tensor.offset + first * item, count * item))
            yield torch.frombuffer(content, dtype=kind).to(wide)
    elif tensor.count:
        content = bytearray(_read(weights, tensor.offset, tensor.span_bytes))
        numbers = torch.frombuffer(content, dtype=kind).as_strided(tensor.shape, tensor.stride)
        for block in numbers.flatten().split(BLOCK_NUMBERS):
            yield block.to(wide)


def _measure(
    before: Iterator[torch.Tensor], after: Iterator[torch.Tensor]
) -> tuple[int, float, float]:
    """Return how many numbers differ, by how much at most, and the largest number before."""
    changed, max_abs, largest = 0, 0.0, 0.0
    for one, other in zip(before, after, strict=True):
        differs = (one != other) & ~(one.isnan() & other.isnan())
        if count := int(differs.sum()):
            changed += count
            gaps = (other[differs] - one[differs]).abs().double()
            max_abs = max(max_abs, float(gaps.nan_to_num(nan=math.inf, posinf=math.inf).max()))
        largest = max(largest, float(one.abs().double().nan_to_num(nan=0.0, posinf=0.0).max()))
    return changed, max_abs, largest
