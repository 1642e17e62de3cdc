"""The network of a run, as it can be trained further."""

from __future__ import annotations

import torch

from marwright.archive.run import Run
from marwright.errors import RunError

from .models import Exported, build_model, load_weights

__all__ = ["load_network"]


def load_network(run: Run) -> Exported:
    """Return a run's network with its weights, normalisation and temperature.

    Raises:
        RunError: its weights are missing, or belong to another architecture.
        UsageError: its model is a class that cannot be imported here.
    """
    if not run.weights_path.is_file():
        raise RunError(
            f"{run.path} has no weights to start from",
            expected=run.weights_path.name,
            remedy="train again: this run is of an older marwright",
        )
    shape = (len(run.columns),) if run.is_table else (3, *run.image_size)
    network = build_model(str(run.config["model"]), classes=len(run.classes), input_shape=shape)
    channels = (shape[0],) if run.is_table else (3, 1, 1)
    per_channel = run.is_table or str(run.config["model"]).startswith("torchvision:")
    start = torch.ones(channels if per_channel else ())
    model = Exported(network, mean=start, deviation=start.clone())
    load_weights(model, run.weights_path)
    return model.eval()
