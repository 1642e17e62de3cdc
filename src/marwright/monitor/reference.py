"""What a model looked like at its training: the member `reference.npz` of an archive.

It may come from anybody: every size, shape and type is checked before anything is made of it, and
nothing in it is ever executed (allow_pickle is off by construction: arrays of numbers and text).
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marwright.archive.reader import Archive
from marwright.archive.run import REFERENCE_NAME
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["Reference"]

FORMAT = 1
MOST_BYTES = 64 << 20
"""Of the file, and of all of its arrays together."""
MOST_ROWS = 10_000
MOST_FEATURES = 1024
MOST_POINTS = 1000
"""Rows of the embedding."""
MOST_NUMBERS = 16_384
"""Columns of the embedding."""
MOST_LETTERS = 4096
"""Of a class or a feature's name."""
ENDING = ".npy"
PACKINGS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Those of numpy. Others are other decoders, and LZMA's makes as much room as it is told to."""

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]

SHAPES = {
    "format": ("iu", 0),
    "features": ("f", 2),
    "feature_names": ("U", 1),
    "confidence": ("f", 1),
    "prediction": ("U", 1),
    "embedding": ("f", 2),
    "accuracy": ("f", 0),
}
"""Kind and number of dimensions of each array."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of held-out data; rows belong together, but for the embedding's."""

    features: Floats
    """(n, k); a value that is missing is not a number."""
    feature_names: tuple[str, ...]
    confidence: Floats
    """(n,), or empty where the model has none."""
    prediction: npt.NDArray[np.str_]
    """(n,), or empty where the model predicts no classes."""
    embedding: Floats
    """(m, d), or empty."""
    accuracy: float | None = None
    """Of the model on those rows."""

    @classmethod
    def read(cls, path: Path) -> Reference | None:
        """Return an archive's reference, or that of a .npz file; None where an archive has none.

        Raises:
            ArchiveError: it is damaged, too large, or holds something else.
            StorageError: the file cannot be read.
        """
        if path.suffix == ".npz":
            with translate_os_errors(f"read {path}"), path.open("rb") as stream:
                data = stream.read(MOST_BYTES + 1)
            return cls.parse(data, source=str(path))
        with Archive.open(path) as archive:
            if REFERENCE_NAME not in archive.names:
                return None
            data = archive.read(REFERENCE_NAME, limit=MOST_BYTES)
        return cls.parse(data, source=f"{REFERENCE_NAME} of {path}")

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> Reference:
        """Read the bytes of a .npz file.

        Raises:
            ArchiveError: it is damaged, too large, or holds something else.
        """
        if len(data) > MOST_BYTES:
            raise _refuse(source, f"at most {MOST_BYTES} bytes", "more")
        arrays = _read_arrays(data, source)
        if int(arrays.get("format", np.array(0))) != FORMAT:
            found = str(arrays["format"]) if "format" in arrays else "none"
            raise _refuse(source, f"format {FORMAT}", found)
        nothing = np.zeros((0, 0), np.float32)
        accuracy = arrays.get("accuracy")
        made = cls(
            features=_narrow(arrays.get("features", nothing)),
            feature_names=tuple(map(str, arrays.get("feature_names", ()))),
            confidence=_narrow(arrays.get("confidence", nothing[0:0, 0:0].ravel())),
            prediction=np.asarray(arrays.get("prediction", np.zeros(0, "U1")), np.str_),
            embedding=_narrow(arrays.get("embedding", nothing)),
            accuracy=float(accuracy) if accuracy is not None else None,
        )
        made._check(source)
        return made

    @property
    def rows(self) -> int:
        """How many rows of data it was taken from."""
        return max(len(self.features), len(self.confidence), len(self.prediction))

    def _check(self, source: str) -> None:
        names, lengths = self.feature_names, {len(self.confidence), len(self.prediction)}
        if self.features.shape[1] != len(names) or len(set(names)) < len(names):
            found = f"{self.features.shape[1]} columns, {len(set(names))} names"
            raise _refuse(source, "a name of its own for each feature", found)
        if (names and len(self.features) != self.rows) or not lengths <= {0, self.rows}:
            counts = [len(self.features), *sorted(lengths)]
            raise _refuse(source, "as many rows of each", ", ".join(map(str, counts)))
        if not all(name and name.isprintable() for name in names):
            raise _refuse(source, "names of letters that can be printed", "others")
        limits = [(self.rows, MOST_ROWS), (len(names), MOST_FEATURES)]
        limits += zip(self.embedding.shape, (MOST_POINTS, MOST_NUMBERS), strict=True)
        for number, most in limits:
            if number > most:
                raise _refuse(source, f"at most {most} rows or columns", str(number))
        shares = self.confidence[np.isfinite(self.confidence)]
        if shares.size and not (shares.min() >= 0 and shares.max() <= 1):
            raise _refuse(source, "confidences from 0 to 1", f"{shares.min()} to {shares.max()}")
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise _refuse(source, "an accuracy from 0 to 1", str(self.accuracy))


def _read_arrays(data: bytes, source: str) -> Mapping[str, Array]:
    """Return the arrays of a .npz file by name, none of them larger than what is left of it."""
    arrays: dict[str, Array] = {}
    left = MOST_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for info in file.infolist():
                name = info.filename.removesuffix(ENDING)
                if name not in SHAPES or name in arrays or info.filename == name:
                    raise _refuse(source, f"arrays {', '.join(SHAPES)}, each once", repr(name))
                if info.compress_type not in PACKINGS:
                    raise _refuse(source, f"{name} packed by numpy", f"type {info.compress_type}")
                with file.open(info) as stream:
                    content = stream.read(left + 1)
                if len(content) > left:
                    raise _refuse(source, f"at most {MOST_BYTES} bytes unpacked", "more")
                left -= len(content)
                arrays[name] = _read_array(name, content, source)
    except ArchiveError:
        raise
    except (
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError),
        *(OSError, ValueError),
    ) as exc:
        raise _refuse(source, "a .npz file of numpy", f"{type(exc).__name__}: {exc}") from exc
    return arrays


def _read_array(name: str, content: bytes, source: str) -> Array:
    """Return one array of a .npz file, as its own header describes it.

    numpy's reader makes room for whatever a header says, so that only the header is read by it.
    """
    kinds, dimensions = SHAPES[name]
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in {(1, 0), (2, 0)}:
            raise ValueError(f"version {version}")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_column_major, kind = read(stream)
    except (ValueError, TypeError, OverflowError, SyntaxError, tokenize.TokenError) as exc:
        found = f"{type(exc).__name__}: {str(exc)[:100]}"
        raise _refuse(source, f"{name} as numpy writes it", found) from exc
    if (
        kind.kind not in kinds
        or kind.names
        or len(shape) != dimensions
        or min(shape, default=0) < 0
    ):
        raise _refuse(source, f"{name} with {dimensions} dimensions", f"{kind} {shape}")
    if kind.kind == "U" and not 0 < kind.itemsize <= 4 * MOST_LETTERS:
        raise _refuse(source, f"texts of 1 to {MOST_LETTERS} letters", str(kind))
    values = content[stream.tell() :]
    if math.prod(shape) * kind.itemsize != len(values):
        raise _refuse(source, f"{len(values)} bytes of {name}", f"{kind} {shape}")
    flat = np.frombuffer(values, kind)
    if kind.kind == "U":
        letters = flat.view(np.dtype("u4").newbyteorder(kind.byteorder))
        if ((letters > 0x10FFFF) | ((letters >= 0xD800) & (letters < 0xE000))).any():
            raise _refuse(source, f"{name} as text", "numbers that are no letters")
    return flat.reshape(shape, order="F" if is_column_major else "C")


def _narrow(values: Array) -> Floats:
    with np.errstate(over="ignore"):  # too large for float32 is as good as infinite
        return np.ascontiguousarray(values, np.float32)


def _refuse(source: str, expected: str, found: str) -> ArchiveError:
    return ArchiveError(
        f"{source} is no reference",
        expected=expected,
        found=found,
        remedy="train again, and pack the run",
    )
