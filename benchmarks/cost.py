"""What a served request costs, and what each of marwright's shortenings saves.

Run as `make bench WHAT=cost`; writes benchmarks/results/cost.json. Needs wrk, and py-spy for the
worker's stages. Load and model are those of serving.py's small image.

`savings`: marwright whole, and with one thing taken away, interleaved and shuffled; a ratio is
whole over reduced within a round. The same variant differs from boot to boot (2,730 to 3,253
requests/s once), and `metrics` is less than that: two models in one server, one of them without,
are loaded in turns. `threads`: processor microseconds a request at 64 connections,
by the name of the thread (/proc/PID/task). `stages`: the same of one worker's main thread, shared
out by py-spy's samples of its stack.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from contestants.load import finish_wrk, measure_cell, settle, start_wrk, wait_for_quiet
from contestants.materials import (
    SERVING,
    ContestantError,
    Materials,
    hide_simplejpeg,
    make_materials,
)
from contestants.servers import (
    CONTESTANTS,
    JAVA,
    end_processes,
    find_venv,
    list_processes,
    start_marwright,
)

from marwright.archive import pack_run
from marwright.server import TorchServe

RESULTS = Path(__file__).parent / "results"
MOST = 64
"""Connections."""
PROFILED = ("torchserve_one_thread", "marwright")
SAMPLES_PER_SECOND = 250
BOOTS = 2
PAIRS = 12
"""Of loads in each boot, one with metrics and one without."""

STAGES = {
    "log lines": r"logging/__init__",
    "metrics": r"StopWatch|StageMetrics|add_time|emit_metrics",
    "receive the batch": r"BatchReader\.|retrieve_msg|retrieve_data_for_inference",
    "read the requests": r"read_request",
    "decode the JPEG": r"read_image|DigitClassifier.preprocess",
    "resize": r"resize_images",
    "model": r"_call_impl",
    "around the model": r"_infer_all|BaseHandler.inference",
    "answers": r"_render|DigitClassifier.postprocess",
    "write the replies": r"write_replies|create_predict_response",
    "around the handler": r"BatchHandler|BaseHandler|Service.predict",
    "send": r"handle_connection",
}
"""What a stack is counted to: the first whose pattern one of its frames has; plain TorchServe's
handler decodes and resizes in one."""


@dataclass(frozen=True)
class Variant:
    """marwright with one thing taken away."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of model-config.yaml."""
    server: Mapping[str, Any] = field(default_factory=dict)
    surroundings: tuple[Callable[[], AbstractContextManager[None]], ...] = ()


VARIANTS = {
    "whole": Variant(),
    "without_fast_worker": Variant({"handler": {"fast_worker": False}}),
    "without_eager_batches": Variant(server={"eager_batches": False}),
    "without_jvm_settings": Variant(server={"properties": {"vmargs": ""}}),
    "with_one_compiler": Variant(
        server={"properties": {"vmargs": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"}}
    ),
    "without_simplejpeg": Variant(surroundings=(hide_simplejpeg,)),
    "with_two_threads": Variant({"handler": {"threads": 2}}),
    "with_batches_of_8": Variant({"batchSize": 8}),
    "without_batches": Variant({"batchSize": 1}),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Take shortenings away; see the top of this file.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    parser.add_argument("--only", default="", help="VARIANT,... beside whole; writes no file")
    parser.add_argument("--metrics", action="store_true", help="measure what metrics cost alone")
    options = parser.parse_args()
    names = ["whole", *options.only.split(",")] if options.only else list(VARIANTS)
    if unknown := set(names) - VARIANTS.keys():
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become ours to end
    try:
        with tempfile.TemporaryDirectory(prefix="marwright-bench-") as folder:
            materials = make_materials(Path(folder), find_venv)
            if options.metrics:
                write_metrics(measure_metrics(materials, options.seconds))
                return
            result: dict[str, Any] = {
                "date": date.today().isoformat(),
                "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
                "rounds": options.rounds,
                "savings": measure_savings(materials, names, options.rounds, options.seconds),
            }
            if not options.only:
                result["metrics"] = measure_metrics(materials, options.seconds)
                for name in PROFILED:
                    result[name] = profile(materials, name)
                text = json.dumps(result, indent=2) + "\n"
                (RESULTS / "cost.json").write_text(text, encoding="utf-8")
    except ContestantError as error:
        raise SystemExit(str(error)) from None
    finally:
        end_processes()


def measure_savings(
    materials: Materials, names: list[str], rounds: int, seconds: int
) -> dict[str, Any]:
    """Return how much faster the whole is than without each thing."""
    for name in names:
        settings = {**SERVING, **VARIANTS[name].settings}
        pack_run(materials.run, out=materials.store / f"{name}.mar", settings=settings)
    rates: dict[str, list[float]] = {name: [] for name in names}
    lone: dict[str, list[float]] = {name: [] for name in names}
    order, rng = list(names), random.Random(0)
    for number in range(rounds):
        rng.shuffle(order)
        for name in order:
            variant = VARIANTS[name]
            wait_for_quiet(30)
            with start_marwright(name, *variant.surroundings, **variant.server)(materials) as url:
                settle()
                request = materials.pictures[0].make_request(in_envelope=False)
                finish_wrk(start_wrk(url, request, MOST, JAVA))
                many, one = (
                    measure_cell(CONTESTANTS["marwright"], url, request, connections, seconds)
                    for connections in (MOST, 1)
                )
            rates[name].append(many.requests_per_second)
            lone[name].append(one.p50_ms or float("nan"))
            print(f"round {number + 1}  {name:22} {rates[name][-1]:7.0f}/s  {lone[name][-1]} ms")
    savings = {}
    for name in names[1:]:
        faster = [w / r for w, r in zip(rates["whole"], rates[name], strict=True)]
        sooner = [r / w for w, r in zip(lone["whole"], lone[name], strict=True)]
        savings[name] = {"throughput": spread(faster), "lone_p50": spread(sooner)}
        print(f"whole over {name}: {savings[name]}")
    return savings


def write_metrics(measured: dict[str, Any]) -> None:
    """Put a measurement of the metrics into the result of an earlier time."""
    path = RESULTS / "cost.json"
    result = {**json.loads(path.read_text("utf-8")), "metrics": measured}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured))


def measure_metrics(materials: Materials, seconds: int) -> dict[str, Any]:
    """Return throughput with the handler's metrics over without, window by window."""
    names = ("with", "without")
    for name in names:
        settings = {**SERVING, "handler": {"metrics": name == "with"}}
        pack_run(materials.run, out=materials.store / f"{name}.mar", name=name, settings=settings)
    request = materials.pictures[0].make_request(in_envelope=False)
    ratios = []
    for boot in range(BOOTS):
        properties = {"disable_token_authorization": "true"}
        models = [f"{name}.mar" for name in names]
        with TorchServe(materials.store, models=models, properties=properties) as server:
            base = f"{server.endpoint.inference_url}/predictions"
            urls = {name: f"{base}/{name}" for name in names}
            settle()
            for url in urls.values():
                finish_wrk(start_wrk(url, request, MOST, JAVA))
            for pair in range(PAIRS):
                rates = {}
                for name in names if pair % 2 else reversed(names):
                    outcome = finish_wrk(start_wrk(urls[name], request, MOST, seconds))
                    rates[name] = outcome["requests"] / outcome["seconds"]
                ratios.append(rates["with"] / rates["without"])
                print(f"boot {boot + 1}  with metrics over without {ratios[-1]:.3f}", flush=True)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {
        **spread(ratios),
        "mean": round(statistics.fmean(ratios), 4),
        "standard_error": round(error, 4),
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Return the median with least and most."""
    low, high = min(values), max(values)
    return {
        "value": round(statistics.median(values), 3),
        "spread": [round(low, 3), round(high, 3)],
    }


def profile(materials: Materials, name: str, seconds: int = 12) -> dict[str, Any]:
    """Return where the processor time of one contestant goes."""
    request = materials.pictures[0].make_request(in_envelope=False)
    with CONTESTANTS[name].start(materials) as url:
        settle()
        finish_wrk(start_wrk(url, request, MOST, CONTESTANTS[name].warm_seconds))
        wrk = start_wrk(url, request, MOST, seconds)
        time.sleep(1.0)
        before, started = read_threads(), time.monotonic()
        stages = sample_worker(seconds - 2)
        after, elapsed = read_threads(), time.monotonic() - started
        outcome = finish_wrk(wrk)
    rate = outcome["requests"] / outcome["seconds"]
    threads: dict[str, float] = {}
    for key, used in after.items():
        threads[key[1]] = threads.get(key[1], 0.0) + used - before.get(key, 0.0)
    spent = {name: round(1e6 * used / rate / elapsed, 1) for name, used in threads.items()}
    worker = spent.get("worker", 0.0)
    total = sum(stages.values())
    result = {
        "requests_per_second": round(rate, 1),
        "threads_us": {name: used for name, used in spent.items() if used >= 0.5},
        "worker_us": {k: round(worker * v / total, 1) for k, v in stages.most_common()},
    }
    print(name, json.dumps(result, indent=2))
    return result


def read_threads() -> dict[tuple[int, str], float]:
    """Return processor seconds by thread, named by what it does."""
    seconds = {}
    for process in list_processes():
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            words = " ".join(process.cmdline())
            for thread in process.threads():
                path = Path(f"/proc/{process.pid}/task/{thread.id}/comm")
                label = label_thread(process.name(), words, path.read_text().strip())
                if label:
                    seconds[thread.id, label] = thread.user_time + thread.system_time
    return seconds


def label_thread(process: str, words: str, thread: str) -> str:
    """Name a thread's task; empty for those that belong to no server."""
    if process == "wrk":
        return "wrk"
    if "model_service_worker" in words:
        return "worker"
    if process != "java":
        return ""
    if thread.startswith("epoll"):
        return "java: HTTP and sockets"
    if re.match(r"W-\d+-.*-std", thread):
        return "java: the workers' output"
    return "java: batches" if thread.startswith("W-") else "java: JIT, GC and the rest"


def sample_worker(seconds: int) -> Counter[str]:
    """Return py-spy's samples of one worker's main thread, by stage."""
    worker = next(p for p in list_processes() if "model_service_worker" in " ".join(p.cmdline()))
    program = shutil.which("py-spy")
    if program is None:
        raise ContestantError("py-spy is missing: pip install py-spy")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        raw = Path(folder) / "stacks"
        command = [program, "record", "--pid", str(worker.pid), "--format", "raw"]
        command += ["--duration", str(seconds), "--rate", str(SAMPLES_PER_SECOND)]
        answer = subprocess.run([*command, "--output", str(raw)], capture_output=True, text=True)
        if answer.returncode:
            raise ContestantError(f"py-spy: {answer.stderr.strip().splitlines()[-1]}")
        return Counter(dict(count_stages(raw.read_text(encoding="utf-8"))))


def count_stages(text: str) -> Iterator[tuple[str, int]]:
    """Give each stage of the main thread with its samples."""
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, samples = line.rpartition(" ")
        if "handle_connection" in stack:
            found = (name for name, pattern in STAGES.items() if re.search(pattern, stack))
            counts[next(found)] += int(samples)
    yield from counts.items()


if __name__ == "__main__":
    main()
