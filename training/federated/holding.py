"""What one client holds: data of its own, or its share of a data set that everybody has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from marwright.errors import DataError, UsageError

from ..data import DataSet, Split
from ..loop import Tensors
from ..recipe import Recipe
from ..sources import load_data
from ..train import prepare_data
from .plan import Plan, Scalar
from .shares import share_items

__all__ = ["find_holding", "Holding", "list_shares", "read_data"]

PROBED = 64
"""Items by which a client tells whether its loss explodes."""


@lru_cache(maxsize=1)
def read_data(recipe: Recipe, seed: int) -> tuple[DataSet, Split]:
    """Read and split data once for all rounds, and for all that ask in one process."""
    return prepare_data(recipe, seed=seed)


@dataclass(frozen=True)
class Holding:
    """What a client has."""

    data: DataSet
    part: torch.Tensor
    """Indices of what it trains on."""
    number: int

    @property
    def tensors(self) -> Tensors:
        """Inputs and labels."""
        return self.data.inputs[self.part], self.data.labels[self.part]

    @property
    def probe(self) -> Tensors:
        """A few of them, by which the loop tells whether the loss explodes."""
        return self.data.inputs[self.part[:PROBED]], self.data.labels[self.part[:PROBED]]


def find_holding(plan: Plan, config: Mapping[str, Scalar], classes: Sequence[str]) -> Holding:
    """Return what a node config names, `dataset` or `partition-id`, labelled by `classes`.

    Raises:
        UsageError: it names neither, or a share that there is not.
        DataError: the data cannot be used, or have classes besides these.
    """
    number = int(config.get("partition-id", 0))
    if "dataset" in config:
        recipe = replace(plan.recipe, dataset=str(config["dataset"]))
        data = _align(_load_own(recipe), classes)
        return Holding(data, torch.arange(len(data)), number)
    federation = plan.federation
    if "partition-id" not in config or not 0 <= number < federation.clients:
        raise UsageError(
            "this client's node config names no data",
            expected=f"partition-id from 0 to {federation.clients - 1}, or dataset",
            found=", ".join(f"{key}={value}" for key, value in config.items()) or "nothing",
            remedy="start flower-supernode with --node-config 'partition-id=0'",
        )
    data, _ = read_data(plan.recipe, plan.settings.seed)
    return Holding(_align(data, classes), list_shares(plan)[number], number)


@lru_cache(maxsize=1)
def _load_own(recipe: Recipe) -> DataSet:
    """Read a client's own data: all of it, as there is nothing to measure here."""
    return load_data(
        recipe.dataset,
        image_size=recipe.image_size,
        label=recipe.label or None,
        data_root=recipe.root,
        download=recipe.download,
        most_unreadable=recipe.most_unreadable,
    )


def _align(data: DataSet, classes: Sequence[str]) -> DataSet:
    """Return data with labels that count the federation's classes; a client may lack some."""
    if data.classes == tuple(classes):
        return data
    unknown = sorted(set(data.classes) - set(classes))
    if unknown:
        raise DataError(
            f"{data.name} has classes that the federation does not know",
            expected=", ".join(list(classes)[:10]),
            found=", ".join(unknown[:10]),
        )
    places = torch.tensor([list(classes).index(label) for label in data.classes])
    return replace(data, labels=places[data.labels], classes=tuple(classes))


def list_shares(plan: Plan) -> list[torch.Tensor]:
    """Return each client's indices into the data set: parts of the training part, all of it."""
    data, split = read_data(plan.recipe, plan.settings.seed)
    federation = plan.federation
    shares = share_items(
        data.labels[split.train], federation.clients, alpha=federation.alpha, seed=federation.seed
    )
    return [split.train[share] for share in shares]
