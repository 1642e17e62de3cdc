from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Import = Callable[[str], Any]


@pytest.fixture
def read(handlers: Import) -> Callable[..., Any]:
    """Return a function that reads one part's value with the default limits or the given ones."""
    arrays, request = handlers("array_input"), handlers("inference_request")

    def read_value(value: Any, **limits: int) -> Any:
        return arrays.read_array(request.Part(value), arrays.ArrayLimits(**limits))

    return read_value


@pytest.fixture
def refuse(handlers: Import, read: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives the rejection of one part's value."""

    def refuse_value(value: Any, **limits: int) -> Any:
        with pytest.raises(handlers("problem").RejectedInput) as caught:
            read(value, **limits)
        return caught.value

    return refuse_value


def write_npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def claim_npy(shape: str, dtype: str = "<f8", body: bytes = b"") -> bytes:
    """Return npy whose header says anything."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body


def make_v2(shape: Any, datatype: Any, data: Any) -> dict[str, Any]:
    return {"name": "x", "shape": shape, "datatype": datatype, "data": data}


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", ">i2", "|u1", "<u4", "|b1"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3)])
def test_npy_is_read_as_numpy_reads_it(
    read: Callable[..., Any], dtype: str, shape: tuple[int, ...]
) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    for source in (array, np.array(array, order="F")):
        found = read(write_npy(source))
        assert (found.shape, found.dtype) == (shape, np.dtype(dtype).newbyteorder("="))
        assert np.array_equal(found, array)
        assert found.flags.c_contiguous
        assert found.flags.writeable  # torch warns of arrays that are not


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (5, ()),
        (1.5, ()),
        ([1, 2.5], (2,)),
        ([[1, 2], [3, 4]], (2, 2)),
        ([], (0,)),
        ([[], []], (2, 0)),
        ([True, 2], (2,)),
        ({"data": [1]}, (1,)),
    ],
)
def test_json_is_read_as_float32(
    read: Callable[..., Any], value: Any, shape: tuple[int, ...]
) -> None:
    found = read(value)
    assert (found.shape, found.dtype) == (shape, np.dtype("float32"))


def test_npy_in_base64_in_json_is_read(read: Callable[..., Any]) -> None:
    import base64

    text = base64.b64encode(write_npy(np.arange(3, dtype="int16"))).decode()
    for value in (text, {"b64": text}, {"data": text}):
        assert read(value).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("datatype", "dtype", "data"),
    [
        ("BOOL", "bool", [True, False]),
        ("UINT8", "uint8", [0, 255]),
        ("INT8", "int8", [-128, 127]),
        ("INT64", "int64", [-(2**63), 2**63 - 1]),
        ("UINT64", "uint64", [0, 2**64 - 1]),
        ("FP16", "float16", [1, 0.5]),
        ("FP64", "float64", [1, 0.1]),
        ("INT32", "int32", [1.0, 2.0]),
    ],
)
def test_a_v2_tensor_has_the_type_it_says(
    read: Callable[..., Any], datatype: str, dtype: str, data: list[Any]
) -> None:
    found = read(make_v2([2], datatype, data))
    assert found.dtype == dtype
    assert found.tolist() == data


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_a_v2_tensor_is_flat_or_nested(read: Callable[..., Any], data: Any) -> None:
    assert read(make_v2([2, 3], "FP32", data)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert read(make_v2([], "FP32", [7])).shape == ()


BOMB = ["a" * 30_000, *["a"] * 30_000]
"""numpy would make room for 30,000 letters in every place: 3.6 GB."""

REFUSED: dict[str, tuple[Any, int, str]] = {
    "no npy": (b"\x89PNG\r\n\x1a\n", 415, "expected npy, found 8 bytes beginning with"),
    "nothing": (b"", 415, "0 bytes"),
    "npy's first bytes": (b"\x93NUMPY", 400, "header"),
    "npy of an unknown version": (b"\x93NUMPY\x09\x00" + bytes(100), 400, "header"),
    "a header that is no Python": (b"\x93NUMPY\x01\x00\x10\x00" + bytes(16), 400, "header"),
    "a header without end": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, 400, "header"),
    "a header of brackets": (b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095, 400, "header"),
    "npy cut short": (write_npy(np.zeros(9))[:-1], 400, "expected the bytes of (9,) float64"),
    "npy with more behind it": (write_npy(np.zeros(9)) + b"x", 400, "expected the bytes of"),
    "npy of objects": (write_npy(np.array([{}], dtype=object)), 415, "found object"),
    "npy of text": (write_npy(np.array(["a"])), 415, "<U1"),
    "npy of complex numbers": (write_npy(np.zeros(2, "c8")), 415, "complex64"),
    "npy of dates": (write_npy(np.zeros(2, "M8[s]")), 415, "datetime64"),
    "npy of records": (write_npy(np.zeros(2, [("a", "f4")])), 415, "found"),
    "npy of long doubles": (claim_npy("(1,)", "<f16", bytes(16)), 415, "float128"),
    "a shape of many numbers": (claim_npy("(4000, 1001)"), 413, "found the shape [4000, 1001]"),
    "a shape beyond any memory": (claim_npy(f"({10**30}, 8)"), 413, "at most 4,000,000 numbers"),
    "a shape with a zero": (claim_npy(f"(0, {10**30})"), 413, "at most 4,000,000"),
    "a shape with a zero and large": (claim_npy(f"(0, {2**40}, {2**40})"), 413, "4,000,000"),
    "a shape with negative sizes": (claim_npy("(-2, -4)", body=bytes(64)), 400, "(-2, -4)"),
    "a shape with one negative size": (claim_npy("(-1,)", body=bytes(64)), 400, "(-1,)"),
    "a shape of truths": (claim_npy("(True,)", body=bytes(8)), 400, "True"),
    "many dimensions": (claim_npy(f"({'1, ' * 9})", body=bytes(8)), 413, "8 dimensions, found 9"),
    "ragged lists": ([[1, 2], [3]], 422, "one length"),
    "numbers beside lists": ([1, [2]], 422, "numbers beside lists"),
    "text": (["1.5"], 422, "something else"),
    "one text among numbers": ([1.0] * 9 + ["1.0"], 422, "something else"),
    "text that numpy would make a bomb": (BOMB, 422, "something else"),
    "null": ([1, None], 422, "something else"),
    "objects": ([{"b64": ""}], 422, "something else"),
    "a number beyond any type": ([10**400], 422, "something else"),
    "deep lists": (json.loads("[" * 60 + "1" + "]" * 60), 413, "8 dimensions, found 60"),
    "deeper lists": (json.loads("[" * 900 + "]" * 900), 413, "8 dimensions"),
    "an object with none": ({"a": 1, "b": 2}, 400, "expected bytes"),
    "null alone": (None, 400, "expected bytes"),
    "v2 of an unknown type": (make_v2([1], "FP8", [1]), 422, "datatype of BOOL"),
    "v2 of text": (make_v2([1], "BYTES", ["a"]), 422, "datatype of BOOL"),
    "v2 of a type that is a list": (make_v2([1], ["FP32"], [1]), 422, "datatype of BOOL"),
    "v2 of a type that is an object": (make_v2([1], {}, [1]), 422, "datatype of BOOL"),
    "v2 without a list of sizes": (make_v2(3, "FP32", [1, 2, 3]), 400, "list of sizes"),
    "v2 with sizes that are none": (make_v2([1.0], "FP32", [1]), 400, "list of sizes"),
    "v2 with a negative size": (make_v2([-1], "FP32", [1]), 400, "list of sizes"),
    "v2 with a truth as a size": (make_v2([True], "FP32", [1]), 400, "list of sizes"),
    "v2 of another size": (make_v2([3], "FP32", [1, 2]), 422, "3 numbers for shape [3], found 2"),
    "v2 beyond any memory": (make_v2([10**30], "FP32", []), 413, "4,000,000"),
    "v2 of sizes beyond any text": (make_v2([10**4000] * 2, "FP32", []), 413, "4,000,000"),
    "v2 with a zero": (make_v2([0, 10**30], "FP32", []), 413, "4,000,000"),
    "v2 with a zero and large": (make_v2([0, 2**40, 2**40], "FP32", []), 413, "4,000,000"),
    "v2 whose data is text": (make_v2([1], "FP32", "abc"), 422, "something else"),
    "v2 whose data is null": (make_v2([1], "FP32", None), 422, "something else"),
    "a byte above 255": (make_v2([1], "UINT8", [256]), 422, "cannot hold"),
    "a byte below 0": (make_v2([1], "UINT8", [-1]), 422, "cannot hold"),
    "half an integer": (make_v2([1], "INT32", [1.5]), 422, "cannot hold"),
    "an endless integer": (make_v2([1], "INT32", [float("inf")]), 422, "cannot hold"),
    "an integer that rounding lets in": (make_v2([1], "INT64", [2.0**63]), 422, "cannot hold"),
    "an integer of 65 bits": (make_v2([1], "UINT64", [2**64]), 422, "cannot hold"),
    "an unsigned one likewise": (make_v2([1], "UINT64", [2.0**64]), 422, "cannot hold"),
    "a truth that is 2": (make_v2([1], "BOOL", [2]), 422, "cannot hold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_array_is_refused_with_a_reason(refuse: Callable[..., Any], name: str) -> None:
    value, status, reason = REFUSED[name]
    rejected = refuse(value)
    assert (rejected.status, reason in rejected.detail) == (status, True), rejected.detail
    assert len(rejected.detail) < 5000


@pytest.mark.parametrize("name", ["text that numpy would make a bomb", "a shape of many numbers"])
def test_memory_is_taken_only_for_what_is_let_in(refuse: Callable[..., Any], name: str) -> None:
    tracemalloc.start()
    try:
        refuse(REFUSED[name][0])
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_the_limits_are_the_settings(read: Callable[..., Any], refuse: Callable[..., Any]) -> None:
    for value in ([[1, 2], [3, 4]], write_npy(np.zeros((2, 2))), make_v2([2, 2], "FP32", [1] * 4)):
        assert read(value, max_elements=4, max_dimensions=2).shape == (2, 2)
        assert refuse(value, max_elements=3).status == 413
        assert refuse(value, max_dimensions=1).status == 413


@pytest.fixture
def check(handlers: Import) -> Callable[..., Any]:
    """Return a function that checks an array against a declared input."""
    module = handlers("array_input")
    return lambda array, **spec: module.InputSpec(**spec).check(np.asarray(array))


@pytest.mark.parametrize(
    ("declared", "shape", "fits"),
    [
        (None, (1, 2, 3), True),
        ((), (), True),
        ((2, 3), (2, 3), True),
        ((None, 3), (9, 3), True),
        ((None, None), (0, 1), True),
        ((2, 3), (3, 2), False),
        ((2, 3), (6,), False),
        ((None, 3), (9, 4), False),
        ((), (1,), False),
    ],
)
def test_a_shape_is_held_to_what_is_declared(
    handlers: Import,
    check: Callable[..., Any],
    declared: tuple[int | None, ...] | None,
    shape: tuple[int, ...],
    fits: bool,
) -> None:
    if fits:
        assert check(np.zeros(shape), shape=declared).shape == shape
        return
    with pytest.raises(handlers("problem").RejectedInput, match="of shape") as caught:
        check(np.zeros(shape), shape=declared)
    assert caught.value.status == 422


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_let_in_only_where_it_is_wanted(
    handlers: Import, check: Callable[..., Any], value: float
) -> None:
    with pytest.raises(handlers("problem").RejectedInput, match="finite") as caught:
        check([1.0, value])
    assert caught.value.status == 422
    assert np.array_equal(check([1.0, value], allow_nan=True), [1.0, value], equal_nan=True)


@pytest.mark.parametrize(
    ("array", "datatype", "fits"),
    [
        (np.array([0.1]), "FP32", True),
        (np.array([300], "i8"), "FP16", True),
        (np.array([1e300]), "FP32", False),  # would be infinite
        (np.array([2.0**31], "f4"), "INT32", False),
        (np.array([-(2.0**31)], "f4"), "INT32", True),
        (np.array([2**32 - 1], "u8"), "UINT32", True),
        (np.array([2**32], "u8"), "UINT32", False),
        (np.array([0, 1], "u1"), "BOOL", True),
        (np.array([True]), "FP32", True),
        (np.array([True]), "INT8", True),
        (np.array([np.nan]), "INT8", False),
        (np.array([], "f4"), "INT8", True),
    ],
)
def test_numbers_are_converted_where_they_keep_their_meaning(
    handlers: Import, check: Callable[..., Any], array: Any, datatype: str, fits: bool
) -> None:
    if fits:
        found = check(array, datatype=datatype)
        assert found.dtype == handlers("inference_response").DATATYPES[datatype]
        assert np.allclose(found, array)
        return
    with pytest.raises(handlers("problem").RejectedInput) as caught:
        check(array, datatype=datatype)
    assert caught.value.status == 422


def test_an_input_is_declared_by_name_shape_and_type(handlers: Import) -> None:
    spec = handlers("array_input").InputSpec
    declared = {"name": "x", "shape": [3, None], "datatype": "INT8", "allow_nan": True}
    assert spec.parse(declared) == spec("x", (3, None), "INT8", True)
    assert spec.parse({}) == spec("input", None, None, False)
    with pytest.raises(ValueError, match=r"unknown keys \['dtype'\]"):
        spec.parse({"dtype": "FP32"})
    with pytest.raises(ValueError, match=r"expected one of .* found float"):
        spec.parse({"datatype": "float"})


WHOLE = write_npy(np.arange(6, dtype="<f4").reshape(2, 3))
SIZES = st.sampled_from([0, 1, -1, 2, 3, True, 10**6, 2**31, 2**63, 10**30]) | st.integers()
DTYPES = st.sampled_from(
    ["<f4", ">f8", "|u1", "<f16", "|O", "<c8", "<U4", "|V8", "<M8[s]", "f", ""]
)
HEADERS = st.builds(
    claim_npy,
    st.lists(SIZES, max_size=5).map(lambda sizes: f"({''.join(f'{size}, ' for size in sizes)})"),
    DTYPES,
    st.binary(max_size=40),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))])


NUMBERS = st.integers() | st.floats() | st.booleans()
LISTS = st.recursive(NUMBERS | st.none() | st.text(max_size=3), lambda x: st.lists(x, max_size=4))
TENSORS = st.builds(
    make_v2,
    st.lists(SIZES, max_size=4) | LISTS,
    st.sampled_from(["FP32", "INT8", "BOOL", "UINT64", "BYTES"]) | LISTS,
    LISTS,
)


@settings(max_examples=400, deadline=None)
@given(value=damaged() | HEADERS | st.binary(max_size=30) | LISTS | TENSORS)
def test_whatever_comes_is_an_array_or_refused_as_the_clients_fault(
    handlers: Import, value: Any
) -> None:
    module, part = handlers("array_input"), handlers("inference_request").Part(value)
    status = 400
    try:
        array = module.read_array(part, module.ArrayLimits())
        assert array.size <= 4_000_000
        assert array.dtype.kind in "biuf"
        module.InputSpec(datatype="INT32").check(array)
    except handlers("problem").RejectedInput as exc:
        status = exc.status
    assert 400 <= status < 500
