"""One tuning: a search that ends in time, the best ones confirmed in turns, and a choice."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from marwright.archive.checks.samples import Sample
from marwright.errors import ServerError
from marwright.server.launch import count_cores
from marwright.tuning.bench import Bench
from marwright.tuning.search import (
    BATCH_SIZES,
    DELAYS,
    EAGER_DELAYS,
    Candidate,
    Space,
    Trial,
    Verdict,
    judge,
    propose,
    rank,
)

__all__ = ["make_plan", "Plan", "tune", "Tuning"]

LEVELS = (1, 4, 16, 64)
"""Connections."""
OVERHEAD = 0.6
"""Seconds of a trial beside loading and measuring: repacking, unregistering."""
CONFIRMING = 0.45
"""Most of the time that confirming may take."""
ROUNDS = ((4, 3), (4, 2), (3, 2), (2, 2))
"""(candidates, rounds) of the confirmation, the best first; the fourth is the archive as packed."""
MOST_TRIALS = 60


@dataclass(frozen=True)
class Plan:
    """What there is time for."""

    trials: int
    """Candidates that the search may try, beside the archive as packed."""
    finalists: int
    rounds: int
    seconds: float
    """Of one measured load."""
    warm_up: float
    trial_seconds: float
    """Of one candidate of the search."""
    confirm_seconds: float
    """Of one candidate in one round of the confirmation."""

    @property
    def reserve(self) -> float:
        """Seconds kept for the confirmation."""
        return self.finalists * self.rounds * self.confirm_seconds

    @property
    def total_seconds(self) -> float:
        """Seconds that all of it takes at most."""
        return self.trials * self.trial_seconds + self.reserve

    def describe(self) -> str:
        """Return in one line what there is time for, and how long it takes."""
        if not self.trials and not self.rounds:
            return "there is time for nothing but the archive as packed; raise --minutes"
        confirming = "none confirmed: raise --minutes"
        if self.rounds:
            confirming = f"the best {self.finalists} confirmed in {self.rounds} rounds"
        return (
            f"up to {self.trials} settings of {self.trial_seconds:.0f} s each, {confirming};"
            f" {self.total_seconds / 60:.1f} minutes at most"
        )


def make_plan(left: float, *, load_seconds: float, seconds: float, warm_up: float) -> Plan:
    """Return what fits into the `left` seconds; `load_seconds` is what a model takes to load."""
    start = load_seconds + OVERHEAD + warm_up  # the first load is warmed twice as long
    trial_seconds = start + len(LEVELS) * (seconds + warm_up)
    confirm_seconds = start + 2 * seconds + warm_up
    finalists, rounds = next(
        (pair for pair in ROUNDS if pair[0] * pair[1] * confirm_seconds <= CONFIRMING * left),
        (0, 0),
    )
    free = left - finalists * rounds * confirm_seconds
    trials = max(0, min(MOST_TRIALS, int(free / trial_seconds)))
    return Plan(trials, finalists, rounds, seconds, warm_up, trial_seconds, confirm_seconds)


@dataclass
class Tuning:
    """What was measured, and what follows from it."""

    archive: Path
    model: str
    version: str
    bound_ms: float
    cores: int
    eager_batches: bool
    packed: Candidate
    """As the archive itself says."""
    trials: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    is_interrupted: bool = False

    @property
    def verdicts(self) -> list[Verdict]:
        """The confirmed candidates, the best first; where none was, those of the search."""
        confirming = [trial for trial in self.trials if trial.stage == "confirmation"]
        if not confirming:
            ranked = rank(self.trials, bound_ms=self.bound_ms)
            confirming = [replace(trial, measurements=(best,)) for trial, best in ranked[:4]]
        return judge(confirming, bound_ms=self.bound_ms, packed=self.packed)

    @property
    def chosen(self) -> Verdict | None:
        """The fastest one within the bound; None where none is."""
        return next((item for item in self.verdicts if item.holds(self.bound_ms)), None)

    @property
    def nearest(self) -> Verdict | None:
        """The best one, whether or not it is within the bound."""
        return next(iter(self.verdicts), None)

    def to_json(self) -> dict[str, Any]:
        """Return the document with every trial."""
        chosen = self.chosen
        return {
            "archive": str(self.archive),
            "model": self.model,
            "version": self.version,
            "machine": {"cores": self.cores, "processor": _read_processor()},
            "p99_bound_ms": self.bound_ms,
            "delay_unit": "microseconds" if self.eager_batches else "milliseconds",
            "seconds": round(self.seconds, 1),
            "interrupted": self.is_interrupted,
            "chosen": chosen.to_json() if chosen else None,
            "finalists": [verdict.to_json() for verdict in self.verdicts],
            "trials": [asdict(trial) for trial in self.trials],
        }


def tune(
    archive: Path,
    *,
    bound_ms: float,
    minutes: float,
    samples: Sequence[Sample] = (),
    eager_batches: bool = True,
    on_plan: Callable[[Plan, Trial], None] = lambda plan, trial: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Tuning:
    """Search for the settings that answer most requests with p99 within the bound, in milliseconds.

    Ctrl-C ends the search; what was measured until then is returned. `on_plan` is called once it is
    known how long the model takes to load, with the trial of the archive as packed; `on_trial`
    after each further one.

    Raises:
        ArchiveError, UsageError: see Bench.
        ServerError: the server cannot be started, or the archive cannot be served at all.
    """
    started = time.monotonic()
    deadline = started + 60 * minutes
    seconds = min(4.0, max(0.3, minutes / 3))
    bench = Bench(archive, samples, eager_batches=eager_batches)
    cores = count_cores()
    packed = bench.read_candidate(cores)
    manifest = bench.manifest
    tuning = Tuning(
        archive, manifest.name, manifest.version, bound_ms, cores, eager_batches, packed
    )
    try:
        with bench:
            _run(bench, tuning, deadline, seconds, on_plan, on_trial)
    except KeyboardInterrupt:
        tuning.is_interrupted = True
    tuning.seconds = time.monotonic() - started
    if not tuning.is_interrupted and tuning.nearest is None:
        raise ServerError(
            f"{archive} was not answered in any way it was served",
            found=next((trial.failure for trial in tuning.trials if trial.failure), "no answer"),
            remedy=f"marwright check {archive} says what is wrong with it",
        )
    return tuning


def _run(
    bench: Bench,
    tuning: Tuning,
    deadline: float,
    seconds: float,
    on_plan: Callable[[Plan, Trial], None],
    on_trial: Callable[[Trial], None],
) -> None:
    """Measure the archive as packed, then search, then confirm; all of it ends in time."""
    bound_ms = tuning.bound_ms
    load = {"warm_up": seconds / 2, "seconds": seconds, "bound_ms": bound_ms}
    first = bench.measure(tuning.packed, "packed", levels=LEVELS, **load)
    tuning.trials.append(first)
    plan = make_plan(
        deadline - time.monotonic(),
        load_seconds=first.load_seconds,
        seconds=seconds,
        warm_up=seconds / 2,
    )
    on_plan(plan, first)
    space = make_space(bench, tuning.cores)
    for _ in range(plan.trials):
        candidate = propose(space, tuning.trials, bound_ms=bound_ms)
        if candidate is None or time.monotonic() + plan.trial_seconds + plan.reserve > deadline:
            break
        tuning.trials.append(bench.measure(candidate, "search", levels=LEVELS, **load))
        on_trial(tuning.trials[-1])
    load["seconds"] = 2 * seconds
    finalists = choose_finalists(tuning, plan.finalists)
    for _ in range(plan.rounds):
        for candidate, connections in finalists:
            if time.monotonic() + plan.confirm_seconds / 2 > deadline:
                return
            trial = bench.measure(candidate, "confirmation", levels=[connections], **load)
            tuning.trials.append(trial)
            on_trial(trial)


def make_space(bench: Bench, cores: int) -> Space:
    """Return what may be tried of an archive: batches up to what its handler takes at once."""
    handler = bench.settings.get("handler")
    most = handler.get("max_batch") if isinstance(handler, dict) else None
    sizes = tuple(size for size in BATCH_SIZES if size <= (most or BATCH_SIZES[-1]))
    delays = EAGER_DELAYS if bench.eager_batches else DELAYS
    return Space(cores, sizes, delays, has_threads=bench.has_threads)


def choose_finalists(tuning: Tuning, count: int) -> list[tuple[Candidate, int]]:
    """Return the best candidates, each with the connections it is best at; the packed one is last.

    With room for four, the archive as packed is the fourth, so that what was won can be told.
    """
    ranked = rank(tuning.trials, bound_ms=tuning.bound_ms)
    found = {trial.candidate: best.connections for trial, best in reversed(ranked)}
    order = list(dict.fromkeys(trial.candidate for trial, _ in ranked))
    best = order[: min(count, 3)]
    if count > 3 and tuning.packed in found and tuning.packed not in best:
        best.append(tuning.packed)
    return [(candidate, found[candidate]) for candidate in best]


def _read_processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()
