"""`marwright top`: a server and its versions, live in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from marwright.cli.options import Json
from marwright.cli.output import escape, print_json, print_table, say

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from marwright.monitor.looks import Look, Recorder
    from marwright.monitor.top import Overview, Row
    from marwright.server.registry import Record

__all__ = ["top"]

_Shown = TypeVar("_Shown")

KEY_SECONDS = 0.2
"""How long a key is waited for before the screen is looked after."""
KEYS = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|[^\x1b]")
"""A letter, or what a terminal sends for one of the other keys."""
KEY_NAMES = {"A": "up", "B": "down", "5~": "page up", "6~": "page down", "H": "home", "1~": "home"}
PIPE_WIDTH = 240
"""Of output that is no terminal: all columns."""
PROBLEMS = 4
"""Most lines of problems, and of releases: versions are what the screen is for."""


def top(
    server: Annotated[
        str | None,
        typer.Argument(
            envvar="MARWRIGHT_SERVER", help="The server's name; not needed where only one runs."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.5, max=3600, help="Between two looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look twice, print one table, and end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a server live: traffic, errors, latency, workers and drift of each version.

    Keys: q ends, s sorts by another column, arrows and page keys move. Where output is no terminal,
    one table is printed; with --json a line for each look, until Ctrl-C. Exit status 1 where the
    one table is of a server that does not answer.
    """
    from marwright.server.registry import find_record

    record = find_record(server)
    if once or not (as_json or _is_screen()):
        _print_once(record, seconds, as_json=as_json)
    elif as_json:
        _print_lines(record, seconds)
    else:
        _watch(record, seconds)


def _is_screen() -> bool:
    """Whether output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}


def _print_once(record: Record, seconds: float, *, as_json: bool) -> None:
    """Print what happened between two looks."""
    from marwright.monitor.looks import Recorder
    from marwright.monitor.top import find_releases, summarize

    recorder = Recorder(record, seconds=seconds)
    if not recorder.look().problem:
        time.sleep(seconds)
        recorder.look()
    overview = summarize(recorder.looks, releases=find_releases(recorder.record))
    if as_json:
        print_json(overview.to_json())
    else:
        _print_overview(overview)
    if overview.problem:
        raise typer.Exit(1)


def _print_overview(overview: Overview) -> None:
    total = overview.total
    print_table(
        ["", ""],
        [
            ["server", overview.name],
            ["state", overview.state],
            ["address", overview.address or "none yet"],
            ["requests", f"{total.requests:.1f}/s, {total.errors:.1f}/s with 5xx"],
        ],
    )
    if overview.rows:
        print()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
        columns = [one for one in _choose_columns(width, gap=3) if one.title != "traffic"]
        rows = [[column.show(row, "") for column in columns] for row in overview.rows]
        print_table([column.title for column in columns], rows)
    for text in overview.releases:
        say(f"release: {text}")
    for text in filter(None, (overview.problem, *overview.problems)):
        say(f"problem: {text}")


def _print_lines(record: Record, seconds: float) -> None:
    """Print a line of JSON for each look, until Ctrl-C."""
    from marwright.monitor.looks import Recorder
    from marwright.monitor.top import find_releases, summarize

    with Recorder(record, seconds=seconds) as recorder:
        last = 0.0
        while True:
            look = recorder.wait(last, timeout=seconds)
            if look is not None:
                last = look.time
                looks = [one for one in recorder.looks if one.time <= last]
                overview = summarize(looks, releases=find_releases(recorder.record))
                print(json.dumps(overview.to_json()), flush=True)


def _watch(record: Record, seconds: float) -> None:
    """Show it until q is pressed, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    from marwright.monitor.looks import Recorder

    console, view = Console(highlight=False, markup=False), View()
    with Recorder(record, seconds=seconds) as recorder, Keyboard() as keyboard:
        drawn: Any = None
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not view.is_left:
                size, looks = console.size, recorder.looks
                now = (size, len(looks) and looks[-1].time, view.order, view.first)
                if now != drawn:
                    live.update(_draw(recorder, looks, view, console), refresh=True)
                    drawn = now
                for key in keyboard.read(KEY_SECONDS):
                    view.press(key)


@dataclass
class View:
    """What of the versions is on the screen."""

    order: int = 0
    """Place in ORDERS."""
    first: int = 0
    """How many rows are above the screen."""
    lines: int = 1
    """How many rows the screen has room for."""
    is_left: bool = False

    def press(self, key: str) -> None:
        """Do what a key means; keys without a meaning are passed over."""
        from marwright.monitor.top import ORDERS

        steps = {"up": -1, "down": 1, "page up": -self.lines, "page down": self.lines}
        if key == "q":
            self.is_left = True
        elif key == "s":
            self.order, self.first = (self.order + 1) % len(ORDERS), 0
        elif key == "home":
            self.first = 0
        elif key in steps:
            self.first = max(0, self.first + steps[key])

    def choose(self, rows: Sequence[_Shown], lines: int) -> Sequence[_Shown]:
        """Return the rows that are shown on so many lines."""
        self.lines = max(1, lines)
        self.first = max(0, min(self.first, len(rows) - self.lines))
        return rows[self.first : self.first + self.lines]


class Keyboard:
    """Keys as they are pressed; the terminal is as it was once the block ends."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        self._descriptor = -1

    def __enter__(self) -> Keyboard:
        """Have keys come at once, and unseen."""
        if sys.stdin is not None and sys.stdin.isatty():
            self._descriptor = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._descriptor)
            mode = termios.tcgetattr(self._descriptor)
            mode[3] &= ~(termios.ICANON | termios.ECHO)
            mode[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave a shell on our screen
            termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the terminal back, and drop what was pressed too late."""
        if self._before is not None:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)
                termios.tcflush(self._descriptor, termios.TCIFLUSH)

    def read(self, seconds: float) -> list[str]:
        """Return the keys that are pressed within some seconds; q where the terminal is gone."""
        if self._before is None:
            time.sleep(seconds)
            return []
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return []
        try:
            pressed = os.read(self._descriptor, 1024)
        except OSError:
            pressed = b""
        if not pressed:
            return ["q"]
        keys = KEYS.findall(pressed.decode(errors="replace"))
        return [KEY_NAMES.get(key[2:], "") if len(key) > 1 else key for key in keys]


@dataclass(frozen=True)
class Column:
    """One column of the versions."""

    title: str
    width: int
    show: Callable[[Row, str], str]
    """Of a row, and of the traffic that its version had as bars."""
    rank: int
    """The lowest go first where the screen is narrow."""
    is_bad: Callable[[Row], bool] = field(default=lambda row: False)
    align: Literal["left", "right"] = "right"


def _show_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _show_bytes(size: int) -> str:
    return f"{size >> 20} MiB"


COLUMNS = (
    Column("model", 12, lambda row, _: row.model, 14, align="left"),
    Column("version", 10, lambda row, _: row.version, 13, align="left"),
    Column("", 7, lambda row, _: "default" if row.default else "", 4, align="left"),
    Column("state", 9, lambda row, _: row.state, 10, lambda row: bool(row.problem), "left"),
    Column(
        "workers",
        7,
        lambda row, _: f"{row.ready_workers}/{row.workers}",
        9,
        lambda row: row.ready_workers < row.workers,
    ),
    Column("memory", 9, lambda row, _: _show_bytes(row.memory_bytes), 3),
    Column("req/s", 8, lambda row, _: f"{row.rates.requests:.1f}", 12),
    Column(
        "5xx/s", 7, lambda row, _: f"{row.rates.errors:.1f}", 11, lambda row: row.rates.errors > 0
    ),
    Column("p50", 9, lambda row, _: _show_seconds(row.rates.p50), 6),
    Column("p95", 9, lambda row, _: _show_seconds(row.rates.p95), 5),
    Column("p99", 9, lambda row, _: _show_seconds(row.rates.p99), 8),
    Column("queue", 6, lambda row, _: str(row.rates.queue), 7),
    Column(
        "batch", 6, lambda row, _: "-" if row.rates.batch is None else f"{row.rates.batch:.1f}", 1
    ),
    Column("drift", 8, lambda row, _: row.shift, 2, lambda row: row.shift == "shifted", "left"),
    Column("traffic", 16, lambda row, bars: bars, 0, align="left"),
)


def _draw(recorder: Recorder, looks: Sequence[Look], view: View, console: Console) -> Group | Text:
    """Return what fills the screen, and no more than that."""
    from rich.console import Group
    from rich.text import Text

    from marwright.monitor.top import ASCII_BARS, BARS, ORDERS, find_releases, summarize

    if not looks:
        return Text(f"looking at {escape(recorder.record.name)}")
    releases = find_releases(recorder.record)
    overview = summarize(looks, order=ORDERS[view.order], releases=releases)
    letters = BARS if console.encoding.startswith("utf") else ASCII_BARS
    head = _draw_head(overview, looks, letters)
    rows = view.choose(overview.rows, console.height - len(head) - 2)
    more = len(overview.rows) - len(rows)
    shown = f"{view.first + 1}-{view.first + len(rows)} of {len(overview.rows)}" if rows else "none"
    keys = f"q ends  s sorts: {ORDERS[view.order]}  arrows, pages  versions: {shown}"
    foot = Text(
        keys + (f", +{more} more" if more else ""), "dim", no_wrap=True, overflow="ellipsis"
    )
    return Group(*head, _draw_rows(rows, overview, looks, letters, console.width), foot)


def _draw_head(overview: Overview, looks: Sequence[Look], letters: str) -> list[Text]:
    """Return the lines above the versions."""
    from rich.text import Text

    from marwright.monitor.top import draw_bars, trace

    total, rows = overview.total, overview.rows
    clock = datetime.fromtimestamp(overview.time).strftime("%H:%M:%S")
    ready, wanted = (sum(getattr(r, key) for r in rows) for key in ("ready_workers", "workers"))
    facts = [
        f"{total.requests:.1f} requests/s",
        f"{total.errors:.1f} 5xx/s",
        f"queue {total.queue}",
        f"workers {ready} of {wanted}",
        _show_bytes(sum(row.memory_bytes for row in rows)),
        draw_bars(trace(looks), 40, letters=letters),
    ]
    lines = [
        (f"{overview.name}  {overview.state}  {overview.address}  {clock}", "bold"),
        ("  ".join(facts), "dim" if overview.problem else ""),
        *_limit([f"release: {text}" for text in overview.releases], "cyan"),
        *_limit(list(filter(None, [overview.problem, *overview.problems])), "red"),
    ]
    return [Text(escape(text), style, no_wrap=True, overflow="ellipsis") for text, style in lines]


def _limit(texts: Sequence[str], style: str) -> list[tuple[str, str]]:
    """Return the first of some lines, and how many more there are."""
    shown = list(texts) if len(texts) <= PROBLEMS else list(texts[: PROBLEMS - 1])
    if len(shown) < len(texts):
        shown.append(f"+{len(texts) - len(shown)} more: marwright status")
    return [(text, style) for text in shown]


def _draw_rows(
    rows: Sequence[Row], overview: Overview, looks: Sequence[Look], letters: str, width: int
) -> Table:
    """Return the versions, each in one line."""
    from rich.table import Table
    from rich.text import Text

    from marwright.monitor.top import draw_bars, trace

    columns = _choose_columns(width)
    left = width - sum(column.width + 1 for column in columns)  # is the models' besides
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=True, header_style="reverse")
    for column in columns:
        wide = column.width + (left if column.title == "model" else 0)
        table.add_column(
            column.title, width=wide, justify=column.align, no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        bars = ""
        if columns[-1] is COLUMNS[-1]:
            bars = draw_bars(trace(looks, row.key), columns[-1].width, letters=letters)
        style = "dim" if overview.problem else ""
        cells = [(column.show(row, bars), column.is_bad(row)) for column in columns]
        table.add_row(
            *(Text(escape(text), "bold red" if is_bad else "") for text, is_bad in cells),
            style=style,
        )
    return table


def _choose_columns(width: int, *, gap: int = 1) -> list[Column]:
    """Return the columns that a screen has room for, the most important ones first of all."""
    chosen: list[Column] = []
    for column in sorted(COLUMNS, key=lambda column: -column.rank):
        if sum(one.width + gap for one in (*chosen, column)) > width and chosen:
            break
        chosen.append(column)
    return [column for column in COLUMNS if column in chosen]
