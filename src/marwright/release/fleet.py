"""A release to several servers: each makes its own, and waits for the word to move and to keep it.

What is at stake is decided here alone: whether all move, or all are as they were. A server that was
cut off takes itself back when its lease ends (lead.py), so that it is where the others are when it
comes back; who leads gives it up after as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.archive.document import Document
from marwright.archive.reader import read_manifest
from marwright.errors import (
    ConfigurationError,
    ConnectionFailedError,
    MarwrightError,
    ReleaseError,
)
from marwright.release.candidate import digest_file
from marwright.release.history import HISTORY_NAME, Event, History, Line, make_line, start_line
from marwright.release.member import Member
from marwright.release.release import KEEP, MOVE
from marwright.server.deployment import Deployment
from marwright.server.registry import DEPLOYMENT_NAME

__all__ = ["find_fleet", "Fleet", "FleetRelease", "open_fleet", "roll_back_fleet"]

LOOK_SECONDS = 0.5
RETURN_SECONDS = 120.0
"""How long servers may take to go back: each lets its candidate answer what it holds."""

Tell = Callable[[str], None]


@dataclass
class _Part:
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
        return self.member.name

    def waits_for(self, word: str) -> bool:
        """Whether it has come to where it waits for a word."""
        return any(line.event == "step" and line.step == word for line in self.lines)

    def take(self, state: dict[str, Any]) -> list[Line]:
        """Take what it answered; return what it has decided since."""
        fresh = [Line(**line) for line in state["lines"]]
        self.lines += fresh
        self.running, self.ended, self.silent = state["running"], state["ended"], ""
        error = state.get("error")
        if error and (self.word != "back" or self.ended == "stuck"):
            self.problem = str(ReleaseError.from_json(error))
        return fresh


@dataclass(frozen=True)
class Fleet:
    """The servers that one deploy.yaml names."""

    path: Path
    deployment: Deployment
    members: tuple[Member, ...]

    @property
    def history(self) -> History:
        """What was decided for all of them; each server has its own besides."""
        return History(self.path.with_name(HISTORY_NAME))

    @property
    def lease(self) -> float:
        """Seconds without a word after which a server goes back, and is given up here."""
        return self.deployment.releases.lease_seconds


def find_fleet(to: str | None) -> Path | None:
    """Return the deploy.yaml that is meant, if it is one of a fleet."""
    path = Path(to or DEPLOYMENT_NAME)
    if not path.is_file():
        return None
    values = Document.read(path, error=ConfigurationError).values
    return path if isinstance(values, dict) and "servers" in values else None


@contextlib.contextmanager
def open_fleet(path: Path) -> Iterator[Fleet]:
    """Yield the fleet of a deploy.yaml.

    Raises:
        ConfigurationError: all that is wrong in it, each with its line.
    """
    deployment = Deployment.read(path)
    with contextlib.ExitStack() as stack:
        patience = deployment.releases.lease_seconds / 4
        members = [
            stack.enter_context(Member(each, patience=patience))
            for each in deployment.servers or ()
        ]
        yield Fleet(path, deployment, tuple(members))


class FleetRelease:
    """One archive on its way to all servers; `run` takes it to its end.

    `tell` hears of each decision of each server in a line.
    """

    def __init__(self, fleet: Fleet, archive: Path, *, tell: Tell) -> None:
        if not archive.exists() and archive.parent == Path():
            archive = fleet.deployment.store / archive
        manifest = read_manifest(archive)
        self._fleet = fleet
        self._path = archive
        self._tell = tell
        self.digest = digest_file(archive)
        """SHA-256 of the archive's file."""
        self._key = manifest.name, manifest.version
        self._led = _Led(fleet, self._key[0], archive.name, self.digest, tell=tell)

    def check(self) -> list[dict[str, Any]]:
        """Bring the archive to each server, and return the candidate that it is there.

        Raises:
            ReleaseError: all that speaks against it, at all servers; nothing was moved.
        """
        found = self._led.do(self._examine)
        problems = [text for name, said in found for text in _list_texts(name, said)]
        if problems:
            raise ReleaseError(
                f"{self._path.name} cannot be released to {self._fleet.path}",
                found=problems[0] if len(problems) == 1 else f"{len(problems)} problems",
                remedy="nothing was moved; mend it, and try again",
                detail="\n".join(problems) if len(problems) > 1 else "",
            )
        return [{"server": name, **said} for name, said in found if isinstance(said, dict)]

    def _examine(self, part: _Part) -> tuple[str, dict[str, Any] | MarwrightError]:
        try:
            part.member.upload(self._path)
            asked = {"archive": self._path.name, "digest": self.digest}
            return part.name, part.member.check(asked)
        except MarwrightError as exc:
            return part.name, exc

    def run(self) -> Line:
        """Move all servers; where one fails or cannot be reached, return those that were moved.

        Returns the first line of its history.

        Raises:
            ReleaseError: as `check`; or a server has stopped it, and all went back; or one could
                not be reached, and it says what becomes of it.
            KeyboardInterrupt: it was taken back.
        """
        self._begun = self._make_first(self.check())
        self._fleet.history.add(self._begun)
        try:
            self._move()
        except BaseException as exc:
            reason = str(exc) if isinstance(exc, Exception) else "it was interrupted"
            self._note("failed", reason=reason)
            self._led.take_back(self._begun, reason=reason)
            raise
        self._note("released")
        return self._begun

    def _make_first(self, candidates: Sequence[dict[str, Any]]) -> Line:
        def join(key: str) -> str:
            return ", ".join(dict.fromkeys(each[key] for each in candidates))

        return start_line(
            *self._key,
            before=join("before"),
            archive=self._path.name,
            digest=self.digest,
            before_archive=join("before_archive"),
            deployment=digest_file(self._fleet.path),
        )

    def _move(self) -> None:
        """Let servers try, move, and, once all have moved, keep the version."""
        parts = self._led.parts
        together = self._fleet.deployment.releases.order == "all at once"
        for group in [parts] if together else [[part] for part in parts]:
            self._begin(group)
            self._await(group, "tried", lambda part: part.waits_for(MOVE))
            for part in group:
                part.word = "move"
            self._await(group, "moved", lambda part: part.waits_for(KEEP))
        for part in parts:  # each has moved; one that is lost by now still sends all back
            part.word = "keep"
            self._await([part], "kept", lambda part: part.ended == "released")

    def _begin(self, group: Sequence[_Part]) -> None:
        asked = {"archive": self._path.name, "digest": self.digest, "lease": self._fleet.lease}
        for part in group:
            part.running = True  # also where its answer is lost
        for part in group:
            self._note("step", part.name)
            part.take(part.member.begin(asked))

    def _await(self, group: Sequence[_Part], step: str, is_there: Callable[[_Part], bool]) -> None:
        """Speak to all that have begun until a group has come somewhere.

        Raises:
            ReleaseError: one of them does not pass, or cannot be reached any more.
        """
        left = list(group)
        while left:
            self._led.speak()
            for part in [part for part in left if is_there(part)]:
                left.remove(part)
                self._note("passed", f"{part.name} {step}")
            self._led.raise_problem()
            if left:
                time.sleep(LOOK_SECONDS)

    def _note(self, event: Event, step: str = "", *, reason: str = "") -> None:
        line = make_line(self._begun, event, step=step, reason=reason)
        self._tell(self._fleet.history.add(line).describe())


class _Led:
    """The servers of one release, and what they are told."""

    def __init__(self, fleet: Fleet, model: str, archive: str, digest: str, *, tell: Tell) -> None:
        self._fleet = fleet
        self._asked = {"model": model, "archive": archive, "digest": digest}
        self._tell = tell
        self.parts = [_Part(member) for member in fleet.members]

    def do(self, act: Callable[[_Part], Any]) -> list[Any]:
        """Do something at all servers at once; return what each has brought."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(act, self.parts))

    def speak(self) -> None:
        """Say each server its word that has a release, and hear how that stands."""
        self.do(self._say)

    def _say(self, part: _Part) -> None:
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
            if part.silent and silent > self._fleet.lease:
                raise ReleaseError(
                    f"{part.name} was not heard of for {silent:.0f} s", found=part.silent
                )

    def take_back(self, begun: Line, *, reason: str, event: Event = "returned") -> Line:
        """Have all servers that have a release go back, and wait for that.

        Raises:
            ReleaseError: one could not; says which, and what becomes of it. The release stands open
                where that one may have kept the version.
        """
        kept = {part.name for part in self.parts if part.word in {"keep", "back"}}
        began = time.monotonic()
        for part in self.parts:
            part.word, part.reason, part.problem = "back", reason, ""
        left = [p for p in self.parts if p.running or p.ended in {"released", "failed"}]
        for part in left:
            part.running = True
        while left and time.monotonic() - began < RETURN_SECONDS:
            self.speak()
            left = [part for part in left if not _is_back(part)]
            silent = [part for part in left if part.silent]
            if silent == left and time.monotonic() - began > self._fleet.lease:
                break
            time.sleep(LOOK_SECONDS)
        return self._end(begun, reason, event, kept)

    def _end(self, begun: Line, reason: str, event: Event, kept: set[str]) -> Line:
        """Write down that all are back, or raise what is left to do."""
        problems, is_open = [], False
        for part in self.parts:
            if part.running and part.silent and part.name not in kept:
                lease = f"{self._fleet.lease:g} s"
                problems.append(f"{part.silent}; it goes back by itself within {lease}")
            elif part.running or part.problem or part.ended == "stuck":
                is_open = True
                problems.append(
                    part.silent or f"{part.name}: {part.problem or 'it did not go back'}"
                )
        line = make_line(begun, event, reason=reason)
        if not is_open:
            self._tell(self._fleet.history.add(line).describe())
        if problems:
            raise ReleaseError(
                f"not all servers are back at {begun.before}",
                found="; ".join(problems),
                remedy=f"once they answer: marwright rollback {begun.model} --to {self._fleet.path}"
                if is_open
                else "the others are",
            )
        return line


def roll_back_fleet(fleet: Fleet, model: str, *, reason: str, tell: Tell) -> Line:
    """Return all servers to what they had before the last release to the fleet.

    Raises:
        ReleaseError: there is none; or a server could not go back.
    """
    standings = fleet.history.list_standings(model)
    moved = [s for s in standings if s.is_open or s.last.event == "released"]
    if not moved:
        raise ReleaseError(
            f"there is no release of {model} to take back",
            remedy="see what was released: marwright releases",
        )
    begun = moved[-1].begun
    led = _Led(fleet, model, begun.archive, begun.digest, tell=tell)
    for part in led.parts:
        part.word, part.running = "back", True
    event: Event = "returned" if moved[-1].is_open else "rolled back"
    return led.take_back(begun, reason=reason, event=event)


def _is_back(part: _Part) -> bool:
    """Whether a server is where it was before, or says that it cannot be."""
    return not part.running and part.ended in {"returned", "stuck"} and not part.silent


def _list_texts(name: str, said: dict[str, Any] | MarwrightError) -> list[str]:
    """Return what a server has against an archive, each with its name."""
    if not isinstance(said, MarwrightError):
        return []
    texts = said.detail.splitlines() or [said.found if isinstance(said, ReleaseError) else ""]
    return [f"{name}: {text}" if text else str(said) for text in texts]
