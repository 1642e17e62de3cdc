"""`marwright train`: data in, a run folder out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_table, say

if TYPE_CHECKING:
    from marwright.archive import Run
    from marwright.training.recipe import Recipe
    from marwright.training.settings import Settings

__all__ = ["train", "train_with_bar"]

MOST_LISTED = 5
"""Unreadable files that are named; report.json has all."""


def train(
    out: Annotated[
        Path | None, typer.Option(help="The run folder to write; runs/DATASET where not given.")
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, shapes, mnist, fashion-mnist, cifar10, folder:DIR with a folder of "
            "images a class, or table:FILE, CSV or Parquet."
        ),
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(
            help="cnn, mlp, torchvision:NAME, or module:Class of your own; cnn for images and "
            "mlp for tables where not given."
        ),
    ] = "",
    height: Annotated[
        int, typer.Option(help="Pixels images are resized to; 0 takes the data set's own.")
    ] = 0,
    width: Annotated[int, typer.Option(help="The same across.")] = 0,
    weights: Annotated[str, typer.Option(help="A state dict to start from.")] = "",
    teacher: Annotated[
        str, typer.Option(help="A run whose model is to be imitated besides the labels.")
    ] = "",
    label: Annotated[
        str, typer.Option(help="A table's column of labels; `label`, or else the last one.")
    ] = "",
    data_root: Annotated[
        str, typer.Option(help="The folder of MNIST, FashionMNIST and CIFAR-10.")
    ] = "",
    download: Annotated[bool, typer.Option("--download", help="Fetch them if missing.")] = False,
    most_unreadable: Annotated[
        float, typer.Option(help="The share of unreadable images that is still no error.")
    ] = 0.1,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Items in one step.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.01,
    optimizer: Annotated[
        str, typer.Option(help="gd (one step an epoch over all data), sgd, adam or adamw.")
    ] = "sgd",
    momentum: Annotated[float, typer.Option(help="Nesterov's; beta1 of adam and adamw.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty; adamw decouples it.")] = 5e-4,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate: cosine, constant, step or onecycle.")
    ] = "cosine",
    label_smoothing: Annotated[
        float, typer.Option(help="The share of a label that is spread over all classes.")
    ] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for any.")] = 0.0,
    patience: Annotated[
        int, typer.Option(help="Epochs without a lower validation loss that end it; 0 for none.")
    ] = 0,
    shift: Annotated[int, typer.Option(help="Pixels a batch is moved at most.")] = 2,
    augment: Annotated[
        str, typer.Option(help="flip, rotate, crop, colour, erase, trivial; comma-separated.")
    ] = "",
    precision: Annotated[
        str, typer.Option(help="float32, or mixed with bfloat16 or (CUDA) float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads of one process.")] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine; torchrun starts more.")
    ] = 1,
    checkpoint_steps: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 writes none.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted one.")
    ] = False,
    track: Annotated[str, typer.Option(help="tensorboard, mlflow; comma-separated.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network and write a run folder.

    The folder holds model, weights, metrics, report, pictures and samples; it appears only when
    it is whole.
    """
    from marwright.errors import UsageError

    out = out or Path("runs") / dataset.replace(":", "-").replace("/", "-")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} exists", remedy="choose another --out, or pass --force")
    say("loading torch")
    from marwright.training.recipe import Recipe
    from marwright.training.settings import Settings

    recipe = Recipe(
        dataset,
        model,
        height,
        width,
        weights,
        teacher,
        label,
        data_root,
        download,
        most_unreadable,
    )
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        shift=shift,
        seed=seed,
        threads=threads,
        optimizer=optimizer,
        schedule=schedule,
        label_smoothing=label_smoothing,
        clip=clip,
        patience=patience,
        augment=augment,
        precision=precision,
        device=device,
        checkpoint_steps=checkpoint_steps,
    )
    run = train_with_bar(
        out,
        f"train {dataset}",
        settings,
        recipe=recipe,
        force=force,
        resume=resume,
        trackers=track,
        processes=processes,
    )
    _print(run, as_json=as_json)


def _print(run: Run, *, as_json: bool) -> None:
    report = run.report
    unreadable = report.get("unreadable", [])
    if unreadable:
        say(f"left out as unreadable: {len(unreadable)}")
        say("\n".join(f"  {line}" for line in unreadable[:MOST_LISTED]))
    if as_json:
        print_json({"run": str(run.path), **report})
        return
    print_table(
        ["run", "test accuracy", "validation", "ECE", "parameters", "model bytes", "seconds"],
        [
            [
                run.path,
                f"{report['accuracy']:.4f}",
                f"{report['validation_accuracy']:.4f}",
                f"{report['calibration']['ece']:.4f}",
                f"{report['parameters']:,}",
                f"{report['model_bytes']:,}",
                f"{report['seconds']:.1f}",
            ]
        ],
    )


def train_with_bar(
    out: Path,
    title: str,
    settings: Settings,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    resume: bool = False,
    trackers: str = "",
    processes: int = 1,
) -> Run:
    """Train under a progress bar with loss, accuracy and time left."""
    from marwright.training.processes import start_others
    from marwright.training.recipe import Recipe
    from marwright.training.train import list_arguments, train_run

    recipe = recipe or Recipe()
    arguments = list_arguments(out, recipe=recipe, settings=settings, force=force, resume=resume)
    others = start_others(arguments, processes) if processes > 1 else nullcontext()
    with others, make_progress() as bar:
        task = bar.add_task(title, total=None, facts="")

        def show(done: int, total: int, loss: float, accuracy: float) -> None:
            known = "-" if math.isnan(accuracy) else f"{accuracy:.3f}"
            facts = f"loss {loss:.3f}  val acc {known}"
            bar.update(task, completed=done, total=total, facts=facts)
            if bar.disable and (done * 5 // total) > ((done - 1) * 5 // total):
                say(f"{title}  {done} of {total} steps  {facts}")  # five lines for a log file

        run: Run = train_run(
            out,
            recipe=recipe,
            settings=settings,
            force=force,
            resume=resume,
            trackers=trackers,
            progress=show,
        )
        return run
