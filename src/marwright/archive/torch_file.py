"""Files that torch writes: state dicts, TorchScript, exported programs.

Each is a zip file. A pickle, or JSON, describes the tensors; their numbers stand in members of
their own. The pickle is read by an unpickler to which every class is a mere name: nothing is
imported, nothing called.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from marwright.archive.container import printable
from marwright.archive.tensors import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    Tensor,
    Weights,
    read_sizes,
    unreadable,
)
from marwright.archive.zip_layout import data_offset, find_directory
from marwright.errors import MarwrightError

__all__ = ["read_torch"]

MAX_DEPTH = 64
"""Of parts within parts of a model."""
MAX_LEAVES = 200_000
"""Tensors, numbers and texts of one file."""
MAX_NAME = 500
"""Characters of a tensor's whole name."""

_CONFIG = "data/weights/model_weights_config.json"

_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32"},
    **{"ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8"},
    **{"BoolStorage": "bool", "ComplexFloatStorage": "complex64"},
    **{"ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8"},
    **{"QUInt8Storage": "quint8", "QInt32Storage": "qint32"},
}
_SCALAR_TYPES = {
    **{1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32"},
    **{8: "float64", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16"},
    **{28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2"},
}
"""torch/_export/serde/schema.py, ScalarType."""

# What a pickle or JSON that is not as torch writes it makes of the code below.
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_torch(stream: IO[bytes], name: str) -> Weights:
    """List the tensors of a file that torch wrote; see read_weights."""
    try:
        find_directory(stream, name)
        with zipfile.ZipFile(stream) as file:
            return _TorchFile(stream, file, name).list_tensors()
    except MarwrightError:
        raise
    except _BROKEN as exc:
        reason = " ".join(str(exc).split())[:200]
        raise unreadable(name, printable(reason) or type(exc).__name__) from exc


class _TorchFile:
    """The members of such a file; all stand below one folder, which is left out of their names."""

    def __init__(self, stream: IO[bytes], file: zipfile.ZipFile, name: str) -> None:
        self._stream, self._file, self._name = stream, file, name
        self._members = {
            info.filename.partition("/")[2]: info for info in file.infolist() if not info.is_dir()
        }

    def list_tensors(self) -> Weights:
        if "byteorder" in self._members and self._read("byteorder") != b"little":
            raise unreadable(self._name, "numbers in another order of bytes")
        if "data.pkl" in self._members:
            leaves = dict(self._read_pickle("data"))
            if "constants.pkl" in self._members:
                leaves |= dict(self._read_pickle("constants"))
            format = "TorchScript" if "constants.pkl" in self._members else "torch.save"
        elif _CONFIG in self._members:
            leaves = dict(self._read_exported())
            format = "exported program"
        else:
            raise unreadable(self._name, "a zip file that torch did not write")
        return Weights(
            self._stream,
            format,
            tensors={key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)},
            values={key: leaf for key, leaf in leaves.items() if not isinstance(leaf, Tensor)},
            parts={
                key: info.CRC
                for key, info in self._members.items()
                if key.startswith(("code/", "models/")) and not key.endswith(".debug_pkl")
            },
        )

    def _read(self, key: str) -> bytes:
        with self._file.open(self._members[key]) as member:
            content = member.read(MAX_HEADER_BYTES + 1)
        if len(content) > MAX_HEADER_BYTES:
            raise ValueError(f"{key} has more than {MAX_HEADER_BYTES:,} bytes")
        return content

    def _read_pickle(self, part: str) -> Iterator[tuple[str, Any]]:
        tree = _unpickle(self._read(f"{part}.pkl"))
        for key, leaf in _list_leaves(tree, "" if part == "data" else part):
            # A class or a function is told by its path.
            yield (
                key,
                self._rebuild(leaf, part) if _is_tensor(leaf) else getattr(leaf, "path", leaf),
            )

    def _rebuild(self, call: _Named, part: str) -> Tensor:
        """Return the tensor that a call of torch._utils._rebuild_... would return."""
        (_, storage, key, _, _), offset, shape, stride, *more = call.parts
        dtype = _STORAGES.get(storage.path.removeprefix("torch."), storage.path)
        if call.rebuild == "tensor_v3":  # (requires_grad, hooks, dtype): a storage without type
            dtype = more[2].path.removeprefix("torch.")
        return self._make_tensor(f"{part}/{key}", dtype, offset, shape, stride)

    def _make_tensor(self, key: str, dtype: str, offset: int, shape: Any, stride: Any) -> Tensor:
        info = self._members[key]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{key} is compressed")
        (offset,) = read_sizes([offset])
        start = data_offset(self._stream, info.header_offset)
        tensor = Tensor(
            dtype,
            read_sizes(shape),
            read_sizes(stride),
            start + offset * ITEM_BYTES[dtype],
        )
        if offset < 0 or tensor.offset + tensor.span_bytes > start + info.file_size:
            raise ValueError(f"a tensor that reaches beyond {key}")
        return tensor

    def _read_exported(self) -> Iterator[tuple[str, Any]]:
        for key, item in json.loads(self._read(_CONFIG))["config"].items():
            about = item["tensor_meta"]
            if item["use_pickle"]:
                raise ValueError(f"{key} is pickled")
            yield (
                key,
                self._make_tensor(
                    f"data/weights/{item['path_name']}",
                    _SCALAR_TYPES[about["dtype"]],
                    about["storage_offset"]["as_int"],
                    [size["as_int"] for size in about["sizes"]],
                    [step["as_int"] for step in about["strides"]],
                ),
            )


class _Named:
    """An object of some class, or what some function returned: only told, never made."""

    path = ""
    """Module and name of the class or function."""
    parts: list[Any]
    """Its arguments, state and elements."""
    items: list[tuple[Any, Any]]
    """What a dictionary of its own kind holds."""

    def __new__(cls, *arguments: Any) -> _Named:
        named = super().__new__(cls)
        named.parts, named.items = list(arguments), []
        return named

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.parts.append(value)

    @property
    def rebuild(self) -> str:
        """Which of torch's functions was to be called: `tensor_v2`, `qtensor`; "" for others."""
        _, prefix, name = self.path.partition("torch._utils._rebuild_")
        return name if prefix else ""


class _Unpickler(pickle.Unpickler):
    """Makes dicts, lists, tuples, numbers, text and _Named, and nothing else."""

    def find_class(self, module: str, name: str) -> type[_Named]:
        return type("_Named", (_Named,), {"path": f"{module}.{name}"})

    def persistent_load(self, reference: Any) -> Any:
        return reference


def _unpickle(content: bytes) -> Any:
    """Read a pickle, unless it could ask for more memory than its length would let one think."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.proto > 2:  # torch writes protocol 2 everywhere
            raise ValueError(f"a pickle of protocol {opcode.proto} ({opcode.name})")
        if opcode.name.endswith("PUT") and (argument or 0) > len(content):
            raise ValueError(f"a pickle that remembers {argument:,} things")
    return _Unpickler(io.BytesIO(content)).load()


def _list_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield tensors, numbers and texts by their names; a part that is shared, under one of them."""
    pending = [(name, tree, 0)]
    seen: set[int] = set()
    count = 0
    while pending:
        name, value, depth = pending.pop()
        children = _list_children(value)
        if _is_tensor(value) or not children:
            yield name, value
            count += 1
        if depth > MAX_DEPTH or len(name) > MAX_NAME or count > MAX_LEAVES:
            raise ValueError(f"{name[:40]} lies too deep, or is one of too many")
        if id(value) in seen:
            continue
        seen.add(id(value))
        for key, child in reversed(children):
            pending.append((".".join(part for part in (name, key) if part), child, depth + 1))


def _list_children(value: Any) -> list[tuple[str, Any]]:
    """Return what a value is made of, each with what it adds to the name."""
    if isinstance(value, dict):
        return [(str(key)[:MAX_NAME], item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(number), item) for number, item in enumerate(value)]
    if not isinstance(value, _Named):
        return []
    if value.rebuild == "qtensor":  # its scale and zero point
        return [("quantizer", value.parts[4])]
    if value.rebuild == "parameter":
        return [("", value.parts[0])]
    if _is_tensor(value):
        return []
    return [("", part) for part in value.parts] + [
        (str(key)[:MAX_NAME], item) for key, item in value.items
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Named) and value.rebuild in ("tensor_v2", "tensor_v3", "qtensor")
