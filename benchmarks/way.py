"""How long the way takes: the demo, boot to READY beside plain `torchserve`, and the start.

Run as `make bench WHAT=way`; writes benchmarks/results/way.json. Every claim is a ratio within one
run, contestants interleaved; absolute times stand beside it for orientation only.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests

from marwright.client import Client, Endpoint
from marwright.errors import ClientError
from marwright.server import Ports, TorchServe

ROUNDS = 5
RESULTS = Path(__file__).parent / "results/way.json"


def main() -> None:
    """Measure everything and write the result."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        folder = Path(name)
        result = {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "versions": {p: version(p) for p in ("marwright", "torch", "torchserve")},
            "python": platform.python_version(),
            "demo": measure_demo(folder),
            "boot": measure_boot(folder / "model_store"),
            "start": measure_start(),
        }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def measure_demo(folder: Path) -> dict[str, Any]:
    """Run the demo once and return its own figures."""
    started = time.perf_counter()
    answer = subprocess.run(
        [sys.executable, "-m", "marwright", "demo", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        check=True,
    )
    total = time.perf_counter() - started
    outcome = json.loads(answer.stdout)
    return {
        "total_seconds": round(total, 1),
        "train_seconds": outcome["train_seconds"],
        "train_share": round(outcome["train_seconds"] / total, 3),
        "p50_ms": outcome["p50_ms"],
        "p99_ms": outcome["p99_ms"],
    }


def measure_boot(store: Path) -> dict[str, Any]:
    """Boot ours and plain `torchserve` in turns, each from the start to a READY worker."""
    contestants = {"marwright": boot_ours, "torchserve": boot_plain}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, boot in contestants.items():
            seconds[name].append(boot(store))
    ratio = statistics.median(seconds["marwright"]) / statistics.median(seconds["torchserve"])
    return {name: spread(values) for name, values in seconds.items()} | {"ratio": round(ratio, 3)}


def boot_ours(store: Path) -> float:
    """Return seconds until `with TorchServe(...)` is entered."""
    started = time.perf_counter()
    with TorchServe(store, models=["cnn.mar"]):
        return time.perf_counter() - started


def boot_plain(store: Path, archives: Sequence[str] = ("cnn.mar",), timeout: float = 60.0) -> float:
    """Return seconds until the plain command has READY workers, asked at the same interval."""
    with tempfile.TemporaryDirectory(prefix="plain-", dir="/tmp") as name:
        folder = Path(name)
        ports = Ports.find_free().to_properties()
        lines = [f"{key}={value}" for key, value in ports.items()]
        (folder / "config.properties").write_text("\n".join(lines), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("torchserve")), "--foreground", "--ncs"]
        command += ["--ts-config", "config.properties", "--model-store", str(store)]
        started = time.perf_counter()
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [*command, "--models", *archives],
                cwd=folder,
                env={**os.environ, "TMPDIR": name, "TEMP": name},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            endpoint = Endpoint(
                ports["inference_address"],
                ports["management_address"],
                key_file=folder / "key_file.json",
            )
            with Client(endpoint) as client:
                for name in [Path(archive).stem for archive in archives]:
                    wait_until(partial(is_ready, client, name), timeout)
            return time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            wait_until(lambda: not is_group_alive(process.pid))


def is_ready(client: Client, name: str) -> bool:
    """Return whether a model has its workers."""
    return client.models.describe(name).ready


def wait_until(is_true: Callable[[], bool], timeout: float = 60.0) -> None:
    """Poll every 50 ms."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if is_true():
                return
        except (ClientError, requests.RequestException):
            pass
        time.sleep(0.05)
    raise SystemExit("the plain server did not get READY within a minute")


def is_group_alive(group: int) -> bool:
    """Return whether a process group has members left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def measure_start() -> dict[str, Any]:
    """Time `import marwright` and `marwright --help` beside an empty program, in turns."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import marwright": ["-c", "import marwright"],
        "marwright --help": ["-m", "marwright", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(2 * ROUNDS):
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - started)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most seconds."""
    return {
        "median_seconds": round(statistics.median(values), 3),
        "min_seconds": round(min(values), 3),
        "max_seconds": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
