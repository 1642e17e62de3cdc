"""What the server checks of an answer before it is averaged with the others.

An average has no robustness at all: one client that sends NaN, or weights of another size, costs
everybody theirs. Refused are answers of another form, answers that are not finite, and updates
much longer than the median one: bounding the norm is the defence of Sun et al. 2019 ("Can you
really backdoor federated learning?"), and the median, unlike a mean, stays where it is while less
than half of the clients lie.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answer", "LONGEST_UPDATE", "MOST_ITEMS", "screen_answers"]

LONGEST_UPDATE = 10.0
"""Times the median norm. Honest clients' differ, for one with more items takes more steps: up to
2.8 times in docs/federated.md's trials, and once 7.4 at the end of one with a high rate."""
MOST_ITEMS = 20.0
"""Times the median number of items, above which a client claims too large a say in the average."""

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Answer:
    """What one client sent after a round."""

    arrays: Arrays
    items: float
    """How many it says it has trained on: its weight in the average."""


def screen_answers(reference: Arrays, answers: Mapping[int, Answer]) -> dict[int, str]:
    """Return why answers are refused, by client; those that are not in it may be averaged.

    `reference` is what the clients were sent.
    """
    refused = {}
    for client, answer in answers.items():
        why = _check_form(reference, answer)
        if why:
            refused[client] = why
    rest = {client: answer for client, answer in answers.items() if client not in refused}
    if not rest:
        return refused
    norms = {client: measure_update(reference, answer.arrays) for client, answer in rest.items()}
    usual = statistics.median(norms.values())
    usual_items = statistics.median(answer.items for answer in rest.values())
    for client, answer in rest.items():
        if norms[client] > LONGEST_UPDATE * usual:
            refused[client] = f"an update over {LONGEST_UPDATE:g} times as long as the median's"
        elif answer.items > MOST_ITEMS * usual_items:
            refused[client] = f"claims over {MOST_ITEMS:g} times as many items as the median"
    return refused


def measure_update(reference: Arrays, arrays: Arrays) -> float:
    """Return the Euclidean norm of the change over all floating-point arrays."""
    squares = [
        np.square(arrays[name].astype(np.float64) - start.astype(np.float64)).sum()
        for name, start in reference.items()
        if np.issubdtype(start.dtype, np.floating)
    ]
    return float(np.sqrt(sum(squares)))


def _check_form(reference: Arrays, answer: Answer) -> str:
    """Return what is wrong with an answer by itself; empty where nothing is."""
    if answer.arrays.keys() != reference.keys():
        odd = sorted(answer.arrays.keys() ^ reference.keys())
        return f"other arrays: {', '.join(odd[:3])}"
    for name, start in reference.items():
        found = answer.arrays[name]
        if found.shape != start.shape or found.dtype != start.dtype:
            shapes = f"{list(found.shape)}, not {start.dtype}{list(start.shape)}"
            return f"{name} is {found.dtype}{shapes}"
        if not np.isfinite(found).all():
            return f"{name} is not finite"
    if not (np.isfinite(answer.items) and answer.items >= 1 and answer.items == int(answer.items)):
        return f"claims {answer.items} items"
    return ""
