"""Trackers of experiments: TensorBoard's files and MLflow's runs, where they are asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from marwright.errors import UsageError

from .loop import Epoch

__all__ = ["TRACKERS", "track"]

TRACKERS = ("tensorboard", "mlflow")
Track = Callable[[Epoch], None]


@contextmanager
def track(names: str, folder: Path, facts: Mapping[str, Any]) -> Iterator[Track]:
    """Give what records each epoch with the trackers of a comma-separated list.

    TensorBoard's files go to `folder`/tensorboard; MLflow's where MLFLOW_TRACKING_URI says, else
    to `folder`/mlflow.db. `facts` become MLflow's parameters.

    Raises:
        UsageError: no such tracker, or it is not installed.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in TRACKERS]
    if unknown:
        raise UsageError(
            f"there is no tracker {', '.join(unknown)}", expected=f"one of {', '.join(TRACKERS)}"
        )
    with ExitStack() as stack:
        openers = {"tensorboard": _open_tensorboard, "mlflow": _open_mlflow}
        sinks = [stack.enter_context(openers[name](folder, facts)) for name in chosen]

        def record(epoch: Epoch) -> None:
            values = {k: v for k, v in asdict(epoch).items() if k != "epoch"}
            for sink in sinks:
                sink(values, epoch.epoch)

        yield record


Sink = Callable[[dict[str, float], int], None]


@contextmanager
def _open_tensorboard(folder: Path, facts: Mapping[str, Any]) -> Iterator[Sink]:
    module = _import("torch.utils.tensorboard", "tensorboard")
    with module.SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(values: dict[str, float], epoch: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, epoch)

        yield write


@contextmanager
def _open_mlflow(folder: Path, facts: Mapping[str, Any]) -> Iterator[Sink]:
    mlflow = _import("mlflow", "mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    mlflow.set_experiment("marwright")
    with mlflow.start_run():
        mlflow.log_params({key: value for key, value in facts.items() if value != ""})
        yield lambda values, epoch: mlflow.log_metrics(values, step=epoch)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise UsageError(
            f"tracking with {extra} needs a package that is not installed",
            remedy=f"pip install 'marwright[{extra}]'",
        ) from exc
