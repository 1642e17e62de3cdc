"""ONNX files: the tensors that a network is initialised with.

Only as much of protobuf is read as that takes. Field numbers are those of onnx/onnx.proto; the
encoding is https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from marwright.archive.tensors import (
    MAX_HEADER_BYTES,
    Tensor,
    Weights,
    contiguous_stride,
    unreadable,
)

__all__ = ["read_onnx"]

MAX_TENSORS = 100_000

_GRAPH = 7
"""Of ModelProto."""
_INITIALIZER = 5
"""Of GraphProto."""
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _DOUBLE_DATA = 1, 2, 4, 8, 9, 10
"""Of TensorProto."""

_DATA_TYPES = {
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"},
    **{9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64"},
    **{15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz"},
    **{19: "float8_e5m2", 20: "float8_e5m2fnuz"},
}
"""TensorProto.DataType."""


@dataclass(frozen=True)
class _Field:
    """One field of a message: a number, or a stretch of the file."""

    number: int
    value: int | None
    start: int
    end: int


def read_onnx(stream: IO[bytes], name: str) -> Weights:
    """List the initialisers of an ONNX file; see read_weights."""
    leaves: dict[str, Any] = {}
    try:
        for graph in _list_fields(stream, 0, stream.seek(0, os.SEEK_END)):
            if graph.number != _GRAPH:
                continue
            for field in _list_fields(stream, graph.start, graph.end):
                if field.number == _INITIALIZER:
                    key, leaf = _read_tensor(stream, field)
                    leaves[key] = leaf
                if len(leaves) > MAX_TENSORS:
                    raise ValueError(f"more than {MAX_TENSORS:,} tensors")
    except (ValueError, LookupError) as exc:
        raise unreadable(name, f"no ONNX that can be followed ({exc})") from exc
    return Weights(
        stream,
        "ONNX",
        tensors={key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)},
        values={key: leaf for key, leaf in leaves.items() if not isinstance(leaf, Tensor)},
    )


def _read_tensor(stream: IO[bytes], message: _Field) -> tuple[str, Tensor | str]:
    """Return a tensor's name, and its place; its checksum where the numbers have no place.

    That is so where they are varints, or stand in another file.
    """
    name, dtype, shape, place = "", 0, [], None
    for field in _list_fields(stream, message.start, message.end):
        if field.number == _DIMS:
            shape += _read_numbers(stream, field)
        elif field.number == _DATA_TYPE:
            dtype = _read_numbers(stream, field)[0]
        elif field.number == _NAME:
            name = _read(stream, field).decode()
        elif field.number in (_RAW_DATA, _FLOAT_DATA, _DOUBLE_DATA) and field.value is None:
            place = field
    if place is None or dtype not in _DATA_TYPES:
        return (
            name,
            f"{message.end - message.start} bytes, {zlib.crc32(_read(stream, message)):08x}",
        )
    sizes = tuple(shape)
    return name, Tensor(_DATA_TYPES[dtype], sizes, contiguous_stride(sizes), place.start)


def _list_fields(stream: IO[bytes], start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of the message that stands from `start` to `end`."""
    while start < end:
        tag, start = _read_varint(stream, start)
        value: int | None = None
        if tag & 7 == 0:
            value, size = _read_varint(stream, start)
            size -= start
        elif tag & 7 == 2:
            size, start = _read_varint(stream, start)
        else:
            size = {1: 8, 5: 4}[tag & 7]
        if start + size > end:
            raise ValueError("a field that reaches beyond its message")
        yield _Field(tag >> 3, value, start, start + size)
        start += size


def _read_varint(stream: IO[bytes], start: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    stream.seek(start)
    number = 0
    for count, byte in enumerate(stream.read(10)):
        number |= (byte & 127) << 7 * count
        if byte < 128:
            return number, start + count + 1
    raise ValueError("a number that does not end")


def _read_numbers(stream: IO[bytes], field: _Field) -> list[int]:
    """Return a field's one number, or the many that are packed in it."""
    if field.value is not None:
        return [field.value]
    numbers, start = [], field.start
    while start < field.end:
        number, start = _read_varint(stream, start)
        numbers.append(number)
    return numbers


def _read(stream: IO[bytes], field: _Field) -> bytes:
    if field.end - field.start > MAX_HEADER_BYTES:
        raise ValueError(f"a field of {field.end - field.start:,} bytes")
    stream.seek(field.start)
    return stream.read(field.end - field.start)
