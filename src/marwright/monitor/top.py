"""What `marwright top` shows of a server: the last look, with its versions in an order."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from marwright.errors import StorageError
from marwright.monitor.looks import Look, Rates
from marwright.release.history import HISTORY_NAME, History
from marwright.release.target import place_history
from marwright.server.registry import Record

__all__ = [
    "ASCII_BARS",
    "BARS",
    "draw_bars",
    "find_releases",
    "Order",
    "ORDERS",
    "Overview",
    "Row",
    "summarize",
    "trace",
]

Order = Literal["traffic", "errors", "p99", "name"]
ORDERS: tuple[Order, ...] = get_args(Order)
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"


@dataclass(frozen=True)
class Row:
    """One version."""

    model: str
    version: str
    default: bool
    workers: int
    """How many are wanted."""
    ready_workers: int
    memory_bytes: int
    problem: str
    """Why it is not ready; empty where it is."""
    rates: Rates
    drift: Mapping[str, float] = field(default_factory=dict)
    """Of its last window, as a look has it; empty where none was compared."""

    @property
    def key(self) -> tuple[str, str]:
        """Model and version."""
        return self.model, self.version

    @property
    def state(self) -> str:
        """How it is, in few letters."""
        if not self.problem:
            return "ready"
        return "not ready" if self.ready_workers or not self.workers else "no worker"

    @property
    def shift(self) -> str:
        """What its last window was found to be, in few letters."""
        if "detected" not in self.drift:
            return ""
        return "shifted" if self.drift["detected"] else "no shift"


@dataclass(frozen=True)
class Overview:
    """A server at one moment."""

    time: float
    """Of the look, in seconds since the epoch."""
    name: str
    state: str
    address: str
    rows: tuple[Row, ...]
    """Every version, in the order that was asked for."""
    problems: tuple[str, ...]
    releases: tuple[str, ...]
    """Where the open ones stand."""
    problem: str = ""
    """Why the server does not answer; the rest is then of the last look that it answered."""

    @property
    def total(self) -> Rates:
        """Requests, errors and queue of all versions together."""
        return Rates(
            requests=sum(row.rates.requests for row in self.rows),
            errors=sum(row.rates.errors for row in self.rows),
            queue=sum(row.rates.queue for row in self.rows),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as `marwright top --json` prints it."""
        rows = [
            {
                **{key: value for key, value in asdict(row).items() if key != "rates"},
                **asdict(row.rates),
            }
            for row in self.rows
        ]
        moment = datetime.fromtimestamp(self.time, timezone.utc)
        return {
            "time": moment.isoformat(timespec="milliseconds"),
            "server": self.name,
            "state": self.state,
            "address": self.address,
            "problem": self.problem,
            "problems": list(self.problems),
            "releases": list(self.releases),
            "requests": self.total.requests,
            "errors": self.total.errors,
            "queue": self.total.queue,
            "versions": rows,
        }


def summarize(
    looks: Sequence[Look], *, order: Order = "traffic", releases: Sequence[str] = ()
) -> Overview:
    """Return the last of some looks; where nobody answered then, the last one that was answered.

    `looks` is not empty.
    """
    last = looks[-1]
    look = next((one for one in reversed(looks) if not one.problem), last)
    status = look.status
    if last.problem:
        state = "no answer"
    else:
        ready = "ready" if status.get("ready") else "not ready"
        state = f"{status.get('phase', 'unknown')}, {ready}"
        if replicas := status.get("replicas", ()):
            state += f", {sum(one['ready'] for one in replicas)} of {len(replicas)} replicas"
    rows = [_make_row(model, look) for model in status.get("models", ())]
    return Overview(
        time=last.time,
        name=str(last.status.get("name", "")),
        state=state,
        address=str(status.get("address", "")),
        rows=tuple(sorted(rows, key=lambda row: _rank(row, order))),
        problems=() if last.problem else tuple(_list_problems(status)),
        releases=tuple(releases),
        problem=last.problem,
    )


def _make_row(model: Mapping[str, Any], look: Look) -> Row:
    key = model["name"], model["version"]
    return Row(
        *key,
        default=model["default"],
        workers=model["workers"],
        ready_workers=model["ready_workers"],
        memory_bytes=model["memory_bytes"],
        problem=model["problem"],
        rates=look.rates.get(key, Rates()),
        drift=dict(look.drift.get(key, {})),
    )


def _rank(row: Row, order: Order) -> tuple[Any, ...]:
    """Return what rows are sorted by: the highest first, and what is alike by name."""
    rates = row.rates
    highest = {
        "traffic": (-rates.requests,),
        "errors": (-rates.errors, -rates.requests),
        "p99": (-(rates.p99 or 0), -rates.requests),
        "name": (),
    }
    return (*highest[order], row.model, row.version)


def _list_problems(status: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the server, its replicas and its versions, each in one line."""
    replicas = [
        f"{one['name']}: {one['problem']}" for one in status.get("replicas", ()) if one["problem"]
    ]
    models = [
        f"{one['name']} {one['version']}: {one['problem']}"
        for one in status.get("models", ())
        if one["problem"]
    ]
    return [*status.get("problems", ()), *replicas, *models]


def find_releases(record: Record) -> list[str]:
    """Return where the open releases of a server stand, each in one line."""
    with contextlib.suppress(StorageError):
        if record.config:
            path = Path(record.config).with_name(HISTORY_NAME)
        else:
            path = place_history(record.name)
        standings = History(path).list_standings()
        return [standing.describe() for standing in standings if standing.is_open]
    return []


def trace(looks: Sequence[Look], key: tuple[str, str] | None = None) -> list[float]:
    """Return the requests a second at each look: of a version, or of all; 0 without an answer."""
    if key is not None:
        return [look.rates[key].requests if key in look.rates else 0.0 for look in looks]
    return [sum(rates.requests for rates in look.rates.values()) for look in looks]


def draw_bars(values: Sequence[float], width: int, *, letters: str = BARS) -> str:
    """Return the last values as bars, one letter each; the highest of them is the highest bar."""
    shown = values[-width:] if width > 0 else []
    highest = max(shown, default=0.0)
    if highest <= 0:
        return letters[0] * len(shown)
    steps = len(letters) - 1
    return "".join(letters[round(value / highest * steps)] for value in shown)
