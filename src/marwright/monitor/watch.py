"""What `marwright monitor up` does: Prometheus and Alertmanager beside one server, while that runs.

They read what the server says of itself, and what this process adds to it by files in the server's
run folder (duties.py). All of it ends with this process, however that ends. Of deploy.yaml the
section `monitoring` is read once, at the start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from marwright.errors import MarwrightError, ServerError, StorageError
from marwright.monitor.alertmanager import make_alertmanager
from marwright.monitor.duties import Duties, Failures
from marwright.monitor.program import Program, read_key
from marwright.monitor.prometheus import make_prometheus, render_files, write_targets
from marwright.server.deployment import Deployment
from marwright.server.log import parse_line
from marwright.server.registry import Record, announce_folder, list_records, state_folder
from marwright.server.supervision.inspection import Status, fetch_status
from marwright.server.supervision.journal import LOG_NAME
from marwright.storage import hold_path, translate_os_errors

__all__ = ["data_folder", "Keeper", "Watch"]

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
CALM_SECONDS = 120.0
"""How long a program must have run for its next end to count as a first one again."""
TAIL_BYTES = 1 << 18
"""Of a journal, that are read for why its supervisor has ended."""


def data_folder(name: str) -> Path:
    """Return where the monitoring of a server keeps what it has to remember.

    Not beside deploy.yaml: that is often under version control, or not ours to write.
    """
    return state_folder() / "monitoring" / name


class Watch:
    """Watches one server; `run` returns once the server has ended in order.

    `tell` hears of what happens, a line each; `begun` is called once both programs answer. `scale`
    divides every duration of rules and messages, for drills.
    """

    def __init__(
        self,
        record: Record,
        deployment: Deployment,
        *,
        tell: Callable[[str], None],
        begun: Callable[[dict[str, str]], None] = lambda addresses: None,
        scale: float = 1.0,
    ) -> None:
        self._record = record
        self._deployment = deployment
        self._tell = tell
        self._begun = begun
        self._scale = scale
        self._written = record.health_url
        """Where Prometheus reads it."""
        self._was_live = True
        self._is_lost = False
        self._journal = _Journal()
        self._failures = Failures(tell)
        self._pause = threading.Event()
        self.duties = Duties(deployment, tell=tell, scale=scale)

    def run(self) -> None:
        """Watch until the server has ended in order, or this is interrupted.

        Raises:
            ServerError: another process watches this server; a program is missing, or did not
                start; PortTakenError where its port is another's.
            ConfigurationError: promtool or amtool refuse what was made of deploy.yaml.
        """
        folder = data_folder(self._record.name)
        with contextlib.ExitStack() as stack:
            with translate_os_errors(f"write {folder}"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(_hold(folder, self._record.name))
            stack.callback(self._journal.close)
            stack.callback(self.duties.close)
            keepers = self._start(folder, stack)
            stack.enter_context(self.duties.perform(lambda: self._record))
            while self._follow():
                for keeper in keepers:
                    keeper.look()
                self._pause.wait(LOOK_SECONDS)
        self._tell(f"the server {self._record.name} has ended; so does its monitoring")

    def _start(self, folder: Path, stack: contextlib.ExitStack) -> list[Keeper]:
        """Start both programs, and return once they answer."""
        key, name = read_key(folder), self._record.name
        files = render_files(self._deployment, name, self._written, key=key, scale=self._scale)
        data = {one: folder / one for one in ("alertmanager", "prometheus")}
        alertmanager = make_alertmanager(
            self._deployment, key=key, data=data["alertmanager"], scale=self._scale
        )
        stack.callback(alertmanager.end)
        self._prometheus = make_prometheus(
            self._deployment, files, key=key, data=data["prometheus"]
        )
        stack.callback(self._prometheus.end)
        programs = (alertmanager, self._prometheus)
        for program in programs:
            program.begin()
        for program in programs:
            program.wait()
        self._begun(
            {"server": name, "prometheus": self._prometheus.url, "alertmanager": alertmanager.url}
        )
        return [Keeper(program, self._tell) for program in programs]

    def _follow(self) -> bool:
        """Look where the server is now; return whether there is anything to watch.

        A server that ended in order is not missed. One that failed until its supervisor gave up,
        or was killed together with it, is: its alert must stay.
        """
        name = self._record.name
        record = list_records().get(name)
        if record is not None:
            if record.health_url:  # else it only begins
                self._record = record
                status = fetch_status(record.health_url, record.key)
                if status:
                    self._journal.follow(status)
                if status and status.get("phase") != "stopping":
                    self._was_live = bool(status.get("live"))
            self._is_lost = False
        elif not (announce_folder() / f"{name}.lock").exists() and self._has_ended_in_order():
            return False
        elif not self._is_lost:
            self._is_lost = True
            self._tell(f"the server {name} has failed and is gone; start it again: marwright serve")
        if self._record.health_url != self._written:
            with self._failures.note("the server's new address"):  # a full disk: again then
                self._move(self._record.health_url)
        return True

    def _has_ended_in_order(self) -> bool:
        """Return it of a server whose supervisor has gone; where nothing is known, as it was."""
        gave_up = self._journal.has_given_up()
        return self._was_live if gave_up is None else not gave_up

    def _move(self, health_url: str) -> None:
        write_targets(self._prometheus, self._record.name, health_url)
        self._written = health_url
        self._tell(f"the server {self._record.name} is at {health_url} now")


class _Journal:
    """A supervisor's journal, held open: with the server it may be removed, and is read then."""

    def __init__(self) -> None:
        self._stream: IO[bytes] | None = None
        self._since: datetime | None = None

    def follow(self, status: Status) -> None:
        """Hold the file in which the supervisor writes now; without one the last is held on to."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            since = datetime.fromisoformat(status["since"])
            if not status["log"]:
                return
            stream = Path(status["log"]).with_name(LOG_NAME).open("rb")
            self.close()
            self._stream, self._since = stream, since

    def has_given_up(self) -> bool | None:
        """Return whether the supervisor has; its last word is critical then. None: not known."""
        if self._stream is None or self._since is None:
            return None
        try:
            end = self._stream.seek(0, os.SEEK_END)
            self._stream.seek(max(0, end - TAIL_BYTES))
            lines = [parse_line(text) for text in self._stream.read().splitlines()]
            return any(line.level == "critical" and line.time >= self._since for line in lines)
        except (OSError, TypeError):
            return None

    def close(self) -> None:
        """Let go of it."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None


class Keeper:
    """Starts a program again that has ended, after pauses that double."""

    def __init__(self, program: Program, tell: Callable[[str], None]) -> None:
        self._program = program
        self._tell = tell
        self._pause = FIRST_PAUSE
        self._since = time.monotonic()
        self._due: float | None = None
        self.restarts = 0

    def look(self) -> None:
        """Do what is due; it never waits, and never fails."""
        now = time.monotonic()
        if self._due is not None:
            if now >= self._due:
                self._begin()
        elif not self._program.is_running:
            self._put_off(self._program.explain_end())
        elif now - self._since > CALM_SECONDS:
            self._pause = FIRST_PAUSE

    def _begin(self) -> None:
        try:
            self._program.begin()
        except (MarwrightError, OSError) as exc:
            self._put_off(exc)
            return
        self._due, self._since = None, time.monotonic()
        self.restarts += 1

    def _put_off(self, reason: Exception) -> None:
        self._tell(f"{reason}; it is started again in {self._pause:g} s")
        self._due = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


@contextlib.contextmanager
def _hold(folder: Path, name: str) -> Iterator[None]:
    """Keep others from watching the same server while the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_path(folder))
        except StorageError as exc:
            if "in use" not in exc.message:
                raise
            raise ServerError(
                f"the server {name} is monitored already",
                found=exc.found.replace("writes it", "does"),
                remedy="end that first, with Ctrl-C or SIGTERM",
            ) from exc
        yield
