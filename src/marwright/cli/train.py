"""`marwright train`: data in, a run folder out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_table, say

if TYPE_CHECKING:
    from marwright.archive import Run
    from marwright.training.loop import Settings

__all__ = ["train", "train_with_bar"]


def train(
    out: Annotated[Path, typer.Option(help="The run folder to write.")] = Path("runs/digits"),
    dataset: Annotated[str, typer.Option(help="digits")] = "digits",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images in one step.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Nesterov's momentum.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty.")] = 5e-4,
    shift: Annotated[int, typer.Option(help="Pixels a batch is moved at most.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train the CNN and write a run folder.

    The folder holds model, metrics, report, plots and samples; it appears only when it is whole.
    """
    from marwright.errors import UsageError

    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} exists", remedy="choose another --out, or pass --force")
    say("loading torch")
    from marwright.training.loop import Settings

    settings = Settings(epochs, batch_size, lr, momentum, weight_decay, shift, seed, threads)
    run = train_with_bar(out, f"train {dataset}", settings, dataset=dataset, force=force)
    if as_json:
        print_json({"run": str(run.path), **run.report})
        return
    report = run.report
    print_table(
        ["run", "test accuracy", "validation", "parameters", "model bytes", "seconds"],
        [
            [
                run.path,
                f"{report['accuracy']:.4f}",
                f"{report['validation_accuracy']:.4f}",
                f"{report['parameters']:,}",
                f"{report['model_bytes']:,}",
                f"{report['seconds']:.1f}",
            ]
        ],
    )


def train_with_bar(
    out: Path, title: str, settings: Settings, *, dataset: str = "digits", force: bool
) -> Run:
    """Train under a progress bar with loss, accuracy and time left."""
    from marwright.training.train import train_run

    with make_progress() as bar:
        task = bar.add_task(title, total=None, facts="")

        def show(done: int, total: int, loss: float, accuracy: float) -> None:
            known = "-" if math.isnan(accuracy) else f"{accuracy:.3f}"
            facts = f"loss {loss:.3f}  val acc {known}"
            bar.update(task, completed=done, total=total, facts=facts)
            if bar.disable and (done * 5 // total) > ((done - 1) * 5 // total):
                say(f"{title}  {done} of {total} steps  {facts}")  # five lines for a log file

        run: Run = train_run(out, dataset=dataset, settings=settings, force=force, progress=show)
        return run
