"""A release to several servers: each makes its own, and waits for the word to move and to keep it.

What is at stake is decided here alone: whether all move, or all are as they were. A server that was
cut off takes itself back when its lease ends (lead.py), so that it is where the others are when it
comes back; who leads gives it up after as long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.document import Document
from marwright.archive.reader import read_manifest
from marwright.errors import (
    ConfigurationError,
    MarwrightError,
    ReleaseError,
)
from marwright.release.candidate import digest_file
from marwright.release.history import HISTORY_NAME, Event, History, Line, make_line, start_line
from marwright.release.member import Member
from marwright.release.members import LOOK_SECONDS, Members, Progress
from marwright.release.release import KEEP, MOVE
from marwright.server.deployment import Deployment
from marwright.server.registry import DEPLOYMENT_NAME

__all__ = ["find_fleet", "Fleet", "FleetRelease", "open_fleet", "roll_back_fleet"]

Tell = Callable[[str], None]


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

    def gather(self, model: str, archive: str, digest: str, *, tell: Tell) -> Members:
        """Return the servers, for the release of one archive."""
        asked = {"model": model, "archive": archive, "digest": digest}
        return Members(self.members, asked, lease=self.lease, tell=tell)

    def take_back(
        self, servers: Members, begun: Line, *, reason: str, event: Event = "returned", tell: Tell
    ) -> Line:
        """Have all servers go back; write that down unless one may have kept the version.

        Raises:
            ReleaseError: one could not; says which, and what becomes of it.
        """
        outcome = servers.take_back(reason)
        line = make_line(begun, event, reason=reason)
        if not outcome.is_open:
            tell(self.history.add(line).describe())
        if outcome.problems:
            again = f"marwright rollback {begun.model} --to {self.path}"
            raise ReleaseError(
                f"not all servers are back at {begun.before}",
                found="; ".join(outcome.problems),
                remedy=f"once they answer: {again}" if outcome.is_open else "the others are",
            )
        return line


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
        members = []
        for settings in deployment.servers or ():
            members.append(Member(settings, patience=deployment.releases.lease_seconds / 4))
            stack.callback(members[-1].close)
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
        self._members = fleet.gather(self._key[0], archive.name, self.digest, tell=tell)

    def check(self) -> list[dict[str, Any]]:
        """Bring the archive to each server, and return the candidate that it is there.

        Raises:
            ReleaseError: all that speaks against it, at all servers; nothing was moved.
        """
        found = self._members.do(self._examine)
        problems = [text for name, said in found for text in _list_texts(name, said)]
        if problems:
            raise ReleaseError(
                f"{self._path.name} cannot be released to {self._fleet.path}",
                found=problems[0] if len(problems) == 1 else f"{len(problems)} problems",
                remedy="nothing was moved; mend it, and try again",
                detail="\n".join(problems) if len(problems) > 1 else "",
            )
        return [{"server": name, **said} for name, said in found if isinstance(said, dict)]

    def _examine(self, part: Progress) -> tuple[str, dict[str, Any] | MarwrightError]:
        try:
            part.member.upload(self._path, self.digest)
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
            self._fleet.take_back(self._members, self._begun, reason=reason, tell=self._tell)
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
        parts = self._members.parts
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

    def _begin(self, group: Sequence[Progress]) -> None:
        asked = {"archive": self._path.name, "digest": self.digest, "lease": self._fleet.lease}
        for part in group:
            part.running = True  # also where its answer is lost
        for part in group:
            self._note("step", part.name)
            part.take(part.member.begin(asked))

    def _await(
        self, group: Sequence[Progress], step: str, is_there: Callable[[Progress], bool]
    ) -> None:
        """Speak to all that have begun until a group has come somewhere.

        Raises:
            ReleaseError: one of them does not pass, or cannot be reached any more.
        """
        left = list(group)
        while left:
            self._members.speak()
            for part in [part for part in left if is_there(part)]:
                left.remove(part)
                self._note("passed", f"{part.name} {step}")
            self._members.raise_problem()
            if left:
                time.sleep(LOOK_SECONDS)

    def _note(self, event: Event, step: str = "", *, reason: str = "") -> None:
        line = make_line(self._begun, event, step=step, reason=reason)
        self._tell(self._fleet.history.add(line).describe())


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
    servers = fleet.gather(model, begun.archive, begun.digest, tell=tell)
    for part in servers.parts:
        part.word, part.running = "back", True
    event: Event = "returned" if moved[-1].is_open else "rolled back"
    return fleet.take_back(servers, begun, reason=reason, event=event, tell=tell)


def _list_texts(name: str, said: dict[str, Any] | MarwrightError) -> list[str]:
    """Return what a server has against an archive, each with its name."""
    if not isinstance(said, MarwrightError):
        return []
    texts = said.detail.splitlines() or [said.found if isinstance(said, ReleaseError) else ""]
    return [f"{name}: {text}" if text else str(said) for text in texts]
