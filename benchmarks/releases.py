"""What releases take: the gateway's price, a whole release, a rollback, two replicas.

`make bench WHAT=operations` runs these parts with its own.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml
from contestants.load import finish_wrk, settle, start_wrk
from way import spread

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint
from marwright.server.registry import find_record

__all__ = ["measure_gateway", "measure_release", "measure_replicas"]

ROUNDS = 5
IN_FLIGHT = 64
SECONDS = 6
"""Of one load."""
WARM_REPLICAS = 3
"""Rounds that do not count: two servers each see half of the requests that warm Java up."""
BATCHING = {"workers": 2, "batch_size": 32}


@contextmanager
def serve(folder: Path, models: list[Any], **values: Any) -> Iterator[tuple[Endpoint, Path]]:
    """Run `marwright serve` with a gateway; yield its endpoint and its deploy.yaml."""
    runtime = folder / "runtime"
    runtime.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    deploy = folder / "deploy.yaml"
    content = {"name": "bench", "models": models, "gateway": {"port": 8731}, **values}
    deploy.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, "-m", "marwright", "serve", "--deploy", str(deploy), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        wait_for_replicas(values.get("replicas", 1))
        yield Endpoint.read(runtime / "marwright/bench.json"), deploy
    finally:
        process.terminate()
        process.wait(90)
        process.stdout.close()


def wait_for_replicas(count: int) -> None:
    """Wait until all replicas take part."""
    deadline = time.monotonic() + 120
    for number in range(1, count + 1):
        url = find_record(f"bench.{number}").health_url
        while requests.get(f"{url}/ready", timeout=10).status_code != requests.codes.ok:
            if time.monotonic() > deadline:
                raise TimeoutError(f"replica {number} is not ready")
            time.sleep(0.2)


def measure_gateway(run: Run, archive: Path) -> dict[str, Any]:
    """Load one server through its gateway and past it, in turns, 64 connections."""
    entry = {"archive": archive.name, **BATCHING}
    settings = {"store": str(archive.parent), "access": {"tokens": False}}
    with serve(archive.parent.parent / "gateway", [entry], **settings) as (endpoint, _):
        direct = find_record("bench.1")
        past = Endpoint.read(Path(direct.run_folder) / "endpoint.json").inference_url
        urls = {"direct": past, "gateway": endpoint.inference_url}
        request = (run.samples[0].path, "application/octet-stream")
        return compare_loads(urls, request)


def compare_loads(
    urls: dict[str, str], request: tuple[Path, str], *, warm: int = 1
) -> dict[str, Any]:
    """Load two addresses with wrk in turns; the ratios are of each round's pair."""
    rates: dict[str, list[float]] = {name: [] for name in urls}
    late: dict[str, list[float]] = {name: [] for name in urls}
    settle()
    for round_number in range(ROUNDS + warm):
        for name, url in urls.items():
            load = start_wrk(f"{url}/predictions/cnn", request, IN_FLIGHT, SECONDS)
            outcome = finish_wrk(load)
            if round_number >= warm:  # the first warm Java up
                answered = outcome["requests"] - outcome["refused"]
                rates[name].append(answered / outcome["seconds"])
                late[name].append(outcome["p99_ms"])
    first, second = urls
    ratios = [b / a for a, b in zip(rates[first], rates[second], strict=True)]
    more = [b - a for a, b in zip(late[first], late[second], strict=True)]
    return {
        **{f"{name}_requests_per_second": round(statistics.median(rates[name])) for name in urls},
        **{f"{name}_p99_ms": round(statistics.median(late[name]), 2) for name in urls},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "p99_more_ms": round(statistics.median(more), 2),
    }


def measure_release(run: Run, archive: Path) -> dict[str, Any]:
    """Release the demo's CNN with default gates on a quiet server, and return, a few times."""
    folder = archive.parent.parent / "release"
    (folder / "store").mkdir(parents=True)
    for version in ("1.0", "2.0"):
        pack_run(run, out=folder / f"cnn-{version}.mar", version=version)
    (folder / "cnn-1.0.mar").replace(folder / "store/cnn-1.0.mar")
    released, returned = [], []
    body = run.samples[0].path.read_bytes()
    settings = {"store": str(folder / "store")}
    with serve(folder, ["cnn-1.0.mar"], **settings) as (endpoint, deploy):
        for _ in range(3):
            settle()
            released.append(command("release", str(folder / "cnn-2.0.mar"), "--to", str(deploy)))
            started = time.perf_counter()
            back = start("rollback", "--to", str(deploy))
            with Client(endpoint) as client:
                while client.models.describe("cnn").version != "1.0":
                    time.sleep(0.01)
                client.predict("cnn", body)
            returned.append(time.perf_counter() - started)
            back.wait(60)
            with Client(endpoint) as client:
                client.models.unregister("cnn", "2.0")
    return {"release": spread(released), "rollback": spread(returned)}


def measure_replicas(run: Run, archive: Path) -> dict[str, Any]:
    """Load a gateway before one server of two workers, and one before two of one each, in turns."""
    request = (run.samples[0].path, "application/octet-stream")
    with ExitStack() as stack:
        urls = {}
        for name, replicas, port in (("one", 1, 8731), ("two", 2, 8732)):
            endpoint, _ = stack.enter_context(
                serve(
                    archive.parent.parent / name,
                    [{"archive": archive.name, "workers": 2 // replicas, "batch_size": 32}],
                    gateway={"port": port},
                    store=str(archive.parent),
                    access={"tokens": False},
                    replicas=replicas,
                )
            )
            urls[name] = endpoint.inference_url
        return compare_loads(urls, request, warm=WARM_REPLICAS)


def command(*arguments: str) -> float:
    """Run a command of marwright; return its seconds."""
    started = time.perf_counter()
    process = start(*arguments)
    if process.wait(300):
        raise RuntimeError(f"marwright {' '.join(arguments)} failed")
    return time.perf_counter() - started


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of marwright."""
    return subprocess.Popen(
        [sys.executable, "-m", "marwright", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
