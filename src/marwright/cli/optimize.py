"""`marwright optimize`: from a trained run to the smallest, fastest model that still passes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_section, print_table, say

if TYPE_CHECKING:
    from marwright.training.optimise.gates import Preference

__all__ = ["optimize"]


def optimize(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    plan: Annotated[
        Path | None, typer.Option(help="A YAML file of variants; the default plan without.")
    ] = None,
    max_accuracy_drop: Annotated[
        float, typer.Option(help="Largest loss of accuracy, on the validation part; 0.01 a point.")
    ] = 0.01,
    max_p99: Annotated[
        str | None, typer.Option(help="Largest p99 at batch 1, such as 5ms or 300us.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Largest file, such as 500KB or 2MiB.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory to load and run it, such as 200MB.")
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(help="Of what passes: balance (times and size), latency, throughput, size."),
    ] = "balance",
    threads: Annotated[int, typer.Option(min=1, help="Threads of one inference.")] = 1,
    data_root: Annotated[
        str, typer.Option(help="The folder of MNIST, FashionMNIST and CIFAR-10.")
    ] = "",
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell why each of the others lost.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build also what was built before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prune, quantise and export a run's model in many ways, measure all, and choose one.

    Writes RUN/optimised: the files, report.json, report.html and pareto.png. `marwright pack RUN`
    then packs the chosen file. Ends with status 1 where nothing passes the gates.
    """
    from marwright.archive import Run
    from marwright.errors import UsageError

    opened = Run.open(run)
    say("loading torch")
    from marwright.training.optimise.gates import Gates, parse_bytes, parse_milliseconds
    from marwright.training.optimise.optimise import optimise_run
    from marwright.training.optimise.report import list_rows
    from marwright.training.optimise.variant import DEFAULT_PLAN, read_plan

    if prefer not in ("balance", "latency", "throughput", "size"):
        raise UsageError(f"--prefer {prefer!r}", expected="balance, latency, throughput or size")
    gates = Gates(
        max_accuracy_drop,
        parse_milliseconds(max_p99) if max_p99 else None,
        parse_bytes(max_size) if max_size else None,
        parse_bytes(max_memory) if max_memory else None,
    )
    started = time.perf_counter()
    with make_progress() as bar:
        task = bar.add_task(f"optimize {run.name}", total=None, facts="")

        def show(what: str, done: int, pieces: int) -> None:
            bar.update(task, completed=done, total=pieces, facts=what)
            if bar.disable and not what.startswith("measure,"):
                say(f"[{done + 1}/{pieces}] {what}")

        result = optimise_run(
            opened,
            plan=read_plan(plan) if plan else DEFAULT_PLAN,
            gates=gates,
            prefer=cast("Preference", prefer),
            threads=threads,
            data_root=data_root,
            force=force,
            progress=show,
        )
    if as_json:
        print_json({**result.report, "seconds": round(time.perf_counter() - started, 1)})
    else:
        headers, rows = list_rows(result.report)
        shown = len(headers) if explain else -1  # the verdicts come last
        print_table(headers[:shown], [row[:shown] for row in rows])
        for entry in result.report["results"]:
            if entry["failure"]:
                say(f"{entry['variant']['name']}: {entry['failure']}")
        print_section("", ["chosen"], [[result.decision.line]])
        for note in result.report["notes"]:
            say(note)
        say(f"{result.folder}/report.html, {time.perf_counter() - started:.0f} s")
    if result.decision.chosen is None:
        raise typer.Exit(1)
