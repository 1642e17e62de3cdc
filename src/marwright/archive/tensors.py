"""Tensors of a weights file: their names, shapes and places, found without torch.

Nothing of a file is executed, and its numbers are read only where somebody asks for them. Known are
what torch.save, torch.jit.save and torch.export.save write (torch_file.py), safetensors, and ONNX
(onnx_file.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from marwright.errors import ArchiveError

__all__ = [
    "contiguous_stride",
    "ITEM_BYTES",
    "read_sizes",
    "read_weights",
    "Tensor",
    "unreadable",
    "Weights",
]

MAX_HEADER_BYTES = 4 << 20
"""Of what describes the tensors; that of 20,000 tensors takes some 3 MB."""

ITEM_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8", "qint8", "quint8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "qint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of one number, by torch's name of the type."""

_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's numbers stand, and how they are to be read."""

    dtype: str
    """torch's name of the type, such as float32."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Numbers from one to the next, along each dimension."""
    offset: int
    """Of the first number, in bytes from the file's beginning."""

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers stand in the order of their indices, without gaps."""
        return self.stride == contiguous_stride(self.shape)

    @property
    def span_bytes(self) -> int:
        """From the first byte to the last, with what may stand between."""
        if not self.count:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        """Return how it is shown: `float32 [16, 1, 3, 3]`."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Weights:
    """The tensors of one file."""

    stream: IO[bytes]
    """The file, which must stay open while numbers are read."""
    format: str
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and text that stand beside the tensors, by name."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What else the file holds, such as a network's code: CRC-32 by name."""


def read_weights(stream: IO[bytes], name: str) -> Weights:
    """List the tensors of a file; `name` says by its ending what cannot be seen in the bytes.

    Raises:
        ArchiveError: the file is damaged, or of a kind whose tensors are not known here.
    """
    from marwright.archive.onnx_file import read_onnx
    from marwright.archive.torch_file import read_torch

    stream.seek(0)
    start = stream.read(4)
    stream.seek(0)
    if start == b"PK\x03\x04":
        weights = read_torch(stream, name)
    elif name.endswith(".safetensors"):
        weights = _read_safetensors(stream, name)
    elif name.endswith(".onnx"):
        weights = read_onnx(stream, name)
    else:
        raise unreadable(name, "neither written by torch nor .safetensors nor .onnx")
    _check(weights, name)
    return weights


def unreadable(name: str, reason: str) -> ArchiveError:
    """Return the error for a file whose tensors cannot be told apart."""
    return ArchiveError(f"the tensors of {name} cannot be read", found=reason)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of numbers that stand in the order of their indices."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _check(weights: Weights, name: str) -> None:
    """Refuse tensors that would lead a reader out of the file, or to more than it holds."""
    size = weights.stream.seek(0, os.SEEK_END)
    for key, tensor in weights.tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise unreadable(name, f"{key} with numbers of type {tensor.dtype}")
        if len(tensor.shape) != len(tensor.stride) or min((*tensor.shape, *tensor.stride, 0)) < 0:
            raise unreadable(name, f"{key} with shape {tensor.shape}, stride {tensor.stride}")
        # An expanded tensor (stride 0) repeats few numbers any number of times.
        needed = max(tensor.span_bytes, tensor.count * ITEM_BYTES[tensor.dtype])
        if tensor.offset < 0 or tensor.offset + needed > size:
            raise unreadable(name, f"{key} with more numbers than the file holds")


def _read_safetensors(stream: IO[bytes], name: str) -> Weights:
    """List the tensors of a safetensors file: a length, a JSON header, the numbers.

    Format: https://huggingface.co/docs/safetensors/index#format
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise unreadable(name, f"a header of {length:,} bytes")
    try:
        header = json.loads(stream.read(length))
        about = dict(header.pop("__metadata__", {}))
        tensors = {
            key: Tensor(
                dtype=_SAFETENSORS.get(item["dtype"], str(item["dtype"])),
                shape=(shape := read_sizes(item["shape"])),
                stride=contiguous_stride(shape),
                offset=8 + length + read_sizes(item["data_offsets"])[0],
            )
            for key, item in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise unreadable(name, f"a broken header ({type(exc).__name__}: {exc})"[:200]) from exc
    values = {f"__metadata__.{key}": value for key, value in about.items()}
    return Weights(stream, "safetensors", tensors, values)


def read_sizes(values: Any) -> tuple[int, ...]:
    """Return whole numbers, of which a shape or a stride is made.

    Raises:
        TypeError: they are something else.
    """
    sizes = tuple(values)
    if not all(type(value) is int for value in sizes) or len(sizes) > 64:
        raise TypeError(f"{str(values)[:80]} are no sizes")
    return sizes
