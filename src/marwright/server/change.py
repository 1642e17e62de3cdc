"""A running server made as its deploy.yaml says: what `marwright apply` does.

Only models can change while a server runs; what else differs is named, and takes a restart.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.admission import find_policy, read_policy
from marwright.archive.summary import flatten
from marwright.client import Client
from marwright.errors import ArchiveError, ServerError, UsageError
from marwright.server.deployment import LIVE_KEYS, REMEDY, Deployment
from marwright.server.examination import examine
from marwright.server.launch import RUNNING_NAME
from marwright.server.plan import Plan, Step, carry_out, make_plan
from marwright.server.staging import Staging
from marwright.server.state import compare, read_state
from marwright.server.wanted import Wanted, list_wanted
from marwright.storage import hold_path, translate_os_errors, write_file

__all__ = ["Change", "hold_server", "list_changes", "make_change", "prepare_change"]

SETTLE_SECONDS = 10.0
"""How long a worker that was ended meanwhile may take to be READY again."""


@dataclass(frozen=True)
class Change:
    """What has to be done to a server, and what only a restart does."""

    deployment: Deployment
    wanted: tuple[Wanted, ...]
    plan: Plan
    restart: tuple[str, ...]
    """Keys that take a restart: "limits.queue: 100 -> 50"."""
    staging: Staging | None
    """None for a server that another program started."""


@contextlib.contextmanager
def hold_server(client: Client) -> Iterator[None]:
    """Keep other changes away from a server of ours while the block runs.

    Raises:
        StorageError: another process changes it.
    """
    staging = client.endpoint.staging
    if staging is None:
        yield
        return
    with hold_path(staging.parent / "change"):
        yield


def prepare_change(path: Path, client: Client) -> Change:
    """Read a deploy.yaml, look at the server, and return what has to be done; nothing is changed.

    Raises:
        ConfigurationError: all that is wrong in the file; or settings that this server cannot take.
        UsageError: the server's store is another one.
        ClientError: the server does not answer.
    """
    endpoint = client.endpoint
    policy = read_policy(endpoint.policy) if endpoint.policy else None
    staging = Staging(endpoint.staging, policy) if endpoint.staging else None
    deployment, document = Deployment.parse(path)
    trusted: list[str] = []
    if staging is not None:
        # What another policy admitted is judged again.
        with contextlib.suppress(ArchiveError, UsageError):  # examine has these too
            if find_policy(deployment.store, deployment.read_policy()) == policy:
                trusted = staging.list_unchanged(list_wanted(deployment, refused={}))
    document.refuse(examine(deployment, document, trusted=trusted), remedy=REMEDY)
    restart = _compare_running(deployment, staging) if staging else []
    wanted = list_wanted(deployment)
    plan = make_plan(wanted, read_state(client), staging)
    return Change(deployment, tuple(wanted), plan, tuple(restart), staging)


def make_change(
    change: Change, client: Client, *, report: Callable[[Step], None] = lambda step: None
) -> None:
    """Do what a change says, and look whether the server then is as wanted.

    Raises:
        ServerError: it is not.
        MarwrightError: what plan.carry_out raises.
    """
    carry_out(change.plan, client, change.staging, report=report)
    _check(change.wanted, client)
    if change.staging is not None:
        _write_running(change.deployment, change.staging)


def _check(wanted: Sequence[Wanted], client: Client) -> None:
    """Raise ServerError where the server differs, and goes on doing so."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while differences := compare(wanted, read_state(client)):
        if time.monotonic() > deadline:
            raise ServerError(
                "the server is not as deploy.yaml says",
                found=f"{len(differences)} differences" if len(differences) > 1 else differences[0],
                remedy="look at its log: marwright logs",
                detail="\n".join(differences) if len(differences) > 1 else "",
            )
        time.sleep(0.2)


def _compare_running(deployment: Deployment, staging: Staging) -> list[str]:
    """Return the keys that differ from the running server's, and cannot change while it runs.

    Raises:
        UsageError: it has another store.
    """
    running, values = _complete(_read_running(staging)), deployment.model_dump(mode="json")
    if running.get("store", values["store"]) != values["store"]:
        raise UsageError(
            "the running server has another store",
            found=f"{running['store']}, in deploy.yaml {values['store']}",
            remedy="marwright restart",
        )
    return list_changes(
        *(
            {key: item for key, item in whole.items() if key not in LIVE_KEYS}
            for whole in (running, values)
        )
    )


def list_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return how settings differ, by dotted keys: "limits.queue: 100 -> 50"."""
    was, is_now = flatten(before), flatten(after)
    return [
        f"{key}: {was.get(key)} -> {is_now.get(key)}"
        for key in dict.fromkeys([*was, *is_now])
        if was.get(key) != is_now.get(key)
    ]


def _read_running(staging: Staging) -> dict[str, Any]:
    path = staging.folder.parent / RUNNING_NAME
    with translate_os_errors(f"read {path}"):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _complete(running: dict[str, Any]) -> dict[str, Any]:
    """Return what a server was started with, and the defaults of keys that are newer than that."""
    with contextlib.suppress(ValueError):  # it has keys that are not known here
        return Deployment.model_validate(running).model_dump(mode="json")
    return running


def _write_running(deployment: Deployment, staging: Staging) -> None:
    """Record what the server and its supervisor now obey; all else of it is as it was started."""
    before, wanted = _read_running(staging), deployment.model_dump(mode="json")
    values = before | {key: wanted[key] for key in LIVE_KEYS - {"name"}}
    if values == before:
        return
    with write_file(staging.folder.parent / RUNNING_NAME) as stream:
        stream.write(json.dumps(values).encode())
