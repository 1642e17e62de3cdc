"""`marwright tune`: the fastest way to serve an archive on this machine within a bound on p99."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_table, say

if TYPE_CHECKING:
    from marwright.errors import ServerError
    from marwright.server.deployment import Deployment
    from marwright.tuning.search import Trial
    from marwright.tuning.tuning import Plan, Tuning

__all__ = ["tune"]

_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|ms|s|m|min)?")
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4, "min": 6e4}


def tune(
    archive: Annotated[Path, typer.Argument(help="A .mar file, or its name in the store.")],
    p99: Annotated[
        str, typer.Option(help="Most that 99 of 100 answers may take, such as 50ms or 0.05s.")
    ],
    minutes: Annotated[float, typer.Option(min=0.1, help="Most that the search may take.")] = 3.0,
    sample: Annotated[
        list[Path] | None,
        typer.Option(help="A request to send beside the archive's own samples; may be repeated."),
    ] = None,
    write: Annotated[
        Path, typer.Option(help="The deploy.yaml whose entry of the archive is set.")
    ] = Path("deploy.yaml"),
    no_write: Annotated[bool, typer.Option("--no-write", help="Measure only.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the file with every trial, and of the picture.")
    ] = Path("tuning"),
    as_json: Json = False,
) -> None:
    """Find workers, threads, batch size and delay that answer most requests within a bound.

    Each is tried on a real server on this machine, loaded by 1, 4, 16 and 64 connections; the best
    are confirmed in turns, and written into deploy.yaml. Exit 1 where none is within the bound.
    """
    from marwright.archive.checks.samples import Sample, check_files
    from marwright.tuning.tuning import tune as run

    bound_ms = parse_duration(p99)
    check_files(sample or [])
    archive = _find_archive(archive, write)
    deployment = _read_deployment(write, archive, changes=not no_write)
    with make_progress() as progress:
        task = progress.add_task("starting the server", total=None, facts="")

        def show_plan(plan: Plan, first: Trial) -> None:
            steps = plan.trials + plan.finalists * plan.rounds
            say(plan.describe())
            progress.update(task, total=steps, description="searching")
            show_trial(first, advance=0)

        def show_trial(trial: Trial, *, advance: int = 1) -> None:
            best = trial.find_best(bound_ms)
            facts = trial.failure[:40]
            if best is not None:
                facts = f"{best.throughput:,.0f}/s p99 {best.p99_ms:.1f} ms"
            text = "confirming" if trial.stage == "confirmation" else "searching"
            progress.update(task, advance=advance, description=text, facts=facts)

        tuning = run(
            archive,
            bound_ms=bound_ms,
            minutes=minutes,
            samples=[Sample.of_file(path) for path in sample or []],
            eager_batches=deployment.eager_batches if deployment else True,
            on_plan=show_plan,
            on_trial=show_trial,
        )
    _finish(tuning, out, None if no_write else write, as_json=as_json)


def parse_duration(text: str) -> float:
    """Return milliseconds of a duration such as 50ms, 0.05s or 50; see UsageError."""
    from marwright.errors import UsageError

    match = _DURATION.fullmatch(text.strip().lower())
    value = float(match[1]) * _MILLISECONDS[match[2] or "ms"] if match else 0.0
    if value <= 0:
        raise UsageError("--p99 is no duration", expected="such as 50ms or 0.05s", found=repr(text))
    return value


def _find_archive(archive: Path, write: Path) -> Path:
    """Return an archive's path; a bare name may be one of the store of deploy.yaml."""
    from marwright.server.deployment import Deployment

    if archive.exists() or archive.parent != Path():
        return archive
    store = Deployment.read(write).store if write.exists() else Path("model_store")
    return store / archive


def _read_deployment(path: Path, archive: Path, *, changes: bool) -> Deployment | None:
    """Return the deploy.yaml, or None where there is none; `changes`: it is to be written."""
    from marwright.server.deployment import Deployment
    from marwright.tuning.entry import check_entry

    if changes:
        return check_entry(path, archive)
    return Deployment.parse(path)[0] if path.exists() else None


def _finish(tuning: Tuning, out: Path, write: Path | None, *, as_json: bool) -> None:
    """Write the files, print the result, and set the exit status."""
    import json

    from marwright.storage import write_file
    from marwright.tuning.entry import write_entry
    from marwright.tuning.plot import draw_tuning

    stem = out / f"{tuning.model}-{tuning.version}"
    files = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "png")}
    with write_file(files["json"]) as stream:
        stream.write(json.dumps(tuning.to_json(), indent=2).encode() + b"\n")
    draw_tuning(tuning, files["png"])
    if as_json:
        print_json(tuning.to_json())
    else:
        _print_verdicts(tuning)
    say(f"every trial: {files['json']}; picture: {files['png']}")
    chosen = tuning.chosen
    if tuning.is_interrupted:
        say(f"interrupted; trials kept: {len(tuning.trials)}")
        raise typer.Exit(130)
    if chosen is None:
        raise _describe_miss(tuning)
    if write is not None:
        existed = write.exists()
        note = write_entry(write, tuning.archive, chosen.candidate.to_entry())
        say(f"{write} {'changed' if existed else 'made'}{f'; {note}' if note else ''}")


def _print_verdicts(tuning: Tuning) -> None:
    """Print the finalists, the best one first."""
    chosen = tuning.chosen
    print_table(
        [
            *("", "workers", "threads", "batch", "delay", "connections"),
            *("answers/s (least to most)", "p99 ms (least to most)", "rounds"),
        ],
        [
            [
                "chosen" if item == chosen else "as packed" if item.is_packed else "",
                item.candidate.workers,
                item.candidate.threads,
                item.candidate.batch_size,
                f"{item.candidate.batch_delay} {'us' if tuning.eager_batches else 'ms'}",
                item.connections,
                _show(item.throughput, 0),
                _show(item.p99_ms, 1),
                item.rounds,
            ]
            for item in tuning.verdicts
        ],
    )


def _show(spread: tuple[float, float, float], digits: int) -> str:
    middle, least, most = (f"{value:,.{digits}f}" for value in spread)
    return f"{middle} ({least} to {most})"


def _describe_miss(tuning: Tuning) -> ServerError:
    from marwright.errors import ServerError

    nearest = tuning.nearest
    assert nearest is not None  # tune raises where nothing was answered
    errors = f" and {nearest.errors} errors" if nearest.errors else ""
    return ServerError(
        f"nothing answers 99 of 100 requests within {tuning.bound_ms:g} ms",
        found=f"{nearest.p99_ms[0]:.1f} ms{errors} at best, {nearest.connections} connections on"
        f" {nearest.candidate}",
        remedy="raise --p99, or make the model faster: marwright optimize",
    )
