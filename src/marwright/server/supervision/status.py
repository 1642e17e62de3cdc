"""What a supervisor says of its server: `marwright status`, and the health endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from marwright.errors import MarwrightError
from marwright.server.deployment import LIVE_KEYS, Deployment
from marwright.server.registry import announce_folder
from marwright.server.state import State
from marwright.server.supervision.probe import Probe
from marwright.server.wanted import Wanted

__all__ = [
    "describe_versions",
    "forget_versions",
    "list_restart_reasons",
    "list_start_reasons",
    "RestartStatus",
    "Status",
    "UNANSWERED",
    "VersionStatus",
]

UNANSWERED = "its sample is not answered yet"
"""What is no problem but a matter of seconds."""
Key = tuple[str, str]
Phase = Literal["starting", "serving", "restarting", "stopping", "hung", "abandoned"]


@dataclass(frozen=True)
class VersionStatus:
    """One version that is wanted."""

    name: str
    version: str
    default: bool
    """Whether it answers where a request names no version, as the server says."""
    workers: int
    """How many are wanted."""
    ready_workers: int = 0
    memory_bytes: int = 0
    """Resident memory of all its workers."""
    problem: str = ""
    """Why it is not ready, in one line; empty where it is."""
    detail: str = ""
    """The worker's traceback, where it left one."""


@dataclass(frozen=True)
class RestartStatus:
    """The last restart that somebody asked for."""

    count: int = 0
    """How many were asked for."""
    state: Literal["none", "running", "done", "failed"] = "none"
    seconds: float = 0.0
    """From the end of the old process to the last worker READY of the new one."""
    problem: str = ""


@dataclass(frozen=True)
class Status:
    """One server at one moment; no token is in it."""

    name: str = ""
    phase: Phase = "starting"
    pid: int = 0
    """The supervisor's."""
    since: str = ""
    """When the supervisor began, ISO 8601."""
    java_pid: int | None = None
    restarts: int = 0
    """Times that the server was started again because it had failed."""
    address: str = ""
    """Of the inference API."""
    health_url: str = ""
    config: str = ""
    log: str = ""
    models: tuple[VersionStatus, ...] = ()
    problems: tuple[str, ...] = ()
    """What is wrong with the server as a whole."""
    differences: tuple[str, ...] = ()
    """Between what is wanted and what the server says it has."""
    started: bool = False
    """Whether it was ready at least once."""
    restart: RestartStatus = RestartStatus()

    @property
    def endpoint(self) -> str:
        """The file that Endpoint.read takes, where it is for each start; "" before there is one."""
        return str(announce_folder() / f"{self.name}.json") if self.name and self.address else ""

    @property
    def not_live(self) -> list[str]:
        """Why the supervisor or Java does not run; empty where both do."""
        if self.phase in {"starting", "serving"}:
            return list(self.problems)
        return [*self.problems, f"the server is {self.phase}"]

    @property
    def not_ready(self) -> list[str]:
        """Why not every wanted version has its workers and answers; empty where all do."""
        models = [f"{m.name} {m.version}: {m.problem}" for m in self.models if m.problem]
        starting = ["the server is starting"] if self.phase == "starting" else []
        return [*self.not_live, *starting, *models]

    def to_json(self) -> dict[str, Any]:
        """Return it as `marwright status --json` prints it."""
        answers = {"live": not self.not_live, "ready": not self.not_ready}
        return {**asdict(self), "endpoint": self.endpoint, **answers}

    def to_public_json(self) -> dict[str, Any]:
        """Return what any process of this machine may know: no tracebacks, no paths of ours."""
        models = tuple(replace(model, detail="") for model in self.models)
        public = replace(self, config="", log="", models=models).to_json()
        return {**public, "endpoint": ""}


def describe_versions(
    wanted: list[Wanted],
    state: State,
    *,
    failures: Mapping[Key, MarwrightError],
    refused: Mapping[str, MarwrightError],
    probe: Probe,
    memory: Mapping[int, int],
) -> tuple[VersionStatus, ...]:
    """Return how each wanted version is; archives that could not be read are named as files.

    `failures` by model and version and `refused` by file name are why they could not be loaded;
    `memory` is bytes by process id.
    """
    rows = []
    for item in wanted:
        live = state.versions.get(item.key)
        error = refused.get(item.path.name) or failures.get(item.key)
        ready = live.ready_workers if live else 0
        problem = ""
        if live is None:
            problem = str(error) if error else "it is not registered"
        elif ready < item.workers:
            problem = f"{ready} of {item.workers} workers are READY" + (
                f": {error}" if error else ""
            )
        elif item.workers:
            answer = probe.read(item.key)
            problem = UNANSWERED if answer is None else answer
        rows.append(
            VersionStatus(
                *item.key,
                default=state.defaults.get(item.name) == item.version,
                workers=item.workers,
                ready_workers=ready,
                memory_bytes=sum(memory.get(w.pid, 0) for w in live.workers) if live else 0,
                problem=problem,
                detail=error.detail if error and problem else "",
            )
        )
    known = {item.path.name for item in wanted}
    rows += [
        VersionStatus(Path(file).stem, "?", False, 0, problem=str(error), detail=error.detail)
        for file, error in refused.items()
        if file not in known
    ]
    return tuple(rows)


def forget_versions(models: tuple[VersionStatus, ...]) -> tuple[VersionStatus, ...]:
    """Return what is known of versions whose server has ended: which they are, and no worker."""
    return tuple(
        replace(model, ready_workers=0, memory_bytes=0, problem=UNANSWERED, detail="")
        if model.workers
        else model
        for model in models
    )


def list_restart_reasons(running: Deployment, wanted: Deployment) -> list[str]:
    """Return the keys of deploy.yaml of which a change takes a restart of the server.

    Models are changed while it runs; supervision and where the health endpoints are is the
    supervisor's alone.
    """
    before, after = _dump_server(running), _dump_server(wanted)
    return [key for key, value in after.items() if before[key] != value]


def list_start_reasons(begun: Deployment, wanted: Deployment) -> list[str]:
    """Return the keys of deploy.yaml of which a change takes another supervisor."""
    before, after = (None if one.ports == "free" else one.ports.health for one in (begun, wanted))
    return [
        *(["name"] if begun.name != wanted.name else []),
        *(["ports.health"] if before != after else []),
        *(["gateway"] if bool(begun.gateway) != bool(wanted.gateway) else []),
    ]


def _dump_server(deployment: Deployment) -> dict[str, Any]:
    """Return what a server is started with."""
    exclude = {*LIVE_KEYS, "gateway", "monitoring", "replicas"}  # of which no server hears
    dump = deployment.model_dump(mode="json", exclude=exclude)
    predictions = deployment.monitoring.predictions  # but of this one its workers do
    dump["monitoring.predictions"] = predictions and predictions.model_dump(mode="json")
    if isinstance(dump["ports"], dict):
        del dump["ports"]["health"]
    return dump
