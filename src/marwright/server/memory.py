"""How much memory there is, and how much of it Java may take."""

from __future__ import annotations

import contextlib
from pathlib import Path

from marwright.server.deployment import Deployment

__all__ = ["compute_direct_memory", "compute_heap", "read_memory"]

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
MIB = 1 << 20
OWN_BYTES = 256 * MIB
"""What TorchServe takes without a request, models' names and metrics included."""
CONNECTIONS_AT_ONCE = 64
"""Requests that are on their way in or out at the same moment."""


def read_memory() -> int:
    """Return the bytes this process may use: the machine's, or a container's (cgroup v2)."""
    import psutil

    memory = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        memory = min(memory, int(MEMORY_LIMIT.read_text(encoding="ascii")))
    return memory


def compute_heap(deployment: Deployment, queues: int) -> int:
    """Return -Xmx in bytes, where `queues` is how many requests may wait, over all versions.

    Room for all of them at their largest, and for as many answers on their way; at most a quarter
    of memory: the models need the rest.
    """
    if deployment.jvm.heap != "auto":
        return deployment.jvm.heap
    limits = deployment.limits
    wanted = OWN_BYTES + queues * limits.request_bytes
    wanted += CONNECTIONS_AT_ONCE * limits.response_bytes
    return _round(min(max(wanted, 512 * MIB), max(read_memory() // 4, 256 * MIB)))


def compute_direct_memory(deployment: Deployment) -> int:
    """Return -XX:MaxDirectMemorySize in bytes: netty's buffers of requests and answers."""
    if deployment.jvm.direct_memory != "auto":
        return deployment.jvm.direct_memory
    limits = deployment.limits
    wanted = 128 * MIB + CONNECTIONS_AT_ONCE * (limits.request_bytes + limits.response_bytes)
    return _round(min(max(wanted, 256 * MIB), max(read_memory() // 8, 128 * MIB)))


def _round(size: int) -> int:
    """Return whole MiB, as Java's options are written."""
    return size // MIB * MIB
