from __future__ import annotations

import contextlib
import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright.archive.tensors import read_weights
from marwright.errors import ArchiveError

FLOAT, INT64, BFLOAT16 = 1, 7, 16


def varint(number: int) -> bytes:
    head, rest = number & 127, number >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def block(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(name: str, kind: int, shape: list[int], data: bytes) -> bytes:
    """Return a TensorProto, its `data` a field of its own."""
    return b"".join(
        [*(number(1, size) for size in shape), number(2, kind), block(8, name.encode()), data]
    )


def model(*tensors: bytes) -> bytes:
    """Return a ModelProto with a node beside the initialisers."""
    graph = block(1, block(4, b"MatMul")) + b"".join(block(5, item) for item in tensors)
    return number(1, 8) + block(2, b"pytorch") + block(7, graph) + block(8, number(2, 17))


def test_initialisers_are_listed_where_their_numbers_stand() -> None:
    raw, floats = struct.pack("<6f", *range(6)), struct.pack("<2f", 7, 8)
    content = model(
        tensor("weight", FLOAT, [2, 3], block(9, raw)), tensor("bias", FLOAT, [2], block(4, floats))
    )
    weights = read_weights(io.BytesIO(content), "model.onnx")
    found = {name: str(item) for name, item in weights.tensors.items()}
    assert (weights.format, found) == ("ONNX", {"weight": "float32 [2, 3]", "bias": "float32 [2]"})
    for name, data in {"weight": raw, "bias": floats}.items():
        start = weights.tensors[name].offset
        assert content[start : start + len(data)] == data


def test_a_shape_may_be_packed() -> None:
    item = block(1, varint(2) + varint(300)) + number(2, BFLOAT16) + block(9, bytes(1_200))
    weights = read_weights(io.BytesIO(model(item)), "model.onnx")
    assert weights.tensors[""].shape == (2, 300)


def test_numbers_that_have_no_place_of_their_own_are_told_by_a_checksum() -> None:
    def read(*sizes: int) -> object:
        packed = block(7, b"".join(map(varint, sizes)))
        item = tensor("shape", INT64, [len(sizes)], packed)
        return read_weights(io.BytesIO(model(item)), "model.onnx").values["shape"]

    assert read(1, 2) == read(1, 2) != read(1, 3)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (block(7, bytes(10))[:-1], "beyond its message"),
        (block(7, block(5, b"\x0a\xff\xff\xff\xff\x7f")), "beyond its message"),
        (b"\xff" * 20, "does not end"),
        (varint(1 << 3 | 3), "no ONNX that can be followed"),
        (model(tensor("w", FLOAT, [1 << 40], block(9, bytes(4)))), "more numbers"),
        (model(tensor("w", 99, [1], block(8, bytes(5 << 20)))), "a field of"),
    ],
)
def test_a_file_that_leads_astray_is_refused(content: bytes, found: str) -> None:
    with pytest.raises(ArchiveError, match=r"tensors of model\.onnx cannot be read") as caught:
        read_weights(io.BytesIO(content), "model.onnx")
    assert found in caught.value.found


WHOLE = model(tensor("w", FLOAT, [2, 3], block(9, bytes(24))))


@given(position=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused(position: int, value: int) -> None:
    content = bytearray(WHOLE)
    content[position] = value
    with contextlib.suppress(ArchiveError):
        read_weights(io.BytesIO(content), "model.onnx")
