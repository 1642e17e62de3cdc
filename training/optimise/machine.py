"""The machine that variants were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["describe_machine"]

PACKAGES = ("torch", "onnxruntime", "openvino", "torchao", "numpy")


def describe_machine(threads: int, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the processor, the cores this process may use, threads, and versions installed."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "cpu": _read_cpu(cpuinfo),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_list_versions()},
    }


def _read_cpu(path: Path) -> str:
    """Return the processor's name; on a virtual machine it may be the family's alone."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _list_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
