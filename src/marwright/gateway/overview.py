"""How a site is, all together: what `marwright status` and the health endpoints say of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from marwright.gateway.replica import Replica
from marwright.server.supervision.status import Status, VersionStatus

__all__ = ["describe_replicas", "join_versions", "ReplicaStatus", "SiteStatus"]


@dataclass(frozen=True)
class ReplicaStatus:
    """One server behind the gateway."""

    name: str
    ready: bool
    address: str = ""
    """Of its inference API; empty while it has none."""
    restarts: int = 0
    """Times that its supervisor started the server again because it had failed."""
    problem: str = ""
    """Why it is not as it is to be, in one line; empty where it is."""


@dataclass(frozen=True)
class SiteStatus(Status):
    """A gateway and its replicas at one moment; `models` has their workers together."""

    replicas: tuple[ReplicaStatus, ...] = ()


def describe_replicas(replicas: Sequence[Replica]) -> tuple[ReplicaStatus, ...]:
    """Return how each replica was at the last look."""
    return tuple(
        ReplicaStatus(
            name=replica.name,
            ready=replica.is_ready,
            address=replica.status.get("address", ""),
            restarts=replica.status.get("restarts", 0),
            problem="; ".join(replica.list_problems()),
        )
        for replica in replicas
    )


def join_versions(replicas: Sequence[Replica]) -> tuple[VersionStatus, ...]:
    """Return the replicas' versions, each once; one replica that is ready answers for the others.

    What is wrong with single replicas then stands in their own status alone.
    """
    rows: dict[tuple[str, str], VersionStatus] = {}
    for replica in replicas:
        for item in replica.status.get("models", ()):
            row = VersionStatus(**item)
            before = rows.get((row.name, row.version))
            rows[row.name, row.version] = _join(before, row) if before else row
    if any(replica.is_ready for replica in replicas):
        return tuple(dataclasses.replace(row, problem="", detail="") for row in rows.values())
    return tuple(rows.values())


def _join(one: VersionStatus, other: VersionStatus) -> VersionStatus:
    """Return one row for the same version in two replicas."""
    return dataclasses.replace(
        one,
        workers=one.workers + other.workers,
        ready_workers=one.ready_workers + other.ready_workers,
        memory_bytes=one.memory_bytes + other.memory_bytes,
        problem=one.problem or other.problem,
        detail=one.detail or other.detail,
    )
