"""One of the servers behind a gateway: a `marwright serve` of its own, held through a guard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from marwright.client import Client, Endpoint
from marwright.errors import MarwrightError, NoServerError, ServerDiedError
from marwright.server.change import Change, hold_server, make_change, prepare_change
from marwright.server.deployment import Deployment
from marwright.server.launch import THREAD_LIMITS
from marwright.server.process import Process, end_orphans
from marwright.server.registry import Record, list_records
from marwright.server.supervision.inspection import fetch_status
from marwright.storage import translate_os_errors, write_file

__all__ = ["derive", "end_left", "Replica"]

_log = logging.getLogger(__name__)

GRACE_SECONDS = 40.0
"""How long it may take to end in order: its server answers what it holds first."""
FIRST_PAUSE = 1.0
"""Seconds before it is started again; it doubles."""
DERIVED = "deploy.yaml"
PLANNED = "planned.yaml"
TAIL_CHARACTERS = 2000
_OWN = ("gateway", "monitoring", "replicas", "releases", "tls", "ports", "name")
"""Keys of a deployment that are the gateway's, or differ between replicas."""


class Replica:
    """One server of a site; `number` counts from 1, `folder` is its own below the site's."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = f"{name}.{number}"
        self.number = number
        self.folder = folder
        self.status: dict[str, Any] = {}
        """What its supervisor said when it was last looked at; empty while it does not answer."""
        self._process: Process | None = None
        self._failures = 0
        self._due = 0.0
        self._stopped = False

    @property
    def path(self) -> Path:
        """Its deploy.yaml."""
        return self.folder / DERIVED

    @property
    def record(self) -> Record | None:
        """What its supervisor leaves for others; None until it has begun."""
        record = list_records().get(self.name)
        return record if record is not None and record.config == str(self.path.resolve()) else None

    @property
    def endpoint(self) -> Endpoint | None:
        """Where its server answers; None while it has none."""
        record = self.record
        if record is None or not record.run_folder:
            return None
        with contextlib.suppress(NoServerError):
            return Endpoint.read(Path(record.run_folder) / "endpoint.json")
        return None

    @property
    def is_ready(self) -> bool:
        """Whether every wanted version had its workers and answered, at the last look."""
        return bool(self.status.get("ready"))

    def write(self, deployment: Deployment, *, key: Path) -> None:
        """Write its deploy.yaml; `key` is the file of what the gateway sends as its token.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._write(self.path, deployment, key)

    def _write(self, path: Path, deployment: Deployment, key: Path) -> None:
        values = {**derive(deployment, gateway_key=key), "name": self.name}
        if folder := values.get("logging", {}).get("folder"):
            values["logging"] = {**values["logging"], "folder": f"{folder}/replica-{self.number}"}
        with translate_os_errors(f"write {self.folder}"):
            self.folder.mkdir(mode=0o700, exist_ok=True)
        with write_file(path) as stream:
            stream.write(json.dumps(values, indent=1).encode())  # which is YAML too

    def start(self, *, threads: int, linger: float) -> None:
        """Start its supervisor, in place of one that has ended.

        `threads` are what one of its workers may use, `linger` the seconds that it outlives a site
        that was killed.
        """
        if self._process is not None:
            self._process.end(keep_folder=True)
        end_orphans(self.folder)  # of a guard that was killed
        self._due = 0.0
        limits = dict.fromkeys(THREAD_LIMITS, str(threads))
        self._process = Process.start(
            self.folder,
            [sys.executable, "-m", "marwright", "serve", "--deploy", str(self.path), "--json"],
            environment={**limits, **os.environ},
            grace=GRACE_SECONDS,
            linger=linger,
        )

    def adopt(self) -> bool:
        """Hold what a site that was killed has left; return whether there is anything."""
        with contextlib.suppress(ServerDiedError):
            self._process = Process.adopt(self.folder, grace=GRACE_SECONDS)
        return not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether its supervisor has given up, or was never started."""
        return self._process is None or self._process.exit_status is not None

    def ask(self) -> None:
        """Ask its supervisor how it is."""
        record = self.record
        answers = record is not None and record.is_alive and record.health_url
        status = fetch_status(record.health_url, record.key) if record and answers else None
        self.status = status or {}
        if self.is_ready:
            self._failures = 0

    def is_due(self, longest_pause: float) -> bool:
        """Whether it has ended and is to be started again now.

        Its failures in a row make the pauses grow, to so many seconds at most.
        """
        if self._stopped or not self.has_ended:
            self._due = 0.0
            return False
        if not self._due:
            self._failures += 1
            pause = min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 30), longest_pause)
            self._due = time.monotonic() + pause
            error = self.explain()
            text = f"{error}; starting it again in {pause:g} s"
            _log.error("%s", text, extra={"detail": error.detail})
        return time.monotonic() >= self._due

    def list_problems(self) -> list[str]:
        """Return why it is not as it is to be."""
        if self.has_ended:
            return ["it has ended"]
        if not self.status:
            return ["its supervisor does not answer yet"]
        models = [
            f"{m['name']} {m['version']}: {m['problem']}"
            for m in self.status["models"]
            if m["problem"]
        ]
        phase = self.status["phase"]
        said = [*self.status["problems"], *models, *self.status["differences"]]
        return said or ([] if phase == "serving" else [f"it is {phase}"])

    def explain(self) -> MarwrightError:
        """Return why its supervisor has ended, in that one's words."""
        text = ""
        with contextlib.suppress(OSError):
            path = self.folder / "output.log"
            text = path.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(ValueError, KeyError, TypeError):  # it was killed before
            return ServerDiedError.from_json(json.loads(text[text.rindex("{\n") :]))
        return ServerDiedError(
            f"the supervisor of {self.name} has ended", detail=text[-TAIL_CHARACTERS:].strip()
        )

    def plan(self, deployment: Deployment, *, key: Path) -> Change:
        """Return what has to be done for a deployment.

        Raises what prepare_change raises.
        """
        path = self.folder / PLANNED
        self._write(path, deployment, key)
        with self.connect() as client:
            return prepare_change(path, client)

    def apply(self, deployment: Deployment, *, key: Path) -> Change:
        """Bring its server to what a deployment says; return what was done.

        Raises what prepare_change and make_change raise.
        """
        with self.connect() as client, hold_server(client):
            self.write(deployment, key=key)
            change = prepare_change(self.path, client)
            make_change(change, client)
            return change

    def connect(self) -> Client:
        """Return a client of its server.

        Raises:
            ServerDiedError: it has none now.
        """
        endpoint = self.endpoint
        if endpoint is None:
            raise ServerDiedError(f"the server {self.name} does not run now")
        return Client(endpoint)

    def stop(self) -> None:
        """End its supervisor and its server, in order, for good."""
        self._stopped = True
        if self._process is not None:
            self._process.end()


def derive(deployment: Deployment, *, gateway_key: Path) -> dict[str, Any]:
    """Return what one replica is to be: the deployment without what is the gateway's.

    Requests reach it only through the gateway, which has the certificate and the clients' tokens;
    `gateway_key` is the file of what it sends instead, where tokens are on.
    """
    values = deployment.model_dump(mode="json", exclude_unset=True)
    access = {**values.get("access", {})}
    if deployment.access.tokens:
        access["gateway_key"] = str(gateway_key)
    values = {key: value for key, value in values.items() if key not in _OWN}
    if predictions := deployment.monitoring.predictions:  # all of them fill one folder
        values["monitoring"] = {"predictions": predictions.model_dump(mode="json")}
    return {**values, "store": str(deployment.store), "ports": "free", "access": access}


def end_left(folder: Path) -> None:
    """End the replica that a killed site has left in a folder, and remove that."""
    try:
        Process.adopt(folder, grace=GRACE_SECONDS).end()
    except ServerDiedError:  # its guard is gone too
        Process(folder, grace=GRACE_SECONDS).end()
