"""`marwright feedback`: true labels that came late, joined with the predictions that are logged."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json, Server
from marwright.cli.output import print_json, print_section, print_table

if TYPE_CHECKING:
    from marwright.monitor.feedback import Joined

__all__ = ["feedback"]


def feedback(
    labels: Annotated[
        Path, typer.Argument(help="CSV with a header: request,label and perhaps item,time.")
    ],
    folder: Annotated[
        Path | None,
        typer.Option(help="The prediction log's folder; the server's where not given."),
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Keep the true labels of logged predictions, found by their request's id.

    Labels whose predictions are not there are kept for when they come. Where an item has two, the
    later one counts. A row that cannot be used keeps all of the file out; exit 1 then, and where a
    request has several items and its row names none.
    """
    from marwright.monitor.feedback import list_classes, read_labels
    from marwright.monitor.predictions import find_log

    rows = read_labels(labels)
    log, deployment = find_log(folder=folder, server=server)
    joined = log.add_labels(rows, classes=list_classes(deployment) if deployment else ())
    if as_json:
        print_json({"labels": len(rows), **asdict(joined)})
    else:
        _print_joined(joined, len(rows))
    if joined.ambiguous:
        raise typer.Exit(1)


def _print_joined(joined: Joined, rows: int) -> None:
    print_table(
        ["labels", "matched", "unmatched", "doubled", "changed", "ambiguous", "unknown"],
        [
            [
                f"{rows:,}",
                f"{joined.matched:,}",
                f"{joined.unmatched:,}",
                f"{joined.doubled:,}",
                f"{len(joined.changed):,}",
                f"{len(joined.ambiguous):,}",
                f"{sum(joined.unknown.values()):,}",
            ]
        ],
    )
    print_section(
        "not kept: the request has several items, and the row names none",
        ["line", "request", "label"],
        [[label.line, label.request, label.label] for label in joined.ambiguous],
    )
    print_section(
        "two labels for one item: the later one counts",
        ["line", "request", "item", "before", "said now", "counts"],
        [
            [item.line, item.request, _show(item.item), item.before, item.label, item.counts]
            for item in joined.changed
        ],
    )
    print_section(
        "kept, but no model is known to have such a label",
        ["label", "rows"],
        list(joined.unknown.items()),
    )


def _show(item: int | None) -> object:
    return "" if item is None else item
