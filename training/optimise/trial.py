"""One model file in a process of its own: loaded afresh, asked, timed.

`python -m marwright.training.optimise.trial BACKEND FILE THREADS` loads the file as a server's
worker does, with handlers/backend.py, prints what that took as a line of JSON, and then answers
requests, a line of JSON each, until its input ends. The backends eager and eager-channels-last take
a run folder in place of a file; savedmodel and tflite are run by TensorFlow and LiteRT.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from marwright.archive.handler import find_ours

Model = Callable[[torch.Tensor], torch.Tensor]

TENSORFLOW = ("savedmodel", "tflite")
"""What is loaded anew for each answer, and cuts into batches itself."""
LEAST_CALLS = 5
"""In one round, however long they take."""


def main(arguments: list[str]) -> None:
    """Load, then serve requests."""
    backend, path, threads = arguments[0], Path(arguments[1]), int(arguments[2])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def send(values: dict[str, Any]) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    try:
        model = load_model(backend, path, threads)
    except Exception as exc:  # whatever the backend raises is what the caller wants to know
        send({"error": f"{type(exc).__name__}: {exc}"})
        return
    send({"load_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = globals()[f"_{request.pop('do')}"](model, **request)
        except Exception as exc:
            send({"error": f"{type(exc).__name__}: {str(exc)[:1000]}"})
            continue
        send({**answer, "memory_bytes": max(0, process.memory_info().rss - before)})


def load_model(backend: str, path: Path, threads: int) -> Model:
    """Return what runs a file: (N, ...) float32 in, (N, classes) logits out."""
    if backend.startswith("eager"):
        from marwright.archive.run import Run

        from ..network import load_network

        network = load_network(Run.open(path)).eval()
        if backend == "eager":
            return network
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
        return lambda inputs: network(inputs.contiguous(memory_format=torch.channels_last))
    if backend in TENSORFLOW:
        from . import tensorflow

        if backend == "tflite":
            return lambda inputs: torch.from_numpy(tensorflow.run_tflite(path, inputs.numpy()))
        return lambda inputs: torch.from_numpy(tensorflow.run_saved_model(path, inputs.numpy()))
    sys.path.insert(0, str(find_ours()))
    loaded = importlib.import_module("backend").load_backend(
        backend, path, device=torch.device("cpu"), threads=threads
    )
    run: Model = loaded.run
    return run


@torch.inference_mode()
def _answer(model: Model, *, inputs: str, outputs: str, at_once: int) -> dict[str, Any]:
    """Write the logits for a file of inputs, in batches and one of what is left; 0 for all."""
    items = torch.from_numpy(np.load(inputs))
    batches = items.split(at_once or len(items))
    logits = [model(batch.contiguous()).float().numpy() for batch in batches]
    np.save(outputs, np.concatenate(logits))
    return {}


@torch.inference_mode()
def _time(model: Model, *, shape: list[int], seconds: float) -> dict[str, Any]:
    """Return how many milliseconds each call took, for as long as is given."""
    inputs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    model(inputs)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < LEAST_CALLS or time.perf_counter() < end:
        started = time.perf_counter()
        model(inputs)
        taken.append(1000 * (time.perf_counter() - started))
    return {"milliseconds": taken}


if __name__ == "__main__":
    main(sys.argv[1:])
