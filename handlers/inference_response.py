"""How predictions are written: JSON, KServe v1 and v2, npy, raw numbers, a picture.

The client says which by its Accept header (RFC 9110, section 12.5.1); without one it is JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from inference_request import InferenceRequest
from problem import PROBLEM_TYPE, RejectedInput, make_problem, title_of

__all__ = [
    "Arrays",
    "choose_type",
    "DATATYPES",
    "InferenceResponse",
    "JSON_TYPE",
    "NAMES",
    "NPY_TYPE",
    "PNG_TYPE",
    "RAW_TYPE",
    "render",
    "render_problem",
]

JSON_TYPE = "application/json"
NPY_TYPE = "application/x-npy"
RAW_TYPE = "application/octet-stream"
PNG_TYPE = "image/png"

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
"""The Open Inference Protocol's names of numeric types, and numpy's; BYTES is text."""
NAMES = {name: key for key, name in DATATYPES.items()}

Arrays = Mapping[str, "torch.Tensor | np.ndarray[Any, Any] | list[str]"]
"""One prediction as named arrays; a list of text is an array of BYTES."""

# Made once: json.dumps makes an encoder for every call that has settings.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


@dataclass
class InferenceResponse:
    """What one client gets."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        """The reason phrase; empty for 200, where TorchServe adds its own."""
        return "" if self.status == 200 else title_of(self.status)


def render_problem(status: int, detail: str, *, instance: str = "") -> InferenceResponse:
    """Return the answer to a request that was refused or failed."""
    return InferenceResponse(status, PROBLEM_TYPE, make_problem(status, detail, instance=instance))


@lru_cache(maxsize=256)
def choose_type(accept: str, offered: tuple[str, ...]) -> str:
    """Return which of the offered types the client prefers; the first where it does not care.

    Raises:
        RejectedInput: 406 where it accepts none of them.
    """
    if not accept or accept == "*/*":
        return offered[0]
    best, best_quality = "", 0.0
    for offer in offered:
        quality = _quality(accept, offer)
        if quality > best_quality:
            best, best_quality = offer, quality
    if not best:
        raise RejectedInput(406, f"expected Accept to name one of {', '.join(offered)}")
    return best


def _quality(accept: str, offer: str) -> float:
    """Return the weight of the most specific range that covers a type; 0 where none does."""
    ranges = ("*/*", f"{offer.partition('/')[0]}/*", offer)
    specificity, quality = -1, 0.0
    for entry in accept.lower().split(","):
        media, _, parameters = entry.partition(";")
        media = media.strip()
        if media in ranges and ranges.index(media) > specificity:
            specificity, quality = ranges.index(media), _weight(parameters)
    return quality


def _weight(parameters: str) -> float:
    """Return the q of a media range: 1 where it has none, 0 where it is no number."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def render(
    request: InferenceRequest,
    values: Sequence[Any],
    arrays: Callable[[], Sequence[Arrays]],
    *,
    model: str,
    version: str,
) -> InferenceResponse:
    """Write the predictions of one request in its own form and the type its client asks for.

    `values` are what JSON says, one for each thing to predict; `arrays` gives the same as arrays,
    and is called only where the answer needs them.

    Raises:
        RejectedInput: 406 where the client accepts nothing that these predictions can be.
        ValueError: a value that JSON cannot carry, such as NaN.
    """
    if request.form == "v2":
        outputs = _stack(arrays())
        body: Any = {
            "model_name": model,
            "model_version": version,
            "id": request.client_id or request.id,
            "outputs": [_write_output(name, array) for name, array in outputs.items()],
        }
        return _write_json(body)
    kind = choose_type(request.accept, (JSON_TYPE, NPY_TYPE, RAW_TYPE))
    if kind != JSON_TYPE:
        return _write_array(arrays(), kind, single=request.form == "one")
    if request.form == "one" and len(values) == 1:
        body = values[0]
    elif request.form == "v1":
        body = {"explanations" if request.is_explanation else "predictions": list(values)}
    elif request.form == "columns":
        body = {"outputs": list(values)}
    else:
        body = list(values)
    return _write_json(body)


def _write_json(body: Any) -> InferenceResponse:
    # A lone surrogate, which a client's own id may hold, has an escape in JSON and no UTF-8.
    return InferenceResponse(200, JSON_TYPE, _encode(body).encode("utf-8", "backslashreplace"))


def _stack(items: Sequence[Arrays]) -> dict[str, np.ndarray[Any, Any]]:
    """Stack the arrays of several predictions along a new first axis.

    Raises:
        RejectedInput: 422 where they differ in shape: these forms have no ragged arrays.
    """
    stacked = {}
    for name in items[0]:
        arrays = [_to_numpy(item[name]) for item in items]
        if len({array.shape for array in arrays}) > 1:
            raise RejectedInput(
                422,
                f"expected outputs of one shape to stack, found {name} in "
                f"{sorted({str(array.shape) for array in arrays})}; ask for JSON, or one at a time",
            )
        stacked[name] = np.stack(arrays)
    return stacked


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # numpy knows no bfloat16.
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(value)


def _write_output(name: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": NAMES.get(array.dtype.name, "BYTES"),
        "data": array.ravel().tolist(),
    }


def _write_array(items: Sequence[Arrays], kind: str, *, single: bool) -> InferenceResponse:
    """Write the first array of the predictions as npy, or as raw little-endian numbers."""
    stacked = _stack([{name: item[name] for name in list(item)[:1]} for item in items])
    name, array = next(iter(stacked.items()))
    if single and len(items) == 1:
        array = array[0]
    if array.dtype.kind in "US":
        raise RejectedInput(406, f"expected numbers to write as {kind}, found text: ask for JSON")
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    headers = {"x-array-name": name}
    if kind == NPY_TYPE:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return InferenceResponse(200, kind, buffer.getvalue(), headers)
    headers["x-array-shape"] = ",".join(map(str, array.shape))
    headers["x-array-dtype"] = array.dtype.name
    return InferenceResponse(200, kind, array.tobytes(), headers)
