"""The network that a federation begins with, and its weights as arrays."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import DataSet, Split
from ..models import Exported
from ..recipe import Recipe
from ..train import make_model

__all__ = ["name_model", "start_model"]


def name_model(recipe: Recipe, data: DataSet) -> Recipe:
    """Return the recipe with the network that it means where it names none."""
    return replace(recipe, model=recipe.model or ("mlp" if data.is_table else "cnn"))


def start_model(data: DataSet, part: torch.Tensor, recipe: Recipe) -> Exported:
    """Return the network with its normalisation, a table's measured on one part of the data.

    The server takes its validation part: the clients' rows are not its to see.
    """
    return make_model(data, Split(part, part, part), name_model(recipe, data))
