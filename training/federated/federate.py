"""One federated training on this machine: data in, a run folder out."""

from __future__ import annotations

from pathlib import Path

import torch

from marwright.archive.run import Run

from ..loop import Progress
from ..recipe import Recipe
from ..settings import Settings
from .federation import Federation
from .flower import load_flower, quieten_flower
from .holding import list_shares, read_data
from .plan import Plan

__all__ = ["train_federated"]


def train_federated(
    out: Path,
    *,
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    federation: Federation | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a network at several clients and write its run folder, an ordinary one.

    The clients are shares of one data set, in this process. `progress` is called after each round.
    `settings` say what a client does; its epochs are the federation's `local_epochs`.

    Raises:
        UsageError: Flower (or Opacus) is not installed, the choices do not go together, or the
            network cannot be trained privately.
        StorageError: `out` exists and `force` is false, is in use, or cannot be written.
        RunError: `out` is a folder that is no run; or no client's answer could be used.
        DataError: the data cannot be used, or are too few for so many clients.
    """
    plan = Plan(recipe or Recipe(), settings or Settings(), federation or Federation())
    load_flower()
    from .client import app
    from .local import LocalGrid
    from .server import write_federated

    labels = _count_labels(plan)  # first: what cannot be shared out is told before anything runs
    with quieten_flower():
        return write_federated(
            out, LocalGrid(app, plan), plan, force=force, progress=progress, labels=labels
        )


def _count_labels(plan: Plan) -> list[list[int]]:
    """Return how many of each label each client has: only a trial may know it."""
    data, _ = read_data(plan.recipe, plan.settings.seed)
    return [
        torch.bincount(data.labels[share], minlength=len(data.classes)).tolist()
        for share in list_shares(plan)
    ]
