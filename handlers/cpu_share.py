"""How many cores one worker may use: affinity and cgroup limits, divided by the workers.

Two processes with two threads each on two cores were 6.6 times slower than with one thread each.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["count_cores", "count_threads"]

CGROUP = Path("/sys/fs/cgroup")


def count_threads(workers: int) -> int:
    """Return how many threads one of this many workers should compute with; at least one.

    No more than OMP_NUM_THREADS, where that is set: who started the server may know of other
    models' workers, and of other servers.
    """
    share = max(1, int(count_cores() // max(1, workers)))
    limit = os.environ.get("OMP_NUM_THREADS", "").strip()
    return min(share, int(limit)) if limit.isdigit() and int(limit) else share


def count_cores(cgroup: Path = CGROUP) -> float:
    """Return the cores this process may use; a container's quota may be a fraction."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        cores = float(os.cpu_count() or 1)
    quota = _read_quota(cgroup)
    return cores if quota is None else min(cores, quota)


def _read_quota(cgroup: Path) -> float | None:
    """Read a CPU quota: cgroup v2's cpu.max, else v1's cpu.cfs_quota_us; None for none.

    Inside a container its own group is mounted as the root, which is where the limit stands.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            folder = cgroup / "cpu"
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return cores if cores > 0 else None
