"""Where a release is made: one server, or a gateway with the servers behind it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.client import Client, Endpoint, ModelVersion
from marwright.errors import ModelNotFoundError, NoServerError, UsageError
from marwright.release.history import HISTORY_NAME, History
from marwright.server.change import hold_server, make_change, prepare_change
from marwright.server.deployment import Deployment
from marwright.server.registry import (
    DEPLOYMENT_NAME,
    Record,
    find_record,
    list_records,
    list_replicas,
    state_folder,
)
from marwright.server.sections import ReleaseSettings
from marwright.server.staging import Staging
from marwright.server.supervision.inspection import ask_supervisor
from marwright.storage import translate_os_errors

__all__ = ["find_version", "list_files", "open_target", "place_history", "Target", "unstage"]

CHANGE_SECONDS = 60.0
APPLY_SECONDS = 300.0


@dataclass(frozen=True)
class Target:
    """What a release talks to; `open_target` makes one."""

    name: str
    clients: tuple[Client, ...]
    """One for each server, past any gateway."""
    settings: ReleaseSettings
    history: History
    path: Path | None = None
    """The deploy.yaml, where there is one."""
    record: Record | None = None
    """The supervisor, where there is one of ours."""
    gateway: Client | None = None
    """What clients use, where a gateway splits traffic."""
    replicas: int = 1
    """How many servers there are to be."""

    @property
    def store(self) -> Path | None:
        """The folder of archives, where it is known here."""
        return self.clients[0].endpoint.model_store

    @property
    def deployment_digest(self) -> str:
        """SHA-256 of the deploy.yaml; empty where there is none."""
        if self.path is None:
            return ""
        with translate_os_errors(f"read {self.path}"):
            return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def direct(self, **split: Any) -> None:
        """Set the split of a model's traffic; with the model alone, take it away."""
        if self.record is not None and self.gateway is not None:
            ask_supervisor(self.record, "/traffic", split, timeout=CHANGE_SECONDS)

    def observe(self, model: str, **asked: Any) -> dict[str, Any]:
        """Return what the versions of a model's split have answered."""
        assert self.record is not None  # who asks has a gateway
        observed: dict[str, Any] = ask_supervisor(
            self.record, "/observed", {"model": model, **asked}, timeout=CHANGE_SECONDS
        )
        return observed

    def apply(self) -> None:
        """Bring the servers to what deploy.yaml says now; raises what that raises."""
        if self.path is None:
            return
        if self.gateway is not None and self.record is not None:
            ask_supervisor(self.record, "/apply", {}, timeout=APPLY_SECONDS)
            return
        for client in self.clients:
            with hold_server(client):
                make_change(prepare_change(self.path, client), client)

    def list_pending(self) -> list[dict[str, Any]]:
        """Return the steps that `marwright apply` would do, as its --json has them."""
        if self.path is None:
            return []
        if self.gateway is not None and self.record is not None:
            rows = ask_supervisor(self.record, "/apply", {"dry_run": True}, timeout=CHANGE_SECONDS)
            return [step for row in rows for step in row["plan"]]
        return [
            step.to_json()
            for client in self.clients
            for step in prepare_change(self.path, client).plan.steps
        ]

    def unregister(self, model: str, version: str) -> None:
        """Take a version from each server that has it, and from its staging."""
        for client in self.clients:
            found = find_version(client, model, version)
            if found is None:
                continue
            client.models.unregister(model, version)
            unstage(client, found.archive.rpartition("/")[2])


@contextlib.contextmanager
def open_target(
    to: str | None,
    *,
    inference_url: str = "",
    key_file: Path | None = None,
    store: Path | None = None,
    history: Path | None = None,
) -> Iterator[Target]:
    """Yield the server that is meant: a deploy.yaml, a server's name, or a management address.

    The further arguments are for an address, of a server that marwright does not supervise.

    Raises:
        NoServerError: it does not run.
        UsageError: nothing is named, and it is not clear what is meant.
        ConfigurationError: its deploy.yaml cannot be used.
    """
    with contextlib.ExitStack() as stack:
        if to is not None and to.startswith(("http://", "https://")):
            endpoint = Endpoint(inference_url or to, to, key_file=key_file, model_store=store)
            client = stack.enter_context(Client(endpoint))
            kept = place_history(to.partition("//")[2].replace("/", "_"))
            yield Target(to, (client,), ReleaseSettings(), History(history or kept))
            return
        record = _find_record(to)
        path = Path(record.config) if record.config else None
        deployment = Deployment.parse(path)[0] if path else None
        folder = Path(record.run_folder)
        parts = _list_parts(record)
        clients = [stack.enter_context(Client(Endpoint.read(part))) for part in parts]
        gateway = None
        if parts != [folder / "endpoint.json"]:
            gateway = stack.enter_context(Client(Endpoint.read(folder / "endpoint.json")))
        kept = path.with_name(HISTORY_NAME) if path else place_history(record.name)
        yield Target(
            name=record.name,
            clients=tuple(clients),
            settings=deployment.releases if deployment else ReleaseSettings(),
            replicas=deployment.replicas if deployment else 1,
            history=History(history or kept),
            path=path,
            record=record,
            gateway=gateway,
        )


def place_history(name: str) -> Path:
    """Return where releases are written down that no deploy.yaml is beside."""
    folder = state_folder() / "releases"
    with translate_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.jsonl"


def _find_record(to: str | None) -> Record:
    """Return the supervisor of a deploy.yaml or of a name; of ./deploy.yaml, or the only one."""
    if to is None and Path(DEPLOYMENT_NAME).is_file():
        to = DEPLOYMENT_NAME
    path = Path(to) if to else None
    if path is not None and (path.suffix in {".yaml", ".yml"} or path.is_file()):
        if not path.is_file():
            raise UsageError(f"there is no {path}", remedy="pass --to FILE, a name or an address")
        config = str(path.resolve())
        for record in list_records().values():
            if record.config == config and record.is_alive and record.run_folder:
                return record
        raise NoServerError(
            f"no server runs that was started from {path}",
            remedy=f"start it: marwright serve --deploy {path}",
        )
    record = find_record(to)
    if not record.is_alive or not record.run_folder:
        raise NoServerError(
            f"the server {record.name} has no supervisor now",
            remedy="marwright serve adopts it",
        )
    return record


def _list_parts(record: Record) -> list[Path]:
    """Return where the endpoints of the servers stand that a supervisor has."""
    servers = list_replicas(record) or [record]
    return [Path(item.run_folder) / "endpoint.json" for item in servers if item.run_folder]


def find_version(client: Client, model: str, version: str) -> ModelVersion | None:
    """Return a version as a server has it; None where it has none."""
    try:
        return client.models.describe(model, version)
    except ModelNotFoundError:
        return None


def unstage(client: Client, archive: str) -> None:
    """Take an archive out of what a server of ours reads; the store keeps it."""
    if client.endpoint.staging is not None:
        Staging(client.endpoint.staging, None).unstage(archive)


def list_files(client: Client, model: str) -> dict[str, str]:
    """Return the archives of a model's versions, by version."""
    return {item.version: item.archive.rpartition("/")[2] for item in client.models.versions(model)}
