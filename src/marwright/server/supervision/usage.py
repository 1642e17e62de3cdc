"""What one process takes, as /proc says."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["read_cpu_seconds", "read_resident"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def read_resident(pid: int) -> int:
    """Return a process's resident memory in bytes; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def read_cpu_seconds(pid: int) -> float:
    """Return a process's CPU time, user and system; 0 where it has ended."""
    try:
        # Behind the name, which may hold spaces and brackets; fields 14 and 15 of proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    except (OSError, IndexError, ValueError):
        return 0.0
