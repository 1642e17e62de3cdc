"""A release for people: the gates that it has passed, where it stands, and with which figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marwright.release.history import History, Line, Standing

__all__ = ["Gate", "list_releases", "Progress"]

GATE_EVENTS = {"step": "current", "passed": "passed", "failed": "failed"}


@dataclass(frozen=True)
class Gate:
    """One step of a release."""

    step: str
    state: str
    """passed, failed, current, or interrupted."""
    figures: tuple[tuple[str, str], ...]
    reason: str
    began: str


@dataclass(frozen=True)
class Progress:
    """A release with its steps."""

    standing: Standing
    gates: tuple[Gate, ...]
    is_running: bool
    """Whether a process makes it just now."""

    @property
    def outcome(self) -> str:
        """How it ended, or where it stands."""
        if self.standing.is_open:
            word = "in progress" if self.is_running else "interrupted"
            return f"{word}: {self.standing.step}"
        return self.standing.last.event

    @property
    def can_return(self) -> bool:
        """Whether there is something to take back."""
        return self.standing.is_open or self.standing.last.event == "released"


def list_releases(history: History, *, is_running: bool) -> list[Progress]:
    """Return all releases, the last one first; `is_running`: one is being made just now."""
    lines: dict[str, list[Line]] = {}
    for line in history.read():
        lines.setdefault(line.release, []).append(line)
    return [_follow(found, is_running) for found in reversed(lines.values())]


def _follow(lines: Sequence[Line], is_running: bool) -> Progress:
    """Return one release from its lines."""
    standing = Standing(lines[0], lines[-1])
    is_made = standing.is_open and is_running
    return Progress(standing, tuple(_list_gates(lines, is_made)), is_made)


def _list_gates(lines: Sequence[Line], is_running: bool) -> Iterator[Gate]:
    """Yield each step once, as the last line on it says."""
    gates: dict[str, Gate] = {}
    for line in lines:
        if line.event in GATE_EVENTS:
            before = gates.get(line.step)
            began = before.began if before and line.event != "step" else line.time
            figures = tuple(_list_figures(line.figures))
            state = GATE_EVENTS[line.event]
            if state == "current" and not is_running:
                state = "interrupted"
            gates[line.step] = Gate(line.step, state, figures, line.reason, began)
    yield from gates.values()


def _list_figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield key, ", ".join(f"{name} {_show(item)}" for name, item in value.items())
        else:
            yield key, _show(value)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
