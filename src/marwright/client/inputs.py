"""Inputs of a model as bodies of requests: files, JSON, arrays, parts of a form."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from marwright.errors import UsageError
from marwright.storage import translate_os_errors

__all__ = ["Body", "encode_input", "encode_instance", "encode_json", "encode_parts", "Input"]

Input = Any
"""bytes or a Path as they are, str as text, a dict or a list as JSON, an array as npy."""

JSON = "application/json"
RAW = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
NPY = "application/x-npy"


class Body(NamedTuple):
    """What is posted."""

    content_type: str
    content: bytes


def encode_input(data: Input) -> Body:
    """Return one input as it is posted.

    Raises:
        StorageError: a file cannot be read.
        UsageError: nothing of this kind can be sent.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return Body(RAW, bytes(data))
    if isinstance(data, Path):
        return Body(RAW, read_file(data))
    if isinstance(data, str):
        return Body(TEXT, data.encode())
    if isinstance(data, (Mapping, list, tuple)):
        return Body(JSON, encode_json(data))
    if hasattr(data, "__array__"):  # of numpy and of torch, without importing either
        return Body(NPY, encode_array(data))
    raise UsageError(
        "an input of this kind cannot be sent",
        expected="bytes, a Path, text, a dict, a list or an array",
        found=type(data).__name__,
    )


def read_file(path: Path) -> bytes:
    """Return a file's bytes, or raise StorageError."""
    with translate_os_errors(f"read {path}"):
        return path.read_bytes()


def encode_json(value: Any, *, other: Callable[[Any], Any] | None = None) -> bytes:
    """Return JSON; `other` makes JSON of what is none by itself.

    Raises:
        StorageError: a file cannot be read.
        UsageError: the value is none that JSON has.
    """
    if isinstance(value, Mapping):
        value = dict(value)
    try:
        return json.dumps(value, allow_nan=False, default=other).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        if isinstance(exc, UsageError):
            raise
        raise UsageError("the input cannot be sent as JSON", found=str(exc)) from exc


def encode_instance(value: Any) -> Any:
    """Return bytes and files as {"b64": ...} and arrays as lists, as KServe v1 has them."""
    if isinstance(value, Path):
        value = read_file(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"b64": base64.b64encode(value).decode()}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"JSON has no {type(value).__name__}")


def encode_array(array: Any) -> bytes:
    """Return an array in NumPy's file format; of objects, there would be a pickle in it."""
    import numpy as np

    buffer = io.BytesIO()
    try:
        np.save(buffer, np.asarray(array), allow_pickle=False)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise UsageError("the array cannot be sent", found=str(exc)) from exc
    return buffer.getvalue()


def encode_parts(parts: Mapping[str, Input]) -> Body:
    """Return inputs as a form of several parts, each under its name.

    Raises what encode_input raises.
    """
    from urllib3.filepost import encode_multipart_formdata

    fields = []
    for name, data in parts.items():
        body = encode_input(data)
        file = data.name if isinstance(data, Path) else name
        fields.append((name, (file, body.content, body.content_type)))
    content, content_type = encode_multipart_formdata(fields)
    return Body(content_type, content)
