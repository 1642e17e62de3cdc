"""Loading one contestant with wrk, and who had the processor meanwhile."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests
from contestants.materials import ContestantError, Materials, Picture
from contestants.servers import (
    CONTESTANTS,
    Contestant,
    list_processes,
    measure_limit,
    post,
)

__all__ = [
    "Cell",
    "finish_wrk",
    "Key",
    "LIMITS",
    "measure_cell",
    "measure_contestant",
    "settle",
    "start_wrk",
    "wait_for_quiet",
]

HERE = Path(__file__).parent
LIMITS = ("in_process", "in_process_optimized")
CONNECTIONS = (1, 16, 64)
TOLERANCE = 1e-3
"""Between a served probability and the one computed here."""
ONE_SIDED = 0.25
"""Of two processes that share a socket: the idler one's share of the other's time, at least."""
TRIES = 10
QUIET = 0.2
"""Cores."""

Key = tuple[str, str, int | None]
"""Contestant, workload, connections."""


@dataclass(frozen=True)
class Cell:
    """What one load gave."""

    requests_per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    errors: int = 0
    """Answers other than 2xx and 3xx, and broken connections."""
    cores: dict[str, float] | None = None
    """Processor seconds a second, by process name; `others` is what else the machine did."""
    one_sided: bool = False
    """Whether one of two processes had nearly all of the connections, after every try."""


def measure_contestant(name: str, materials: Materials, seconds: int) -> Iterator[tuple[Key, Cell]]:
    """Boot one contestant, check its answers, load it in every way, and end it."""
    if name in LIMITS:
        optimized = name == "in_process_optimized"
        for picture in materials.pictures:
            rate = measure_limit(materials, picture, seconds, optimized=optimized)
            yield (name, picture.name, None), Cell(round(rate, 1))
        return
    contestant = CONTESTANTS[name]
    with contestant.start(materials) as url:
        settle()
        for picture in materials.pictures:
            check_answers(contestant, url, picture)
        first = materials.pictures[0].make_request(in_envelope=contestant.takes_envelope)
        finish_wrk(start_wrk(url, first, max(CONNECTIONS), contestant.warm_seconds))
        for picture in materials.pictures:
            request = picture.make_request(in_envelope=contestant.takes_envelope)
            for connections in CONNECTIONS:
                cell = measure_cell(contestant, url, request, connections, seconds)
                yield (name, picture.name, connections), cell


def wait_for_quiet(patience: float) -> None:
    """Wait until other work of this machine takes less than QUIET cores, or patience ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = read_machine()["busy"]
        time.sleep(1.0)
        if read_machine()["busy"] - before < QUIET:
            return


def settle() -> None:
    """Wait, though not for ever, until a server that has booted uses little of the processor."""
    for _ in range(30):
        before = read_cpu()
        time.sleep(0.5)
        if sum(subtract(read_cpu(), before).values()) < 0.1:
            return


def check_answers(contestant: Contestant, url: str, picture: Picture) -> None:
    """See that the right label comes, from every worker as far as eight requests reach them."""
    request = picture.make_request(in_envelope=contestant.takes_envelope)
    for _ in range(8):
        response = post(url, request, timeout=60)
        try:
            answer = response.json()
            if contestant.takes_envelope:
                answer = json.loads(answer["outputs"][0]["data"][0])
            label, probability = next(iter(answer.items()))
        except (ValueError, LookupError, AttributeError, StopIteration):
            text = " ".join(response.text.split())[:200]
            raise ContestantError(f"{response.status_code} for {picture.name}: {text}") from None
        is_near = abs(probability - picture.probability) < TOLERANCE
        if label != picture.label or (contestant.has_same_pixels and not is_near):
            raise ContestantError(
                f"expected {picture.label} with {picture.probability:.4f} for {picture.name}, "
                f"found {label} with {probability:.4f}"
            )


def measure_cell(
    contestant: Contestant, url: str, request: tuple[Path, str], connections: int, seconds: int
) -> Cell:
    """Load a server for some seconds, after a second's warm-up."""
    finish_wrk(start_wrk(url, request, connections, 1))
    for attempt in range(TRIES):
        drain(url, request)
        before, machine, started = read_cpu(), read_machine(), time.monotonic()
        wrk = start_wrk(url, request, connections, seconds)
        if contestant.shares_socket and connections > 1 and attempt < TRIES - 1:
            time.sleep(0.7)
            if is_one_sided(subtract(read_cpu(), before)):
                wrk.kill()  # new connections may spread otherwise
                wrk.wait()
                continue
        outcome = finish_wrk(wrk)
        break
    used = subtract(read_cpu(), before)
    elapsed = time.monotonic() - started
    ended = read_machine()
    cores: dict[str, float] = {"wrk": ended["wrk"] - machine["wrk"]}
    for (_, name), cpu in used.items():
        cores[name] = cores.get(name, 0.0) + cpu
    cores["others"] = ended["busy"] - machine["busy"] - sum(cores.values())
    return Cell(
        requests_per_second=round(
            (outcome["requests"] - outcome["refused"]) / outcome["seconds"], 1
        ),
        p50_ms=outcome["p50_ms"],
        p99_ms=outcome["p99_ms"],
        errors=outcome["refused"] + outcome["broken"],
        cores={n: round(cpu / elapsed, 2) for n, cpu in cores.items() if cpu > 0.01 * elapsed},
        one_sided=contestant.shares_socket and connections > 1 and is_one_sided(used),
    )


def start_wrk(
    url: str, request: tuple[Path, str], connections: int, seconds: int, *, header: str = ""
) -> subprocess.Popen[str]:
    """Start a load, each request with a further header where one is said."""
    file, kind = request
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    command += ["-H", header] if header else []
    command += ["-s", str(HERE / "post.lua"), url, "--", str(file), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_wrk(wrk: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a load to end and return what post.lua printed."""
    lines = wrk.communicate()[0].strip().splitlines()
    if wrk.returncode or not lines:
        raise ContestantError(f"wrk: {lines[-1] if lines else 'it said nothing'}")
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


def drain(url: str, request: tuple[Path, str]) -> None:
    """Wait until what an earlier load left in the server's queue is done."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if post(url, request, timeout=60).ok:
                return
        time.sleep(0.2)
    raise ContestantError("no longer answered after a load")


def read_cpu() -> dict[tuple[int, str], float]:
    """Return the processor seconds of every process of the server, by process id and name."""
    seconds = {}
    for process in list_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            name, times = re.sub(r"^python[\d.]+$", "python", process.name()), process.cpu_times()
            if name != "wrk":
                seconds[process.pid, name] = times.user + times.system
    return seconds


def read_machine() -> dict[str, float]:
    """Return the processor seconds that the whole machine and wrk have used."""
    times = psutil.cpu_times()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "busy": times.user + times.system + times.nice + times.irq + times.softirq,
        "wrk": children.ru_utime + children.ru_stime,
    }


def subtract(
    after: dict[tuple[int, str], float], before: dict[tuple[int, str], float]
) -> dict[tuple[int, str], float]:
    """Return what each process used in between."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def is_one_sided(used: dict[tuple[int, str], float]) -> bool:
    """Whether one of the two busiest processes did nearly everything."""
    busiest = [*sorted(used.values(), reverse=True), 0.0, 0.0]
    return busiest[1] < ONE_SIDED * busiest[0]
