"""Printing: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from marwright.errors import MarwrightError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["make_progress", "print_error", "print_json", "print_table", "say"]


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, default=str))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns; without rows, only the headers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="", show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # A pipe has no width: whoever reads it wants each row in one line.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 240)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    print("\n".join(line for line in lines if line))


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_error(error: MarwrightError, *, as_json: bool) -> None:
    """Print an error in one line, with the lines that belong to it below; or as JSON."""
    if as_json:
        print(json.dumps(error.to_json(), indent=2), file=sys.stderr)
        return
    say(f"error: {error}")
    if error.detail:
        say("\n".join(f"    {line}" for line in error.detail.splitlines()))


def make_progress() -> Progress:
    """Return a progress bar with time left, on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
