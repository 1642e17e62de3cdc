"""What a classifier's logits tell besides the label: confidence, an embedding, a strangeness.

Training takes the reference with this file and handlers what they log, so that the two are alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["find_best", "fold_logits", "score_logits", "SCORES", "to_logits"]

Array = np.ndarray[Any, Any]

SCORES = ("energy", "softmax")
"""Ways to say how far an input is from what the model learnt; the higher the stranger.

energy: -log(sum(exp(logits))) (Liu et al., Energy-based out-of-distribution detection, 2020);
softmax: 1 minus the highest probability (Hendrycks and Gimpel, 2017).
"""
MOST_NUMBERS = 64
"""Of an embedding."""
DECIMALS = 6
EMBEDDING_DECIMALS = 4


def find_best(logits: Array) -> tuple[Array, Array]:
    """Return the place of the highest of (N, C) logits, and its probability."""
    best = logits.argmax(axis=1)
    # The highest is exp(0) of the sum.
    highest = 1 / np.exp(_center(logits)).sum(axis=1)
    return best, highest.round(DECIMALS)


def score_logits(logits: Array, kind: str) -> Array:
    """Return one of SCORES for each row of (N, C) logits."""
    sums = np.exp(_center(logits)).sum(axis=1)
    highest = logits.max(axis=1).astype(np.float64)
    scores = 1 - 1 / sums if kind == "softmax" else -(highest + np.log(sums))
    rounded: Array = scores.round(DECIMALS)
    return rounded


def fold_logits(logits: Array) -> Array:
    """Return (N, at most 64) logits: shifts are seen best in what a model makes of its inputs.

    Rabanser et al., Failing Loudly, 2019. Of more classes each goes with a sign into one of 64
    sums, which keeps distances on average (Weinberger et al., Feature hashing, 2009).
    """
    classes = logits.shape[1]
    folded = logits.astype(np.float64)
    if classes > MOST_NUMBERS:
        places = np.arange(classes, dtype=np.uint64)
        # Knuth's multiplicative hash: its highest bit is as good as a coin.
        signs = 1.0 - 2.0 * ((places * np.uint64(2_654_435_761) >> np.uint64(31)) & np.uint64(1))
        padding = -classes % MOST_NUMBERS
        signed = np.pad(folded * signs, ((0, 0), (0, padding)))
        folded = signed.reshape(len(logits), -1, MOST_NUMBERS).sum(axis=1)
    rounded: Array = folded.round(EMBEDDING_DECIMALS)
    return rounded


def to_logits(outputs: Array) -> Array:
    """Return logits where a model may also give probabilities: rows from 0 up that add up to 1."""
    sums = outputs.sum(axis=1)
    is_share = (outputs.min(axis=1) >= 0) & (np.abs(sums - 1) < 1e-3)
    if not is_share.any():
        return outputs
    logarithms = np.log(np.maximum(outputs, 1e-12))
    return np.where(is_share[:, None], logarithms, outputs)


def _center(logits: Array) -> Array:
    """Return logits below the highest, in float64: exp of them cannot overflow."""
    values = logits.astype(np.float64)
    centred: Array = values - values.max(axis=1, keepdims=True)
    return centred
