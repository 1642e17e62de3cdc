"""Checks of the machine: what marwright and TorchServe need, and how to mend what is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from marwright.errors import MarwrightError
from marwright.monitor.program import PROGRAMS, find_program
from marwright.server.deployment import Deployment
from marwright.server.java import find_java
from marwright.server.ports import Ports, list_taken

__all__ = ["examine", "Finding"]

LEAST_MEMORY_BYTES = 2 << 30
"""Java and one worker with torch take about 0.7 GB."""
IMPORT_SECONDS = 120
"""A cold import of torch from a slow disk takes tens of seconds."""
LEAST_DISK_BYTES = 1 << 30
# What TorchServe 0.12 imports and does not declare, and who needs it.
_UNDECLARED = {
    "yaml": ("pyyaml", "every worker", True),
    "numpy": ("numpy", "torch's tensors in handlers", True),
    "requests": ("requests", "ts.launcher", True),
    "captum": ("captum", "explanations, and the stock vision and text handlers", False),
    "pynvml": ("nvidia-ml-py", "GPU metrics only", False),
}


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    check: str
    state: Literal["ok", "note", "fail"]
    """`note`: works without it, with the limit that `remedy` names."""
    found: str
    remedy: str = ""


def examine(store: Path, deploy: Path = Path("deploy.yaml")) -> Iterator[Finding]:
    """Run every check, quick ones first; `deploy` says which ports are meant, if it is there."""
    yield _check_python()
    yield from _check_packages()
    yield _check_java()
    yield _check_ports(deploy)
    yield _check_memory()
    yield from _check_disk(store)
    yield from _check_monitoring()
    yield from _check_imports()


def _check_python() -> Finding:
    found = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 10):
        return Finding("Python", "fail", found, "use Python 3.10 or newer")
    return Finding("Python", "ok", found)


def _check_packages() -> Iterator[Finding]:
    for package in ("torchserve", "torch-model-archiver"):
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, "fail", "missing", f"pip install '{package}==0.12.0'")
        else:
            if found.startswith("0.12."):
                yield Finding(package, "ok", found)
            else:
                yield Finding(package, "fail", found, f"pip install '{package}==0.12.0'")
    for module, (package, user, needed) in _UNDECLARED.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(package, "ok", f"for {user}")
        else:
            state: Literal["fail", "note"] = "fail" if needed else "note"
            yield Finding(package, state, f"missing; for {user}", f"pip install {package}")


def _check_java() -> Finding:
    try:
        java = find_java()
    except MarwrightError as exc:
        return Finding("Java", "fail", exc.found, exc.remedy)
    return Finding("Java", "ok", f"{java.version} from {java.origin}")


def _check_ports(deploy: Path) -> Finding:
    ports = _list_ports(deploy)
    if taken := list_taken(ports):
        remedy = "stop what listens there, or choose others: ports in deploy.yaml, or --free-ports"
        return Finding("ports", "note", f"port {', '.join(taken)} is taken", remedy)
    found = f"{', '.join(map(str, ports.values()))} are free" if ports else "whatever is free"
    return Finding("ports", "ok", found)


def _list_ports(deploy: Path) -> dict[str, int]:
    """Return the ports that a server would take here; the default ones where no file says."""
    deployment = Deployment()
    if deploy.is_file():
        with contextlib.suppress(MarwrightError):  # marwright config check says what is wrong
            deployment, _ = Deployment.parse(deploy)
    ports: dict[str, int] = {}
    if deployment.gateway:
        ports["gateway"] = deployment.gateway.port
    elif deployment.ports != "free":
        ports |= asdict(Ports.from_deployment(deployment))
    if deployment.ports != "free":
        ports["health"] = deployment.ports.health
    return ports


def _check_memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / (1 << 30):.1f} GB available"
    if free < LEAST_MEMORY_BYTES:
        return Finding("memory", "fail", found, "free some: Java and a worker need about 2 GB")
    return Finding("memory", "ok", found)


def _check_disk(store: Path) -> Iterator[Finding]:
    folders = {"disk for archives": store}
    try:
        folders = {"disk for temporary files": Path(tempfile.gettempdir()), **folders}
    except OSError as exc:  # it tries to write, and finds no place
        remedy = "set TMPDIR to a writable folder with free space"
        yield Finding("disk for temporary files", "fail", exc.strerror or str(exc), remedy)
    for check, folder in folders.items():
        existing = next(
            path for path in (folder.resolve(), *folder.resolve().parents) if path.exists()
        )
        free = shutil.disk_usage(existing).free
        found = f"{free / (1 << 30):.1f} GB free at {existing}"
        if free < LEAST_DISK_BYTES:
            yield Finding(check, "fail", found, "free at least 1 GB")
            continue
        try:
            with tempfile.TemporaryFile(dir=existing):
                yield Finding(check, "ok", found)
        except OSError as exc:
            yield Finding(check, "fail", f"{existing}: {exc.strerror}", "choose a writable folder")


def _check_monitoring() -> Iterator[Finding]:
    for name in PROGRAMS:
        try:
            yield Finding(name, "ok", f"{find_program(name)}, for marwright monitor")
        except MarwrightError as exc:
            yield Finding(name, "note", "missing; for marwright monitor", exc.remedy)


def _check_imports() -> Iterator[Finding]:
    """Import the heavy ones in a process of their own: a broken build may end the process."""
    scripts = {
        "torch": "import torch; print(torch.__version__, torch.cuda.is_available())",
        "torchvision": "import marwright.training.vision as v, torchvision as t;"
        "print(t.__version__, v.has_native_operators())",
    }
    for package, script in scripts.items():
        try:
            answer = subprocess.run(
                [sys.executable, "-c", script],
                capture_output=True,
                text=True,
                timeout=IMPORT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            found = f"no end of its import within {IMPORT_SECONDS} s"
            yield Finding(package, "fail", found, f"pip install --force-reinstall {package}")
            continue
        if answer.returncode:
            reason = (answer.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            yield Finding(package, "fail", reason, f"pip install --force-reinstall {package}")
        else:
            yield _judge(package, *answer.stdout.split()[-2:])


def _judge(package: str, found: str, extra: str) -> Finding:
    if package == "torch":
        release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
        if release < (2, 6):
            remedy = "pip install 'torch>=2.6': older ones have CVE-2025-32434"
            return Finding(package, "fail", found, remedy)
        return Finding(package, "ok", f"{found}, {'with' if extra == 'True' else 'without'} CUDA")
    if extra == "True":
        return Finding(package, "ok", f"{found}, native operators")
    return Finding(
        package,
        "note",
        f"{found}, without native operators beside this torch",
        "transforms and models work; nms and decode_jpeg need torchvision built for this torch",
    )
