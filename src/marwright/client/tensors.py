"""The Open Inference Protocol (KServe v2): named arrays as JSON, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marwright.client.inputs import read_file
from marwright.errors import ClientError, UsageError

if TYPE_CHECKING:
    import numpy.typing

__all__ = ["Inference", "Tensor"]

NUMPY_TYPES = {
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
DATATYPES = {name: datatype for datatype, name in NUMPY_TYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """One named array of a request or an answer."""

    name: str
    datatype: str
    """FP32, INT64, BYTES or another of the protocol's words."""
    shape: tuple[int, ...]
    data: tuple[Any, ...]
    """The numbers or texts, row by row."""

    @classmethod
    def create(cls, name: str, values: Any) -> Tensor:
        """Make one of an array, or of a list of texts, bytes or files; bytes go as base64.

        Raises:
            UsageError: the protocol has no such values.
            StorageError: a file cannot be read.
        """
        if isinstance(values, (str, bytes, Path)):
            values = [values]
        if isinstance(values, Sequence) and any(isinstance(v, (str, bytes, Path)) for v in values):
            texts = tuple(_encode_text(value) for value in values)
            return cls(name, "BYTES", (len(texts),), texts)
        import numpy as np

        try:
            array = np.asarray(values)
        except (TypeError, ValueError, RuntimeError) as exc:
            raise UsageError(f"{name} is no array", found=str(exc)) from exc
        if array.dtype.kind in "US":
            return cls(name, "BYTES", array.shape, tuple(map(_encode_text, array.ravel().tolist())))
        if array.dtype.name not in DATATYPES:
            raise UsageError(
                f"the protocol has no such numbers for {name}",
                expected=", ".join(DATATYPES),
                found=array.dtype.name,
            )
        return cls(name, DATATYPES[array.dtype.name], array.shape, tuple(array.ravel().tolist()))

    @classmethod
    def from_response(cls, item: Mapping[str, Any]) -> Tensor:
        """Read one entry of `outputs`; lists within lists are taken apart."""
        data: list[Any] = item["data"]
        while data and isinstance(data[0], list):
            data = [value for row in data for value in row]
        shape = tuple(int(side) for side in item["shape"])
        return cls(str(item["name"]), str(item["datatype"]), shape, tuple(data))

    def to_json(self) -> dict[str, Any]:
        """Return the tensor as it stands in a request."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "datatype": self.datatype,
            "data": list(self.data),
        }

    def numpy(self) -> numpy.typing.NDArray[Any]:
        """Return the array; texts are objects.

        Raises:
            ClientError: data, shape and datatype do not fit one another.
        """
        import numpy as np

        try:
            array = np.array(self.data, NUMPY_TYPES.get(self.datatype, "object"))
            return array.reshape(self.shape)
        except (TypeError, ValueError, OverflowError) as exc:
            raise ClientError(
                f"the model's {self.name} is no array",
                expected=f"{self.datatype} of shape {list(self.shape)}",
                found=f"{len(self.data)} values",
            ) from exc


@dataclass(frozen=True)
class Inference:
    """An answer by the protocol."""

    model: str
    version: str
    id: str
    """The id that the request gave itself."""
    outputs: Mapping[str, Tensor]
    """By name, in the model's order."""

    def __getitem__(self, name: str) -> numpy.typing.NDArray[Any]:
        """Return one output as an array.

        Raises:
            UsageError: there is none of this name.
        """
        if name not in self.outputs:
            raise UsageError(
                f"the model has no output {name}", expected=" or ".join(self.outputs) or "none"
            )
        return self.outputs[name].numpy()

    @classmethod
    def from_response(cls, answer: Mapping[str, Any]) -> Inference:
        """Read a body of /v2/models/NAME/infer."""
        tensors = [Tensor.from_response(item) for item in answer["outputs"]]
        return cls(
            model=str(answer["model_name"]),
            version=str(answer.get("model_version") or ""),
            id=str(answer.get("id") or ""),
            outputs={tensor.name: tensor for tensor in tensors},
        )


def _encode_text(value: Any) -> str:
    if isinstance(value, Path):
        value = read_file(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, str):
        return value
    raise UsageError("texts and other values stand in one list", found=type(value).__name__)
