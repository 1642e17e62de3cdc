"""What running a server takes: apply, restart, many versions, and what the clients cost.

Run as `make bench WHAT=operations`, with ARGS="apply client" some of it; the last part needs wrk.
Writes benchmarks/results/operations.json. Every claim is a ratio or a difference within one run,
contestants interleaved; absolute times stand beside them for orientation only.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import yaml
from contestants.load import finish_wrk, start_wrk, wait_for_quiet
from PIL import Image
from releases import measure_gateway, measure_release, measure_replicas
from way import boot_plain, spread

from marwright.archive import Run, pack_run
from marwright.client import AsyncClient, Client, Endpoint
from marwright.server import TorchServe
from marwright.server.deployment import Deployment
from marwright.training.settings import Settings
from marwright.training.train import train_run

RESULTS = Path(__file__).parent / "results/operations.json"
ROUNDS = 5
ARCHIVES = 20
VERSIONS = 200
CALLS = 300
"""Predictions of one client in one round, one after the other."""
IN_FLIGHT = 64
SECONDS = 6
"""Of one load."""


def main() -> None:
    """Measure everything, or the parts that are named, and write the result."""
    wanted = sys.argv[1:]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each command compiles what it imports
    parts: dict[str, Callable[[Run, Path], dict[str, Any]]] = {
        "apply": measure_apply,
        "restart": measure_restart,
        "versions": measure_versions,
        "client": measure_client,
        "async_client": measure_async_client,
        "gateway": measure_gateway,
        "release": measure_release,
        "replicas": measure_replicas,
    }
    result: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    result |= {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "packages": {p: version(p) for p in ("aiohttp", "marwright", "requests", "torchserve")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        folder = Path(name)
        run = train_run(folder / "run", settings=Settings(epochs=4))
        (folder / "store").mkdir()
        archive = pack_run(run, out=folder / "store/cnn.mar", preflight=None).path
        for part, measure in parts.items():
            if not wanted or part in wanted:
                wait_for_quiet(60)
                result[part] = measure(run, archive)
                print(part, json.dumps(result[part]), flush=True)
                RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextmanager
def serve(deploy: Path) -> Iterator[Endpoint]:
    """Run `marwright serve` on a deploy.yaml in a process of its own."""
    runtime = deploy.parent / "runtime"
    runtime.mkdir(exist_ok=True, mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    command = [sys.executable, "-m", "marwright", "serve", "--deploy", str(deploy), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        facts = json.loads(process.stdout.readline())
        yield Endpoint.read(Path(facts["key_file"]).with_name("endpoint.json"))
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def write_deployment(store: Path, models: list[Any], **values: Any) -> Path:
    """Write a deploy.yaml beside a store."""
    deploy = store.parent / "deploy.yaml"
    content = {"store": str(store), "ports": "free", "models": models, **values}
    deploy.write_text(yaml.safe_dump(content), encoding="utf-8")
    return deploy


def measure_apply(run: Run, archive: Path) -> dict[str, Any]:
    """Time `marwright apply` on a server that is already so, beside Python's own start."""
    with serve(deploy := write_deployment(archive.parent, [archive.name])):
        return time_apply(deploy)


def time_apply(deploy: Path) -> dict[str, Any]:
    """Run apply and an empty Python in turns; the difference is what apply takes."""
    commands = {
        "python": ["-c", "pass"],
        "apply": ["-m", "marwright", "apply", str(deploy), "--json"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(2 * ROUNDS):
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - started)
    beyond = [own - empty for own, empty in zip(seconds["apply"], seconds["python"], strict=True)]
    return {name: spread(values) for name, values in seconds.items()} | {"beyond": spread(beyond)}


def measure_restart(run: Run, archive: Path) -> dict[str, Any]:
    """Boot twenty archives with marwright and with plain torchserve, in turns, until all serve."""
    store = archive.parent.parent / "twenty"
    store.mkdir()
    names = [f"m{number}" for number in range(ARCHIVES)]
    for name in names:
        pack_run(run, out=store / f"{name}.mar", name=name, preflight=None)
    files = [f"{name}.mar" for name in names]
    seconds: dict[str, list[float]] = {"marwright": [], "torchserve": []}
    for _ in range(3):
        started = time.perf_counter()
        models = [{"archive": file} for file in files]
        deployment = Deployment.model_validate(
            {"store": store, "ports": "free", "models": models}
            | {"supervision": {"start_timeout": 600}}
        )
        with TorchServe.deploy(deployment):
            seconds["marwright"].append(time.perf_counter() - started)
        seconds["torchserve"].append(boot_plain(store, files, timeout=600))
    ratio = statistics.median(seconds["marwright"]) / statistics.median(seconds["torchserve"])
    return {name: spread(values) for name, values in seconds.items()} | {
        "archives": ARCHIVES,
        "ratio": round(ratio, 3),
    }


def measure_versions(run: Run, archive: Path) -> dict[str, Any]:
    """Serve one version with a worker among 200; time list, describe, apply; weigh Java."""
    store = archive.parent.parent / "many"
    store.mkdir()
    models: list[dict[str, Any]] = []
    for number in range(1, VERSIONS + 1):
        file = f"cnn-{number}.mar"
        pack_run(run, out=store / file, version=f"{number}.0", preflight=None)
        models.append({"archive": file, "workers": 1 if number == 1 else 0})
    few = weigh(write_deployment(store, models[:1]))
    with serve(deploy := write_deployment(store, models, supervision={"start_timeout": 600})) as at:
        many = weigh_java(at)
        with Client(at) as client:
            list_seconds = [clock(client.models.list) for _ in range(2 * ROUNDS)]
            describe_seconds = [
                clock(lambda: client.models.versions("cnn")) for _ in range(2 * ROUNDS)
            ]
        applied = time_apply(deploy)
    shutil.rmtree(store)
    return {
        "registered": VERSIONS,
        "list": spread(list_seconds),
        "describe_all": spread(describe_seconds),
        "apply": applied,
        "java_bytes": {"one": few, "all": many},
        "bytes_per_idle_version": round((many - few) / (VERSIONS - 1)),
    }


def weigh(deploy: Path) -> int:
    """Return the resident bytes of Java with this deployment."""
    with serve(deploy) as endpoint:
        return weigh_java(endpoint)


def weigh_java(endpoint: Endpoint) -> int:
    """Return the resident bytes of Java, some seconds after the start."""
    time.sleep(5)
    assert endpoint.key_file is not None
    pid = int((endpoint.key_file.parent / "server_pid").read_text("ascii").split()[0])
    return int(psutil.Process(pid).memory_info().rss)


def clock(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_client(run: Run, archive: Path) -> dict[str, Any]:
    """Predict with marwright's client and with a bare session, in turns, one request at a time."""
    body = run.samples[0].path.read_bytes()
    with TorchServe(archive.parent, models=[archive.name]) as server, requests.Session() as bare:
        endpoint = server.endpoint
        assert endpoint.key_file is not None
        token = json.loads(endpoint.key_file.read_text("utf-8"))["inference"]["key"]
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/octet-stream",
        }
        url = f"{endpoint.inference_url}/predictions/cnn"
        bare.trust_env = False

        def post() -> None:
            bare.post(url, data=body, headers=headers, timeout=30).raise_for_status()

        def predict() -> None:
            server.client.predict("cnn", body)

        contestants = {"requests": post, "marwright": predict}
        medians: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(50):
            post()
            predict()
        for _ in range(2 * ROUNDS):
            calls: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(CALLS):
                for name, call in contestants.items():
                    calls[name].append(clock(call))
            for name, values in calls.items():
                medians[name].append(statistics.median(values))
    ratios = [
        own / other for own, other in zip(medians["marwright"], medians["requests"], strict=True)
    ]
    return {
        **{f"{name}_ms": spread_ms(values) for name, values in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def spread_ms(values: list[float]) -> dict[str, float]:
    """Return median, least and most milliseconds."""
    return {
        "median": round(1e3 * statistics.median(values), 3),
        "min": round(1e3 * min(values), 3),
        "max": round(1e3 * max(values), 3),
    }


def measure_async_client(run: Run, archive: Path) -> dict[str, Any]:
    """Load one server with AsyncClient and with wrk, in turns, 64 requests in flight."""
    large = archive.parent.parent / "large.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(large)
    deployment = Deployment.model_validate(
        {
            "store": archive.parent,
            "ports": "free",
            "models": [{"archive": archive.name, "workers": 2, "batch_size": 32}],
            "access": {"tokens": False},  # wrk's script sends none
        }
    )
    with TorchServe.deploy(deployment) as server:
        pictures = {"scan": run.samples[0].path, "large": large}
        return {name: load(server, picture) for name, picture in pictures.items()}


def load(server: TorchServe, picture: Path) -> dict[str, float]:
    """Load a server with one picture by wrk and by AsyncClient, in turns."""
    rates: dict[str, list[float]] = {"wrk": [], "AsyncClient": []}
    url = f"{server.endpoint.inference_url}/predictions/cnn"
    request = (picture, "application/octet-stream")
    for round_number in range(ROUNDS + 1):
        outcome = finish_wrk(start_wrk(url, request, IN_FLIGHT, SECONDS))
        rate = asyncio.run(load_with_client(server.endpoint, picture.read_bytes()))
        if round_number:  # the first warms Java up
            rates["wrk"].append((outcome["requests"] - outcome["refused"]) / outcome["seconds"])
            rates["AsyncClient"].append(rate)
    ratios = [own / wrk for own, wrk in zip(rates["AsyncClient"], rates["wrk"], strict=True)]
    return {
        **{
            f"{name}_requests_per_second": round(statistics.median(values), 1)
            for name, values in rates.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


async def load_with_client(endpoint: Endpoint, body: bytes) -> float:
    """Keep 64 predictions in flight for some seconds; return answers a second."""
    answered = 0
    async with AsyncClient(endpoint, connections=IN_FLIGHT) as client:
        end = time.monotonic() + SECONDS

        async def keep_sending() -> None:
            nonlocal answered
            while time.monotonic() < end:
                await client.predict("cnn", body)
                answered += 1

        started = time.perf_counter()
        await asyncio.gather(*(keep_sending() for _ in range(IN_FLIGHT)))
        return answered / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
