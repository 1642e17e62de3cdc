"""The servers of a fleet in one release: what each is told, and how it stands there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from marwright.errors import ConnectionFailedError, MarwrightError, ReleaseError
from marwright.release.history import Line
from marwright.release.member import Member

__all__ = ["LOOK_SECONDS", "Members", "Outcome", "Progress"]

LOOK_SECONDS = 0.5
RETURN_SECONDS = 120.0
"""How long servers may take to go back: each lets its candidate answer what it holds."""

Tell = Callable[[str], None]


@dataclass
class Progress:
    """How the release stands at one server."""

    member: Member
    word: str = "stay"
    reason: str = ""
    lines: list[Line] = field(default_factory=list)
    running: bool = False
    ended: str = ""
    """How it ended there: "released", "returned", "failed", or "stuck"; "" before."""
    problem: str = ""
    """What it said against it."""
    silent: str = ""
    """Why it could not be asked the last time; empty where it could."""

    @property
    def name(self) -> str:
        """The server's host and port."""
        return self.member.name

    def waits_for(self, word: str) -> bool:
        """Whether it has come to where it waits for a word."""
        return any(line.event == "step" and line.step == word for line in self.lines)

    def take(self, state: dict[str, Any]) -> list[Line]:
        """Take what it answered; return what it has decided since."""
        fresh = [Line(**line) for line in state["lines"]]
        self.lines += fresh
        self.running, self.ended = state["running"], state["ended"]
        self.problem = self.silent = ""
        error = state.get("error")
        if error and (self.word != "back" or self.ended == "stuck"):
            self.problem = str(ReleaseError.from_json(error))
        return fresh

    @property
    def is_back(self) -> bool:
        """Whether it is where it was before, or says that it cannot be."""
        return not self.running and self.ended in {"returned", "stuck"} and not self.silent


@dataclass(frozen=True)
class Outcome:
    """What came of taking a release back."""

    problems: tuple[str, ...]
    """Which servers are not back, and what becomes of them."""
    is_open: bool
    """Whether one of them may have kept the version."""


class Members:
    """All servers of one release: what they are told, and how it stands there.

    `asked` names model, archive and digest; `lease` are the seconds after which one that is not
    heard of is given up.
    """

    def __init__(
        self, members: Sequence[Member], asked: Mapping[str, str], *, lease: float, tell: Tell
    ) -> None:
        self._asked = asked
        self._lease = lease
        self._tell = tell
        self.parts = [Progress(member) for member in members]

    def do(self, act: Callable[[Progress], Any]) -> list[Any]:
        """Do something at all servers at once; return what each has brought."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(act, self.parts))

    def speak(self) -> None:
        """Say each server its word that has a release, and hear how that stands."""
        self.do(self._say)

    def _say(self, part: Progress) -> None:
        if not part.running:
            return
        asked = {"word": part.word, "reason": part.reason[:2000], "seen": len(part.lines)}
        try:
            state = part.member.say({**self._asked, **asked})
        except ConnectionFailedError as exc:
            part.silent = str(exc)
        except MarwrightError as exc:
            part.problem, part.silent = str(exc), ""
        else:
            for line in part.take(state):
                self._tell(f"{part.name}: {line.describe()}")
                if line.digest != self._asked["digest"]:
                    part.problem = f"it releases another archive, {line.digest}"

    def raise_problem(self) -> None:
        """Raise ReleaseError where a server does not pass, or was not heard of for its lease."""
        for part in self.parts:
            if part.problem:
                raise ReleaseError(f"{part.name} has stopped the release", found=part.problem)
            silent = time.monotonic() - part.member.heard
            if part.silent and silent > self._lease:
                raise ReleaseError(
                    f"{part.name} was not heard of for {silent:.0f} s", found=part.silent
                )

    def take_back(self, reason: str) -> Outcome:
        """Have all servers that have a release go back, and wait for that."""
        told = {part.name for part in self.parts if part.word in {"keep", "back"}}
        began = time.monotonic()
        for part in self.parts:
            part.word, part.reason, part.problem = "back", reason, ""
        left = [p for p in self.parts if p.running or p.ended in {"released", "failed"}]
        for part in left:
            part.running = True
        while left and time.monotonic() - began < RETURN_SECONDS:
            self.speak()
            left = [part for part in left if not part.is_back]
            silent = [part for part in left if part.silent]
            if silent == left and time.monotonic() - began > self._lease:
                break
            time.sleep(LOOK_SECONDS)
        returning = [p for p in left if p.silent and p.name not in told]
        problems = [
            f"{p.silent}; it goes back by itself within {self._lease:g} s" for p in returning
        ]
        stuck = [p for p in self.parts if (p in left and p not in returning) or p.ended == "stuck"]
        problems += [p.silent or f"{p.name}: {p.problem or 'it did not go back'}" for p in stuck]
        return Outcome(tuple(problems), is_open=bool(stuck))
