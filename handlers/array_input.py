"""From what a request says to one array: npy, JSON, the Open Inference Protocol's tensors.

Shapes and sizes are counted before memory is taken; what numpy would convert without a word
(text to numbers, 300 to a byte, 1.5 to an integer) is refused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from inference_request import Part
from inference_response import DATATYPES
from problem import RejectedInput

__all__ = ["ArrayLimits", "InputSpec", "read_array"]

Array = np.ndarray[Any, Any]

NPY_MAGIC = b"\x93NUMPY"
BYTES_KINDS = (bytes, bytearray, memoryview)


@dataclass(frozen=True)
class ArrayLimits:
    """What an array may be, counted before it is made."""

    max_elements: int = 4_000_000
    max_dimensions: int = 8


@dataclass(frozen=True)
class InputSpec:
    """One input of the model."""

    name: str = "input"
    shape: tuple[int | None, ...] | None = None
    """Of one thing, without the batch axis; None for a free dimension, or for a free shape."""
    datatype: str | None = None
    """Such as FP32; npy and v2 bring their own where it is not declared, JSON means FP32."""
    allow_nan: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> InputSpec:
        """Read one entry of the setting `inputs`.

        Raises:
            ValueError: an unknown key or datatype.
        """
        if unknown := set(values) - {"name", "shape", "datatype", "allow_nan"}:
            raise ValueError(f"handler.inputs: unknown keys {sorted(unknown)}")
        datatype = values.get("datatype")
        if datatype is not None and datatype not in DATATYPES:
            raise ValueError(f"handler.inputs: expected one of {list(DATATYPES)}, found {datatype}")
        shape = values.get("shape")
        return cls(
            name=str(values.get("name", "input")),
            shape=None if shape is None else tuple(shape),
            datatype=datatype,
            allow_nan=bool(values.get("allow_nan", False)),
        )

    def check(self, array: Array) -> Array:
        """Return the array of one thing in the declared type.

        Raises:
            RejectedInput: 422 for another shape, for values the type cannot hold, for NaN.
        """
        if self.shape is not None:
            fits = len(self.shape) == array.ndim and all(
                want in (None, have) for want, have in zip(self.shape, array.shape, strict=True)
            )
            if not fits:
                want = ["any" if size is None else size for size in self.shape]
                raise RejectedInput(
                    422, f"expected {self.name} of shape {want}, found {list(array.shape)}"
                )
        if self.datatype is not None:
            array = _cast(array, np.dtype(DATATYPES[self.datatype]), self.name)
        if not self.allow_nan and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RejectedInput(
                422, f"expected finite numbers in {self.name}, found NaN or infinity"
            )
        return array


def read_array(part: Part, limits: ArrayLimits) -> Array:
    """Return the array of one part.

    Bytes are npy; JSON is a list of numbers (float32), {"data": ...} of either, or a v2 tensor.

    Raises:
        RejectedInput: 400 for what is no array, 413 for too large a one, 415 for other bytes, 422
            for lists that are ragged or hold no numbers.
    """
    value = part.value
    if isinstance(value, Mapping) and {"shape", "datatype", "data"} <= set(value):
        return _read_v2(value, limits)
    if isinstance(value, Mapping) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, (list, int, float)):
        return _read_list(value, limits, np.dtype("float32"))
    return _read_npy(part.read_bytes(), limits)


def _read_npy(data: bytes | bytearray | memoryview, limits: ArrayLimits) -> Array:
    data = bytes(data)
    if not data.startswith(NPY_MAGIC):
        raise RejectedInput(
            415, f"expected npy, found {len(data):,} bytes beginning with {data[:12]!r}"
        )
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream, max_header_size=4096)
    except Exception as exc:  # numpy parses the header as Python; its faults are of many types
        raise RejectedInput(400, f"expected npy, found a header that is none: {exc}") from exc
    _check_size(shape, limits)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise RejectedInput(415, f"expected npy of numbers, found {dtype}")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise RejectedInput(400, f"expected the bytes of {shape} {dtype}, found {len(data):,}")
    stream.seek(0)
    array: Array = np.load(stream, allow_pickle=False)
    return np.asarray(array, dtype.newbyteorder("="), order="C")


def _read_v2(value: Mapping[str, Any], limits: ArrayLimits) -> Array:
    datatype, shape, data = value["datatype"], value["shape"], value["data"]
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise RejectedInput(
            422, f"expected a datatype of {', '.join(DATATYPES)}, found {str(datatype)[:40]!r}"
        )
    if not isinstance(shape, list):
        raise RejectedInput(400, "expected shape to be a list of sizes")
    _check_size(shape, limits)
    array = _read_list(data, limits, np.dtype(DATATYPES[datatype]))
    if array.size != math.prod(shape):
        raise RejectedInput(
            422, f"expected {math.prod(shape):,} numbers for shape {shape}, found {array.size:,}"
        )
    return array.reshape(shape)


def _read_list(value: Any, limits: ArrayLimits, dtype: np.dtype[Any]) -> Array:
    kinds = _check_list(value, limits)
    # By itself numpy makes floats of [0, 2**63]; told the type it keeps whole numbers.
    known = dtype if dtype.kind in "iu" and kinds == {int} else None
    try:
        array = np.asarray(value, known)
    except OverflowError as exc:
        raise RejectedInput(
            422, f"expected data as {dtype.name}, found values it cannot hold"
        ) from exc
    except ValueError as exc:
        raise RejectedInput(422, "expected lists of one length, found ragged ones") from exc
    if array.dtype.kind not in "biuf":
        raise RejectedInput(422, "expected lists of numbers, found something else in them")
    _check_size(array.shape, limits)
    return _cast(array, dtype, "data")


def _check_list(value: Any, limits: ArrayLimits) -> set[type]:
    """Refuse all but lists of numbers before numpy takes memory; return the numbers' types.

    Text among them would make it reserve the longest one's size in every place.
    """
    level, depth = [value], 0
    while (kinds := set(map(type, level))) == {list}:
        level, depth = list(chain.from_iterable(level)), depth + 1
    _check_size([1] * depth, limits)
    if list in kinds:
        raise RejectedInput(422, "expected lists of one length, found numbers beside lists")
    if not kinds <= {int, float, bool}:
        raise RejectedInput(422, "expected lists of numbers, found something else in them")
    return kinds


def _check_size(shape: Sequence[int], limits: ArrayLimits) -> None:
    """Refuse what is no shape, and a large one, also where a size of 0 makes it empty."""
    if not all(type(size) is int and size >= 0 for size in shape):
        raise RejectedInput(400, f"expected a list of sizes as shape, found {str(shape)[:80]}")
    if len(shape) > limits.max_dimensions:
        raise RejectedInput(
            413, f"expected at most {limits.max_dimensions} dimensions, found {len(shape)}"
        )
    if math.prod(size or 1 for size in shape) > limits.max_elements:
        raise RejectedInput(
            413,
            f"expected at most {limits.max_elements:,} numbers, "
            f"found the shape {str(list(shape))[:80]}",
        )


def _cast(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Convert without loss of meaning: floats may round, integers may not wrap or be cut."""
    if array.dtype == dtype:
        return array
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            return array.astype(dtype)
    if dtype.kind == "b":
        allowed = array.dtype.kind == "b" or bool(np.isin(array, (0, 1)).all())
    elif array.size == 0:
        allowed = True
    else:
        limits = np.iinfo(dtype)
        # As Python's numbers, which compare exactly: numpy would round the limits to floats.
        low, high = array.min().item(), array.max().item()
        whole = array.dtype.kind != "f" or bool((np.floor(array) == array).all())
        allowed = whole and limits.min <= low and high <= limits.max
    if not allowed:
        raise RejectedInput(422, f"expected {name} as {dtype.name}, found values it cannot hold")
    return array.astype(dtype)
