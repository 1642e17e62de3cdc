"""What goes wrong at clients, on purpose: a trial of a federation needs some who fail."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

__all__ = ["spoil_answer"]

KINDS = ("noise", "nan", "shape")
"""By round, in turn: noise first, for it is what only a comparison with the others finds."""


def spoil_answer(reply: Message, request: Message, number: int) -> Message:
    """Return the reply of a client that sends garbage: noise, NaN, or another shape, in turn."""
    kind = KINDS[(number - 1) % len(KINDS)]
    arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {name: Array(array) for name, array in _spoil(arrays, kind, number).items()}
            ),
            "metrics": reply.content["metrics"],
        }
    )
    return Message(content, reply_to=request)


def _spoil(arrays: Mapping[str, np.ndarray], kind: str, number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    spoilt = {}
    for name, array in arrays.items():
        if kind == "noise":
            noise = random.normal(size=array.shape)
            spoilt[name] = np.asarray(array + noise, dtype=array.dtype)  # of a scalar too
        elif kind == "nan":
            spoilt[name] = np.full_like(array, np.nan)
        else:
            spoilt[name] = array[..., None]
    return spoilt
