"""Model files tried side by side, each in a process of its own, in rounds that take turns."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from marwright.errors import ExportError

from .result import BATCHES, Timing
from .trial import TENSORFLOW

__all__ = ["open_trial", "time_trials", "Trial"]

ANSWERED_AT_ONCE = 32
GRACE_SECONDS = 10.0
SECONDS = {1: 0.06, 32: 0.15}
"""Of one round, by batch size."""


class Trial:
    """A process that has loaded one model file."""

    def __init__(
        self, process: subprocess.Popen[str], name: str, log: Any, *, at_once: int
    ) -> None:
        self.process = process
        self.at_once = at_once
        self.name = name
        self.log = log
        self.memory_bytes = 0
        self.load_seconds = float(self._read()["load_seconds"])

    def answer(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (N, classes) logits for (N, ...) float32.

        Raises:
            ExportError: the file gives none; says why.
        """
        with tempfile.TemporaryDirectory(prefix="marwright-trial-") as name:
            folder = Path(name)
            np.save(folder / "inputs.npy", inputs.contiguous().numpy())
            files = {key: str(folder / f"{key}.npy") for key in ("inputs", "outputs")}
            self._ask(do="answer", at_once=self.at_once, **files)
            return torch.from_numpy(np.load(files["outputs"]))

    def time(self, shape: Sequence[int], seconds: float) -> list[float]:
        """Return how many milliseconds each call took, for that many seconds."""
        milliseconds: list[float] = self._ask(do="time", shape=list(shape), seconds=seconds)[
            "milliseconds"
        ]
        return milliseconds

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading will say how it ended
        answer = self._read()
        self.memory_bytes = int(answer["memory_bytes"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.log.seek(0)
            raise ExportError(
                f"the process that runs {self.name} ended with status {status}",
                detail=self.log.read()[-2000:],
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ExportError(
                f"{self.name} cannot be run", found=" ".join(answer["error"].split())[:300]
            )
        return answer


@contextmanager
def open_trial(backend: str, path: Path, *, threads: int = 1, name: str = "") -> Iterator[Trial]:
    """Start a process that loads a file as a worker would, and end it with the block.

    Raises:
        ExportError: the file cannot be loaded.
    """
    command = [sys.executable, "-m", "marwright.training.optimise.trial"]
    command += [backend, str(path), str(threads)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            at_once = 0 if backend in TENSORFLOW else ANSWERED_AT_ONCE
            yield Trial(process, name or path.name, log, at_once=at_once)
        finally:
            if process.stdin is not None:
                process.stdin.close()  # its input ends, and so does it
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def time_trials(
    trials: Sequence[Trial],
    item_shape: Sequence[int],
    *,
    rounds: int,
    progress: Callable[[], None] = lambda: None,
) -> list[tuple[Timing, ...]]:
    """Time all of them at every batch size, in rounds, each in another order.

    What slows the machine down for a while thus slows all of them. `progress` is called once for
    every trial and round.
    """
    taken: list[dict[int, list[list[float]]]] = [{size: [] for size in BATCHES} for _ in trials]
    order = list(range(len(trials)))
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for index in order:
            for size in BATCHES:
                seconds = SECONDS.get(size, 0.15)
                taken[index][size].append(trials[index].time([size, *item_shape], seconds))
            progress()
    return [tuple(_summarise(size, found[size]) for size in BATCHES) for found in taken]


def _summarise(batch: int, rounds: Sequence[list[float]]) -> Timing:
    medians = [statistics.median(item) for item in rounds]
    return Timing(
        batch=batch,
        p50_ms=statistics.median(medians),
        p99_ms=float(np.percentile(np.concatenate(rounds), 99)),
        lowest_ms=min(medians),
        highest_ms=max(medians),
    )
