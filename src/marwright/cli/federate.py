"""`marwright federate`: the training of `marwright train`, at several clients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_section, print_table, say

if TYPE_CHECKING:
    from marwright.archive import Run
    from marwright.training.federated.federation import Federation
    from marwright.training.recipe import Recipe
    from marwright.training.settings import Settings

__all__ = ["federate"]


def federate(
    out: Annotated[
        Path | None,
        typer.Option(help="The run folder to write; runs/DATASET-federated where not given."),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="What is shared out over the clients, named as for train.")
    ] = "digits",
    model: Annotated[
        str, typer.Option(help="cnn, mlp, torchvision:NAME, or module:Class of your own.")
    ] = "",
    height: Annotated[
        int, typer.Option(help="Pixels images are resized to; 0 takes the data set's own.")
    ] = 0,
    width: Annotated[int, typer.Option(help="The same across.")] = 0,
    weights: Annotated[str, typer.Option(help="A state dict to start from.")] = "",
    label: Annotated[
        str, typer.Option(help="A table's column of labels; `label`, or else the last one.")
    ] = "",
    data_root: Annotated[
        str, typer.Option(help="The folder of MNIST, FashionMNIST and CIFAR-10.")
    ] = "",
    download: Annotated[bool, typer.Option("--download", help="Fetch them if missing.")] = False,
    clients: Annotated[int, typer.Option(help="Among whom the training part is shared out.")] = 5,
    rounds: Annotated[int, typer.Option(help="Averages of what the clients have learnt.")] = 10,
    local_epochs: Annotated[
        int, typer.Option(help="Passes of a client over its data in a round.")
    ] = 2,
    strategy: Annotated[str, typer.Option(help="fedavg or fedprox.")] = "fedavg",
    mu: Annotated[float, typer.Option(help="How strongly fedprox holds the clients back.")] = 0.1,
    alpha: Annotated[
        float, typer.Option(help="How even the clients' labels are; smaller is less.")
    ] = 0.5,
    drop_out: Annotated[
        list[int] | None, typer.Option(help="A client, from 0, that leaves after a round.")
    ] = None,
    garbage: Annotated[
        list[int] | None, typer.Option(help="A client, from 0, that answers garbage.")
    ] = None,
    noise_multiplier: Annotated[
        float, typer.Option(help="DP-SGD's noise; 0 trains without differential privacy.")
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="What an item's gradient is clipped to before the noise.")
    ] = 1.0,
    delta: Annotated[float, typer.Option(help="With which epsilon is reported.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Items in one step of a client.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate in the first round.")] = 0.02,
    optimizer: Annotated[str, typer.Option(help="Of the clients: gd, sgd, adam or adamw.")] = "sgd",
    momentum: Annotated[float, typer.Option(help="Nesterov's; beta1 of adam and adamw.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty; adamw decouples it.")] = 5e-4,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate over the rounds: cosine, constant or step.")
    ] = "cosine",
    shift: Annotated[int, typer.Option(help="Pixels a batch is moved at most.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the split, the shares and the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network at several clients on this machine and write a run folder.

    Each client trains on its own share; the server averages what they learnt, refuses answers that
    are garbage, and goes on without those that do not answer. The folder is one like train's.
    """
    from marwright.errors import UsageError

    out = out or Path("runs") / f"{dataset.replace(':', '-').replace('/', '-')}-federated"
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} exists", remedy="choose another --out, or pass --force")
    say("loading torch")
    from marwright.training.federated.federation import Federation
    from marwright.training.recipe import Recipe
    from marwright.training.settings import Settings

    run = _federate_with_bar(
        out,
        f"federate {dataset}",
        recipe=Recipe(
            dataset=dataset,
            model=model,
            height=height,
            width=width,
            weights=weights,
            label=label,
            data_root=data_root,
            download=download,
        ),
        settings=Settings(
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            shift=shift,
            device=device,
            seed=seed,
            threads=threads,
        ),
        federation=Federation(
            clients=clients,
            rounds=rounds,
            local_epochs=local_epochs,
            strategy=strategy,
            proximal_mu=mu,
            alpha=alpha,
            seed=seed,
            drop_out=tuple(drop_out or ()),
            garbage=tuple(garbage or ()),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            delta=delta,
        ),
        force=force,
    )
    _print(run, as_json=as_json)


def _federate_with_bar(
    out: Path,
    title: str,
    *,
    recipe: Recipe,
    settings: Settings,
    federation: Federation,
    force: bool,
) -> Run:
    """Train under a progress bar that counts rounds."""
    from marwright.training.federated.federate import train_federated

    with make_progress() as bar:
        task = bar.add_task(title, total=federation.rounds, facts="")

        def show(done: int, total: int, loss: float, accuracy: float) -> None:
            known = "-" if math.isnan(accuracy) else f"{accuracy:.3f}"
            facts = f"loss {loss:.3f}  val acc {known}"
            bar.update(task, completed=done, total=total, facts=facts)
            if bar.disable and (done * 5 // total) > ((done - 1) * 5 // total):
                say(f"{title}  {done} of {total} rounds  {facts}")  # five lines for a log file

        run: Run = train_federated(
            out,
            recipe=recipe,
            settings=settings,
            federation=federation,
            force=force,
            progress=show,
        )
        return run


def _print(run: Run, *, as_json: bool) -> None:
    report = run.report
    if as_json:
        print_json({"run": str(run.path), **report})
        return
    federated, privacy = report["federated"], report.get("privacy")
    print_table(
        ["run", "strategy", "rounds", "test accuracy", "validation", "epsilon", "seconds"],
        [
            [
                run.path,
                federated["strategy"],
                federated["rounds"],
                f"{report['accuracy']:.4f}",
                f"{report['validation_accuracy']:.4f}",
                f"{privacy['epsilon']:.2f} at delta {privacy['delta']:g}" if privacy else "-",
                f"{report['seconds']:.1f}",
            ]
        ],
    )
    print_section(
        "",
        ["client", "items", "averaged", "refused", "failed", "silent", "why"],
        [
            [
                number,
                client["items"],
                client["answered"],
                client["refused"],
                client["failed"],
                client["silent"],
                "; ".join(client["reasons"]) or "-",
            ]
            for number, client in enumerate(federated["clients"])
        ],
    )
