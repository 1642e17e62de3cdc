from __future__ import annotations

import contextlib
import io
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marwright.archive.tensors import MAX_HEADER_BYTES, Tensor, contiguous_stride, read_weights
from marwright.errors import ArchiveError


def safetensors(header: Any, data: bytes = b"") -> io.BytesIO:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str, shape: list[Any], offsets: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_are_listed_with_their_places_and_metadata() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "weight": entry("BF16", [2, 3], (0, 12)),
        "steps": entry("I64", [], (12, 20)),
    }
    stream = safetensors(header, bytes(20))
    weights = read_weights(stream, "model.safetensors")
    start = len(stream.getvalue()) - 20
    assert weights.format == "safetensors"
    assert weights.values == {"__metadata__.format": "pt"}
    assert weights.tensors == {
        "weight": Tensor("bfloat16", (2, 3), (3, 1), start),
        "steps": Tensor("int64", (), (), start + 12),
    }


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"no JSON", "a broken header"),
        (b"[]", "a broken header"),
        ({"w": 5}, "a broken header"),
        ({"w": entry("F32", ["2"], (0, 8))}, "no sizes"),
        ({"w": entry("F32", [1] * 100, (0, 4))}, "no sizes"),
        ({"w": entry("F4", [2], (0, 1))}, "numbers of type F4"),
        ({"w": entry("F32", [3], (0, 12))}, "more numbers than the file holds"),
        ({"w": entry("F32", [1], (1 << 62, 4))}, "more numbers than the file holds"),
        ({"w": entry("F32", [1 << 40, 0], (0, 0))}, ""),
        ({"w": entry("F32", [-1], (0, 8))}, "with shape"),
    ],
)
def test_a_header_that_leads_astray_is_refused(header: Any, found: str) -> None:
    if not found:  # no numbers at all: nothing to be led to
        assert read_weights(safetensors(header, bytes(8)), "m.safetensors").tensors["w"].count == 0
        return
    with pytest.raises(ArchiveError, match=r"tensors of m\.safetensors cannot be read") as caught:
        read_weights(safetensors(header, bytes(8)), "m.safetensors")
    assert found in caught.value.found


def test_a_header_of_a_gigabyte_is_not_read() -> None:
    stream = io.BytesIO(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with pytest.raises(ArchiveError, match="a header of"):
        read_weights(stream, "m.safetensors")


def test_a_file_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ArchiveError, match="neither written by torch"):
        read_weights(io.BytesIO(b"\x80\x02text"), "model.pth")


@given(shape=st.lists(st.integers(1, 5), max_size=4))
def test_a_contiguous_tensor_spans_its_numbers(shape: list[int]) -> None:
    tensor = Tensor("float32", tuple(shape), contiguous_stride(tuple(shape)), 0)
    assert tensor.is_contiguous
    assert tensor.span_bytes == 4 * tensor.count


@given(content=st.binary(max_size=200), name=st.sampled_from(["m.safetensors", "m.onnx", "m.pt"]))
def test_any_bytes_are_read_or_refused(content: bytes, name: str) -> None:
    with contextlib.suppress(ArchiveError):
        read_weights(io.BytesIO(content), name)
