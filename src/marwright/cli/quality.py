"""`marwright quality`: how often served predictions were right, where their labels are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json, Server
from marwright.cli.output import print_json, print_section, print_table, say

if TYPE_CHECKING:
    from marwright.monitor.predictions import PredictionLog
    from marwright.monitor.quality import Interval, Quality

__all__ = ["quality"]

SHOWN = 50
"""Classes and mistakes in a table; --json has all."""


def quality(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only this version.")] = None,
    days: Annotated[
        float | None, typer.Option(min=0.001, help="Only predictions of the last so many days.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only predictions from then on: ISO 8601, in UTC without a zone."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="The prediction log's folder; the server's where not given."),
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show live accuracy by model and version, precision and recall by class.

    Of predictions that are logged and whose labels `marwright feedback` was given. Each share
    stands with its Wilson interval of 95 %.
    """
    from marwright.monitor.predictions import find_log
    from marwright.monitor.quality import measure_quality

    begin = _find_begin(days, since)
    log, _ = find_log(folder=folder, server=server)
    measured = [measure_quality(log, *found, since=begin) for found in _choose(log, model, version)]
    if as_json:
        print_json([item.to_json() for item in measured])
        return
    _print_summary(measured)
    for item in measured:
        _print_classes(item)
    if not any(item.accuracy.n for item in measured):
        say("no label is known yet: marwright feedback labels.csv")


def _find_begin(days: float | None, since: str | None) -> float | None:
    """Return from when on predictions count, in seconds since the epoch."""
    import time

    from marwright.errors import UsageError
    from marwright.monitor.feedback import parse_time

    if days is not None and since is not None:
        raise UsageError("--days and --since exclude each other", remedy="pass one of them")
    if since is None:
        return None if days is None else time.time() - days * 86400
    try:
        return parse_time(since)
    except (ValueError, OverflowError) as exc:
        raise UsageError(
            "no such time", expected="--since 2026-11-28, or 2026-11-28T12:00", found=repr(since)
        ) from exc


def _choose(log: PredictionLog, model: str | None, version: str | None) -> list[tuple[str, str]]:
    """Return the models and versions that are meant."""
    from marwright.errors import DataError

    known = log.list_versions()
    found = [pair for pair in known if model in (None, pair[0]) and version in (None, pair[1])]
    if not found:
        raise DataError(
            "no such predictions are logged",
            expected=" ".join(filter(None, [model or "any model", version])),
            found=", ".join(" ".join(pair) for pair in known[:20]) or "an empty log",
            remedy="see docs/monitoring.md for what is logged",
        )
    return found


def _print_summary(measured: list[Quality]) -> None:
    print_table(
        ["model", "version", "labelled", "accuracy", "95 % interval", "calibration error"],
        [
            [
                item.model,
                item.version,
                f"{item.accuracy.n:,}",
                *_show(item.accuracy),
                "" if item.calibration_error is None else f"{item.calibration_error:.4f}",
            ]
            for item in measured
        ],
    )


def _print_classes(item: Quality) -> None:
    title = f"{item.model} {item.version}"
    rows = [
        [
            label,
            f"{found.support:,}",
            *_show(found.precision),
            *_show(found.recall),
            "few labels" if found.is_few else "",
        ]
        for label, found in item.classes.items()
    ]
    headers = ["label", "labels", "precision", "95 % interval", "recall", "95 % interval", ""]
    print_section(f"{title}: classes", headers, rows[:SHOWN])
    _say_more(len(rows))
    mistakes = [
        [label, prediction, f"{count:,}"]
        for (label, prediction), count in item.confusion.items()
        if label != prediction
    ]
    print_section(f"{title}: mistakes", ["label", "predicted", "times"], mistakes[:SHOWN])
    _say_more(len(mistakes))


def _say_more(rows: int) -> None:
    if rows > SHOWN:
        say(f"and {rows - SHOWN:,} more: --json")


def _show(interval: Interval) -> tuple[str, str]:
    """Return a share and its interval, as a table has them."""
    if not interval.n:
        return "", ""
    return f"{interval.value:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"
