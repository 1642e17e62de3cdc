"""`marwright drift`: the last logged predictions against what the model saw at its training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json, Server
from marwright.cli.output import escape, print_json, print_section, say

if TYPE_CHECKING:
    from marwright.monitor.drift import Drift, Key
    from marwright.monitor.predictions import PredictionLog
    from marwright.server.sections import DriftSettings

__all__ = ["drift"]

WINDOWS = 12
"""How many windows a picture shows."""


def drift(
    model: Annotated[
        str | None, typer.Argument(help="A model's name; every one if not given.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="One of its versions; every one if not given.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=50, help="Predictions to compare; monitoring.drift.window if not given."),
    ] = None,
    server: Server = None,
    folder: Annotated[
        Path | None, typer.Option(help="A prediction log, instead of a server's; with --archive.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="What the predictions of --folder were made with.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the last windows, and the worst subject, into a PNG."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the last logged predictions with the reference that travels in the archive.

    Exit 0 where nothing has shifted, 1 where something has, or where nothing could be compared.
    """
    from marwright.errors import UsageError
    from marwright.monitor.drift import evaluate

    if (folder is None) != (archive is None):
        raise UsageError("--folder and --archive go together")
    if folder is not None and server is not None:
        raise UsageError("--server and --folder exclude each other", remedy="pass one of them")
    log, archives, settings = _open(folder, archive, server)
    settings = settings.model_copy(update={"window": window or settings.window})
    archives = _choose(archives, model, version)
    if plot is not None and len(archives) > 1:
        names = ", ".join(map(" ".join, archives))
        remedy = "name it: marwright drift MODEL --version VERSION"
        raise UsageError("a picture is of one version", found=names, remedy=remedy)
    found = evaluate(log, archives, settings)
    if plot is not None:
        [(key, path)] = archives.items()
        _draw(log, key, path, settings, plot)
    if as_json:
        print_json([{"model": key[0], "version": key[1], **found[key].to_json()} for key in found])
    else:
        for key, result in found.items():
            _print_drift(key, result)
    if any(one.shifted for one in found.values()) or all(one.reason for one in found.values()):
        raise typer.Exit(1)


def _open(
    folder: Path | None, archive: Path | None, server: str | None
) -> tuple[PredictionLog, dict[Key, Path], DriftSettings]:
    """Return the log, the archives by model and version, and how to compare."""
    from marwright.archive.reader import read_manifest
    from marwright.monitor.drift import list_archives
    from marwright.monitor.predictions import find_log
    from marwright.server.sections import DriftSettings

    log, deployment = find_log(folder=folder, server=server)
    if deployment is not None:
        return log, list_archives(deployment), deployment.monitoring.drift
    assert archive is not None  # it goes with the folder
    manifest = read_manifest(archive)
    return log, {(manifest.name, manifest.version): archive}, DriftSettings()


def _choose(archives: dict[Key, Path], model: str | None, version: str | None) -> dict[Key, Path]:
    """Return the archives that are asked for.

    Raises:
        UsageError: there is none.
    """
    from marwright.errors import UsageError

    chosen = {
        key: path
        for key, path in archives.items()
        if model in {None, key[0]} and version in {None, key[1]}
    }
    if not chosen:
        asked = " ".join(filter(None, (model or "any model", version)))
        names = ", ".join(map(" ".join, archives)) or "none"
        raise UsageError(f"there is no archive of {asked}", found=names)
    return chosen


def _draw(log: PredictionLog, key: Key, archive: Path, settings: DriftSettings, path: Path) -> None:
    """Draw the last windows of a version.

    Raises:
        ArchiveError: its archive has no reference.
        StorageError: the picture cannot be written.
    """
    from marwright.archive.run import REFERENCE_NAME
    from marwright.errors import ArchiveError
    from marwright.monitor.drift import compare_past
    from marwright.monitor.drift_plot import draw_drift
    from marwright.monitor.reference import Reference

    reference = Reference.read(archive)
    if reference is None:
        raise ArchiveError(
            f"{archive} has nothing to compare with",
            expected=f"a member {REFERENCE_NAME}",
            remedy="train again, and pack the run",
        )
    table = log.read_window(*key, settings.window * WINDOWS)
    past = compare_past(reference, table, window=settings.window, error_rate=settings.error_rate)
    draw_drift(reference, past, path, title=" ".join(key))
    say(f"wrote {path}")


def _print_drift(key: Key, found: Drift) -> None:
    name = " ".join(key)
    if found.reason:
        say(f"{name}: {found.reason}")
    else:
        state = "shifted" if found.shifted else "no shift"
        rows = [
            [
                row.subject,
                row.test,
                f"{row.score:.4g}",
                f"{row.p:.3g}",
                f"{row.p_corrected:.3g}",
                "yes" if row.shifted else "",
            ]
            for row in found.rows
        ]
        headers = ["subject", "test", "score", "p", "p corrected", "shifted"]
        print_section(f"{escape(name)}: {found.window_rows} predictions, {state}", headers, rows)
        if found.outlying is not None:
            say(f"{name}: {found.outlying:.1%} of requests are stranger than 99 % at training")
    for note in found.notes:
        say(f"{name}: {note}")
