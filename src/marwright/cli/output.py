"""Printing: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from marwright.errors import MarwrightError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "escape",
    "make_progress",
    "print_error",
    "print_json",
    "print_section",
    "print_table",
    "say",
]


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, default=str))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns; without rows, only the headers."""
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    # A pipe has no width: whoever reads it wants each row in one line.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 240
    lines = _align([*([list(headers)] if any(headers) else []), *cells])
    if all(line.isascii() and len(line) <= width for line in lines):
        if any(headers):
            lines.insert(1, " " + "─" * (len(lines[0]) - 1))
    else:
        lines = _fold(headers, cells, width)
    print("\n".join(line.rstrip() for line in lines if line.strip()))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line a row.

    Wide letters and narrow terminals are for rich, which is not always taken: importing it takes
    0.1 s.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        " " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _fold(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines of any table, its cells folded to the width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="", show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def print_section(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table below its title, after an empty line; nothing where there are no rows."""
    if rows:
        print(f"\n{title}" if title else "")
        print_table(headers, rows)


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    lines = (escape(line.expandtabs()) for line in text.split("\n"))
    print("\n".join(lines), file=sys.stderr, flush=True)


def escape(text: str) -> str:
    """Return one line without what would rule a terminal; names in archives are anybody's."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def print_error(error: MarwrightError, *, as_json: bool) -> None:
    """Print an error in one line, with the lines that belong to it below; or as JSON."""
    if as_json:
        print(json.dumps(error.to_json(), indent=2), file=sys.stderr)
        return
    say(f"error: {escape(str(error))}")
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
