"""What watching costs: throughput, a scrape of many versions, a drift window, the page.

Run as `make bench WHAT=monitoring`, with ARGS="overhead page" some of it; needs wrk, Prometheus and
Alertmanager, and Chromium for the page. Writes benchmarks/results/monitoring.json. Every claim of
throughput is a ratio within one run, on and off in turns; times stand beside for orientation.
"""

from __future__ import annotations

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
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
import yaml
from contestants.load import finish_wrk, settle, start_wrk, wait_for_quiet
from drift import measure_window
from page import measure_page, open_page, start_viewers
from way import spread

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint
from marwright.server.registry import find_record
from marwright.training.settings import Settings
from marwright.training.train import train_run

RESULTS = Path(__file__).parent / "results/monitoring.json"
ROUNDS = 6
CONNECTIONS = 64
SECONDS = 10
"""Of one load."""
VERSIONS = 50
REQUESTS = 20
"""To each version, so that each has its histograms."""
SCRAPES = 30
VIEWERS = 100
WATCHED_SECONDS = 30
"""Of a load that is watched, and of the one beside it."""
WATCHED_ROUNDS = 8
UNLOGGED = "load-2"
"""An id that is not in the sample of 10 % (handlers/prediction_log.py)."""
HEADERS = {"off": "X-Request-ID", "on": "X-Request-Nr"}
BATCHING = {"workers": 2, "batch_size": 32}
ALL_ON = {"predictions": {"share": 10, "score": "energy"}, "drift": {"every_seconds": 30}}
"""Drift twice as often as by default, so that each load has a comparison in it."""
PORTS = {"prometheus": 19090, "alertmanager": 19093}


def main() -> None:
    """Measure everything, or the parts that are named, and write the result."""
    wanted = sys.argv[1:]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    parts: dict[str, Callable[[Run, Path], dict[str, Any]]] = {
        "overhead": measure_overhead,
        "scrape": measure_scrape,
        "drift_window": lambda run, folder: measure_window(),
        "page": measure_first_paint,
        "viewers": measure_viewers,
    }
    result: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    result |= {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "packages": {p: version(p) for p in ("fastapi", "marwright", "pyarrow", "torchserve")},
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        folder = Path(name)
        os.environ["XDG_RUNTIME_DIR"] = str(folder / "runtime")
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        (folder / "runtime").mkdir(mode=0o700)
        run = train_run(folder / "run", settings=Settings(epochs=4))
        for part, measure in parts.items():
            if not wanted or part in wanted:
                wait_for_quiet(60)
                (folder / part).mkdir()
                result[part] = measure(run, folder / part)
                print(part, json.dumps(result[part]), flush=True)
                RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextmanager
def run_command(*words: str) -> Iterator[dict[str, Any]]:
    """Run a marwright command that prints a line of JSON once it is up, until the block ends."""
    command = [sys.executable, "-m", "marwright", *words, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(90)
        process.stdout.close()


@contextmanager
def serve(folder: Path, name: str, models: list[Any], **values: Any) -> Iterator[Endpoint]:
    """Serve archives of a folder's store under a name."""
    deploy = folder / f"{name}.yaml"
    content = {"name": name, "store": "store", "ports": "free", "models": models, **values}
    deploy.write_text(yaml.safe_dump({"access": {"tokens": False}, **content}), encoding="utf-8")
    with run_command("serve", "--deploy", str(deploy)):
        yield Endpoint.read(Path(find_record(name).run_folder) / "endpoint.json")


def measure_overhead(run: Run, folder: Path) -> dict[str, Any]:
    """Load one server while all there is watches it, and while nothing does, in turns.

    One server, since two processes of the same program differ by several percent as long as they
    live. Nothing of it is logged while every request has the same id, of which the sample has
    none; the other load has a header as long. The server's own metrics cannot be turned off.
    """
    archive = pack_run(run, out=folder / "store/cnn.mar", preflight=None).path
    entry = {"archive": archive.name, **BATCHING}
    request = (run.samples[0].path, "application/octet-stream")
    with serve(folder, "watched", [entry], monitoring={**ALL_ON, **PORTS}) as endpoint:

        def load(name: str) -> float:
            with ExitStack() as turn:
                if name == "on":
                    turn.enter_context(run_command("monitor", "up", "watched"))
                    wait_for_drift(find_record("watched").run_folder)
                url, header = endpoint.inference_url, f"{HEADERS[name]}: {UNLOGGED}"
                return load_model(url, request, WATCHED_SECONDS, header=header)

        load_model(endpoint.inference_url, request)  # Java gets warm, the log has a window
        rates = take_turns(("off", "on"), load, WATCHED_ROUNDS)
    return {"connections": CONNECTIONS, "seconds": WATCHED_SECONDS, **compare(rates)}


def wait_for_drift(run_folder: str) -> None:
    """Wait until a monitoring has done everything once: it has loaded what it needs then."""
    deadline = time.monotonic() + 60
    while not (Path(run_folder) / "metrics/quality.prom").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def load_model(url: str, request: Any, seconds: int = SECONDS, *, header: str = "") -> float:
    """Return the requests a second that a server answers."""
    settle()
    load = start_wrk(f"{url}/predictions/cnn", request, CONNECTIONS, seconds, header=header)
    outcome = finish_wrk(load)
    return float((outcome["requests"] - outcome["refused"]) / outcome["seconds"])


def take_turns(
    names: tuple[str, str], load: Callable[[str], float], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return what a load gives for each of two, a round each in turns."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            rates[name].append(load(name))
    return rates


def compare(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return the rates, and the ratio of on to off with its spread over the rounds."""
    ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    return {
        **{f"{name}_requests_per_second": round(statistics.median(rates[name])) for name in rates},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def measure_scrape(run: Run, folder: Path) -> dict[str, Any]:
    """Scrape a server of 50 versions that all have answered."""
    store = folder / "store"
    store.mkdir()
    models = []
    for number in range(1, VERSIONS + 1):
        file = f"cnn-{number}.mar"
        pack_run(run, out=store / file, version=f"{number}.0", preflight=None)
        models.append({"archive": file, "workers": 1})
    limits = {"supervision": {"start_timeout": 900}}
    with serve(folder, "many", models, **limits) as endpoint, Client(endpoint) as client:
        body = run.samples[0].path.read_bytes()
        for number in range(1, VERSIONS + 1):
            for _ in range(REQUESTS):
                client.predict("cnn", body, version=f"{number}.0")
        time.sleep(12)  # handlers hand over what they count every five seconds
        url = f"{find_record('many').health_url}/metrics"
        seconds, content = [], b""
        for _ in range(SCRAPES):
            began = time.perf_counter()
            content = requests.get(url, timeout=30).content
            seconds.append(time.perf_counter() - began)
            time.sleep(0.5)
    shutil.rmtree(store)
    series = sum(not line.startswith(b"#") for line in content.splitlines())
    return {"versions": VERSIONS, "series": series, "bytes": len(content), **spread(seconds)}


def measure_first_paint(run: Run, folder: Path) -> dict[str, Any]:
    """Open the page of a served model in a browser."""
    pack_run(run, out=folder / "store/cnn.mar", preflight=None)
    with serve(folder, "shown", ["cnn.mar"]), open_page("shown") as page:
        settle()
        found = measure_page(page)
    painted = found["first_paint_ms"]
    return {**found, "median_ms": statistics.median(painted), "max_ms": max(painted)}


def measure_viewers(run: Run, folder: Path) -> dict[str, Any]:
    """Load a server while 100 viewers have its page open, and while none has, in turns."""
    archive = pack_run(run, out=folder / "store/cnn.mar", preflight=None).path
    entry = {"archive": archive.name, **BATCHING}
    request = (run.samples[0].path, "application/octet-stream")
    with serve(folder, "seen", [entry]) as endpoint, open_page("seen") as page:

        def load(name: str) -> float:
            with ExitStack() as turn:
                if name == "on":
                    viewers = turn.enter_context(start_viewers(page, VIEWERS, SECONDS + 30))
                    turn.callback(viewers.kill)
                    assert viewers.stdout is not None
                    assert viewers.stdout.readline() == "watching\n"
                return load_model(endpoint.inference_url, request)

        load("off")  # Java gets warm
        rates = take_turns(("off", "on"), load)
    return {"viewers": VIEWERS, "connections": CONNECTIONS, **compare(rates)}


if __name__ == "__main__":
    main()
