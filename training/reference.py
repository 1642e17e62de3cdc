"""The reference: what live inputs and answers are compared with once the model is served.

Taken of the test part, which the model has not learnt from, and kept in the run as reference.npz;
`marwright pack` takes it into the archive.

`features` are a table's columns, or numbers of the images as handlers/image_classifier.py gets
them: a data set's inputs are made of its files as the handler makes them of a request's
(tests/training/test_data.py), so resized images are no exception. Only `scaled_decoding` and
another decoder than Pillow's give a served JPEG other pixels.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The only two files of handlers/ that training imports: what is measured of live inputs and of
# those of the test part has to come from one piece of code. They import nothing but numpy and
# torch.
from marwright.handlers.image_features import IMAGE_FEATURES, measure_images
from marwright.handlers.logits import find_best, fold_logits

from .data import DataSet

__all__ = ["make_reference", "write_reference"]

Array = np.ndarray[Any, Any]

FORMAT = 1
MOST_ROWS = 2000
MOST_EMBEDDINGS = 1000
"""Their comparison takes time by the square of their number."""
MOST_BYTES = 160_000
"""Of the features, and of the embeddings; of what has many columns there are fewer rows."""
MOST_COLUMNS = 64
"""A table with more has no features here: handlers/tensor.py logs none."""
FIRST_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest a zip file can state: the same training gives the same bytes at any time."""


def make_reference(data: DataSet, test: torch.Tensor, logits: torch.Tensor) -> dict[str, Array]:
    """Return the reference by its parts' names, for the test part and the model's logits for it.

    The test part is in random order already: its first rows are a sample of it.
    """
    features, names = _measure(data, test[:MOST_ROWS])
    rows = min(len(test), MOST_ROWS, _count_rows(features))
    found = logits[:rows].float().numpy()
    best, confidence = find_best(found)
    embedding = fold_logits(found).astype(np.float32)
    labels = np.array(data.classes)
    return {
        "format": np.array(FORMAT),
        "features": features[:rows],
        "feature_names": np.array(names, dtype=np.str_),
        "confidence": confidence.astype(np.float32),
        "prediction": labels[best],
        "embedding": embedding[: min(MOST_EMBEDDINGS, _count_rows(embedding))],
        "accuracy": np.array(float((best == data.labels[test[:rows]].numpy()).mean())),
    }


def write_reference(path: Path, reference: dict[str, Array]) -> None:
    """Write a file that numpy.load reads; the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in reference.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", FIRST_TIME)
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED)


def _measure(data: DataSet, rows: torch.Tensor) -> tuple[Array, tuple[str, ...]]:
    """Return (n, k) float32 features and their names."""
    inputs = data.inputs[rows]
    if not data.is_table:
        return measure_images(inputs).numpy(), IMAGE_FEATURES
    columns = data.columns if len(data.columns) <= MOST_COLUMNS else ()
    return inputs[:, : len(columns)].numpy(), columns


def _count_rows(numbers: Array) -> int:
    """Return how many rows of float32 MOST_BYTES hold."""
    return MOST_BYTES // (4 * max(1, int(numbers.shape[1])))
