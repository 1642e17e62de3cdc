"""releases.jsonl: who moved which model when, why, and with which figures; one JSON object a line.

Lines are only ever added. The last ones of a release say where it stands: one that has no line
with an end was interrupted, and is to be finished or taken back.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from marwright.errors import ReleaseError, StorageError
from marwright.storage import hold_path, translate_os_errors

__all__ = [
    "Event",
    "History",
    "HISTORY_NAME",
    "Line",
    "make_line",
    "Standing",
    "start_line",
    "tell_time",
    "tell_user",
]

HISTORY_NAME = "releases.jsonl"

Event = Literal["begun", "step", "passed", "failed", "released", "returned", "rolled back"]
"""What a line tells; the last three are ends."""
ENDS = {"released", "returned", "rolled back"}
_NONE: tuple[Any, ...] = ("", {}, [])
Place = Literal["store", "servers", "deploy.yaml"]


@dataclass(frozen=True)
class Line:
    """One decision."""

    time: str
    """ISO 8601, UTC."""
    release: str
    """Which release: model, version and the moment when it began."""
    event: Event
    model: str
    version: str
    """The version that is released."""
    before: str
    """The version that was the default, and is returned to."""
    step: str = ""
    reason: str = ""
    """Why, in one line."""
    figures: dict[str, Any] = field(default_factory=dict)
    archive: str = ""
    """The file name of the version that is released."""
    digest: str = ""
    """SHA-256 of that file."""
    before_archive: str = ""
    """The file name of the version that was the default."""
    before_digest: str = ""
    """SHA-256 of that file; empty where it cannot be read here."""
    deployment: str = ""
    """SHA-256 of the deploy.yaml as it was when the release began."""
    present: list[Place] = field(default_factory=list)
    """Where the version was before the release began, and stays if that is taken back."""
    user: str = ""

    def describe(self) -> str:
        """Return the decision in one line for people."""
        what = f"{self.step}: " if self.step else ""
        if self.event == "step":
            return f"{what}begun"
        if self.event == "released":
            return f"released {self.model} {self.version}; {self.before} stays to return to"
        if self.event in {"returned", "rolled back"}:
            return f"{self.model} is back at {self.before}: {self.reason}"
        figures = ", ".join(f"{key} {_show(value)}" for key, value in self.figures.items())
        text = self.reason or figures
        return f"{what}{self.event}" + (f" ({text})" if text else "")


@dataclass(frozen=True)
class Standing:
    """Where one release stands."""

    begun: Line
    last: Line

    @property
    def is_open(self) -> bool:
        """Whether it was neither finished nor taken back."""
        return self.last.event not in ENDS

    @property
    def step(self) -> str:
        """The step that was begun last."""
        return self.last.step or "begun"

    def describe(self) -> str:
        """Return where it stands, in one line."""
        begun, last = self.begun, self.last
        text = f"the release of {begun.model} {begun.version} (from {begun.before})"
        if self.is_open:
            return f"{text} stands at {self.step} since {last.time}"
        return f"{text} is done" if last.event == "released" else f"{text} was {last.event}"


class History:
    """The releases of one deployment; `hear` is told of each line that is added."""

    def __init__(self, path: Path, hear: Callable[[Line], None] | None = None) -> None:
        self.path = path
        self._hear = hear

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other releases away while the block runs.

        Raises:
            ReleaseError: another process releases something.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold_path(self.path))
            except StorageError as exc:
                if "in use" not in exc.message:
                    raise
                raise ReleaseError(
                    "another release is being made",
                    found=exc.found,
                    remedy="wait for its end, or interrupt it: it goes back then",
                ) from exc
            yield

    def add(self, line: Line) -> Line:
        """Write a line; it is on the disk once this returns."""
        text = json.dumps({key: value for key, value in asdict(line).items() if value not in _NONE})
        with translate_os_errors(f"write {self.path}"), self.path.open("ab+") as stream:
            if stream.tell() and not _ends_whole(stream):
                stream.write(b"\n")  # a line that a full disk or a kill has cut
            stream.write(text.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if self._hear is not None:
            self._hear(line)
        return line

    def read(self, model: str | None = None) -> list[Line]:
        """Return what was decided, oldest first; lines that were cut are passed over."""
        if not self.path.exists():
            return []
        with translate_os_errors(f"read {self.path}"):
            texts = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = []
        for text in texts:
            with contextlib.suppress(ValueError, TypeError):
                line = Line(**json.loads(text))
                if model in (None, line.model):
                    lines.append(line)
        return lines

    def list_standings(self, model: str | None = None) -> list[Standing]:
        """Return each release, the one that began last at the end."""
        found: dict[str, list[Line]] = {}
        for line in self.read(model):
            found.setdefault(line.release, []).append(line)
        return [Standing(lines[0], lines[-1]) for lines in found.values()]


def start_line(model: str, version: str, **values: Any) -> Line:
    """Return the line that a release begins with."""
    now = tell_time()
    release = f"{model}-{version}-{now}"
    return Line(now, release, "begun", model, version, user=tell_user(), **values)


def make_line(begun: Line, event: Event, **values: Any) -> Line:
    """Return a line about a release that has begun; it names the same archives."""
    return replace(begun, time=tell_time(), event=event, user=tell_user(), **values)


def tell_time() -> str:
    """Return the moment, in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def tell_user() -> str:
    """Return who asks, as the system knows them."""
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return str(os.getuid())


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "/".join(_show(item) for item in value.values())
    return str(value)


def _ends_whole(stream: Any) -> bool:
    stream.seek(-1, os.SEEK_END)
    return bool(stream.read(1) == b"\n")
