"""What a look at the server means to people: versions by model, states, problems, changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marwright.monitor.page.plots import DASH, show_number, show_seconds
from marwright.server.supervision.status import UNANSWERED

if TYPE_CHECKING:
    from marwright.monitor.looks import Look

__all__ = [
    "describe_changes",
    "describe_server",
    "describe_state",
    "Group",
    "group_versions",
    "list_differences",
    "list_facts",
    "list_problems",
    "list_states",
    "Row",
    "Scene",
    "show_clock",
    "show_moment",
    "show_time",
]

OPEN_ROWS = 20
"""Up to so many versions, all models are shown unfolded."""
LONGEST_STATE = 160
MOST_CHANGES = 5


@dataclass(frozen=True)
class Scene:
    """The looks of a server, and which of them is shown."""

    looks: Sequence[Look]

    @property
    def last(self) -> Look | None:
        """The latest look, whatever came of it."""
        return self.looks[-1] if self.looks else None

    @property
    def shown(self) -> Look | None:
        """The latest look that saw models: a server that is away is shown as it was."""
        seen = (look for look in reversed(self.looks) if look.status.get("models"))
        return next(seen, self.last)

    @property
    def problem(self) -> str:
        """Why the server did not answer; empty where it did."""
        return self.last.problem if self.last else "nobody has looked yet"

    @property
    def models(self) -> Sequence[Mapping[str, Any]]:
        """The versions of the look that is shown."""
        found: Sequence[Mapping[str, Any]] = (
            self.shown.status.get("models", ()) if self.shown else ()
        )
        return found

    def find(self, model: str, version: str) -> Mapping[str, Any] | None:
        """Return one version of it."""
        return next((m for m in self.models if (m["name"], m["version"]) == (model, version)), None)


@dataclass(frozen=True)
class Row:
    """One version in the overview."""

    model: str
    version: str
    default: bool
    mood: str
    """good, waiting, bad or off: what the row's look depends on, beside its words."""
    state: str
    cells: tuple[str, ...]
    """Workers, memory, rates, drift."""

    @property
    def key(self) -> str:
        """What the row is found by."""
        return f"{self.model} {self.version}"

    @property
    def values(self) -> tuple[str, ...]:
        """All of it that changes while somebody looks."""
        return (self.mood, self.state, *self.cells)


@dataclass(frozen=True)
class Group:
    """A model with its versions, the newest first."""

    name: str
    rows: tuple[Row, ...]
    is_open: bool

    @property
    def ready(self) -> int:
        """How many versions are as they are to be."""
        return sum(row.mood in {"good", "off"} for row in self.rows)


def group_versions(scene: Scene, wanted: str = "") -> list[Group]:
    """Return the models by name; `wanted` is a text that a model or version has in its name."""
    rows: dict[str, list[Row]] = {}
    for item in scene.models:
        if wanted.lower() in f"{item['name']} {item['version']}".lower():
            rows.setdefault(item["name"], []).append(_make_row(scene, item))
    is_short = sum(map(len, rows.values())) <= OPEN_ROWS
    return [
        Group(
            name,
            tuple(sorted(found, key=lambda row: _sort_version(row.version), reverse=True)),
            is_open=is_short or bool(wanted) or any(row.mood == "bad" for row in found),
        )
        for name, found in sorted(rows.items(), key=lambda pair: (pair[0].lower(), pair[0]))
    ]


def _sort_version(version: str) -> list[tuple[int, int, str]]:
    """Return what puts 10.0 after 9.0."""
    parts = version.replace("-", ".").split(".")
    numbers = (part.isascii() and part.isdecimal() for part in parts)
    return [
        (1, int(part[:18]), "") if number else (0, 0, part)
        for part, number in zip(parts, numbers, strict=True)
    ]


def _make_row(scene: Scene, item: Mapping[str, Any]) -> Row:
    key = (item["name"], item["version"])
    shown, away = scene.shown, bool(scene.problem)
    rates = shown.rates.get(key) if shown and not away else None
    drift = shown.drift.get(key) if shown else None
    mood, state = describe_state(item, away=away)
    return Row(
        *key,
        default=bool(item["default"]),
        mood=mood,
        state=state,
        cells=(
            f"{0 if away else item['ready_workers']} of {item['workers']}",
            f"{item['memory_bytes'] >> 20} MiB",
            show_number(rates.requests if rates else None),
            show_number(rates.errors if rates else None),
            show_seconds(rates.p50 if rates else None),
            show_seconds(rates.p99 if rates else None),
            show_number(rates.queue if rates else None),
            DASH if not drift else "shifted" if drift.get("detected") else "none",
        ),
    )


def describe_state(item: Mapping[str, Any], *, away: bool = False) -> tuple[str, str]:
    """Return a version's mood, and its state for people."""
    problem = str(item["problem"])
    if away:
        return "bad", "unknown: no answer"
    if problem == UNANSWERED:
        return "waiting", "starting"
    if problem:
        return "bad", f"not ready: {problem}"[:LONGEST_STATE]
    return ("good", "ready") if item["workers"] else ("off", "no workers")


def describe_server(scene: Scene) -> tuple[str, str]:
    """Return the server's mood, and its state for people."""
    if scene.problem:
        return "bad", "no answer"
    status = scene.last.status if scene.last else {}
    phase = str(status.get("phase", "unknown"))
    if status.get("ready"):
        return "good", f"{phase}, ready"
    return ("waiting" if phase == "starting" else "bad"), f"{phase}, not ready"


def list_facts(scene: Scene) -> list[tuple[str, str]]:
    """Return what there is to say of the server as a whole."""
    status = scene.shown.status if scene.shown else {}
    facts = {
        "Address": status.get("address"),
        "Running since": show_time(str(status.get("since", ""))),
        "Restarts": str(status.get("restarts", 0)),
        "Supervisor": f"process {status['pid']}" if status.get("pid") else "",
        "Configuration": status.get("config") or "the command line",
        "Log": status.get("log"),
        "Health": status.get("health_url"),
    }
    return [(key, str(value)) for key, value in facts.items() if value]


def list_problems(scene: Scene) -> list[str]:
    """Return what is wrong with the server as a whole."""
    status = scene.last.status if scene.last else {}
    away = [f"The server does not answer: {scene.problem}"] if scene.problem else []
    replicas = [
        f"replica {one['name']}: {one['problem']}"
        for one in status.get("replicas", ())
        if one["problem"]
    ]
    problems = [str(text) for text in status.get("problems", ()) if text != scene.problem]
    return [*away, *problems, *replicas]


def list_differences(scene: Scene) -> list[str]:
    """Return where the server is not as it is wanted; while a release is made, it must not be."""
    return list(map(str, scene.last.status.get("differences", ()))) if scene.last else []


def list_states(scene: Scene) -> dict[str, str]:
    """Return the states of the server and of each version: a change of one is worth a word."""
    found = {"The server": describe_server(scene)[1]}
    if not scene.problem:
        for item in scene.models:
            default = ", default" if item["default"] else ""
            found[f"{item['name']} {item['version']}"] = describe_state(item)[1] + default
    return found


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return sentences on what has changed, for who does not see the page."""
    texts = [f"{key}: {state}." for key, state in now.items() if before.get(key) != state]
    if len(now) > 1:  # else the server is away, and nobody knows
        texts += [f"{key} is gone." for key in before if key not in now]
    if len(texts) <= MOST_CHANGES:
        return texts
    return [*texts[: MOST_CHANGES - 1], f"And {len(texts) - MOST_CHANGES + 1} more changes."]


def show_clock(moment: float) -> str:
    """Write a moment as the clock of this machine shows it."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


def show_moment(moment: float) -> str:
    """Write a moment with its day."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def show_time(text: str) -> str:
    """Write a moment of ISO 8601 to the second."""
    return text[:19].replace("T", " ")
