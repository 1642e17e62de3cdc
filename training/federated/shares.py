"""Shares: one data set parted unevenly over clients, as theirs would be.

For each label, the clients' shares of it are drawn from a Dirichlet distribution (Hsu, Qi and
Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
classification").
"""

from __future__ import annotations

import numpy as np
import torch

from marwright.errors import DataError

__all__ = ["FEWEST_ITEMS", "share_items"]

FEWEST_ITEMS = 8
"""That a client holds, whatever was drawn: fewer say nothing, and name themselves."""


def share_items(
    labels: torch.Tensor, clients: int, *, alpha: float, seed: int
) -> tuple[torch.Tensor, ...]:
    """Return each client's indices into `labels`, ascending; every item is in exactly one share.

    Raises:
        DataError: there are too few items for so many clients.
    """
    if len(labels) < clients * FEWEST_ITEMS:
        raise DataError(
            f"{len(labels)} items are too few for {clients} clients",
            expected=f"at least {FEWEST_ITEMS} a client",
            remedy="pass fewer --clients",
        )
    random = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in torch.unique(labels).tolist():
        mine = random.permutation(np.flatnonzero(labels.numpy() == label))
        portions = random.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(portions)[:-1] * len(mine)).astype(int)
        for share, part in zip(shares, np.split(mine, cuts), strict=True):
            share.extend(part.tolist())
    _top_up(shares)
    return tuple(torch.tensor(sorted(share)) for share in shares)


def _top_up(shares: list[list[int]]) -> None:
    """Give those with next to nothing from whoever has most."""
    for share in shares:
        while len(share) < FEWEST_ITEMS:
            share.append(max(shares, key=len).pop())
