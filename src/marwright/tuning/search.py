"""The search for the best settings: what may be tried, what to try next, what was best.

Nothing here measures; it all follows from the trials that it is given.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "Candidate",
    "find_frontier",
    "judge",
    "Measurement",
    "propose",
    "rank",
    "Space",
    "Trial",
    "Verdict",
]

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
EAGER_DELAYS = (1, 1000, 4000)
"""Microseconds: not waiting for company, and waiting as long as a small model computes."""
DELAYS = (1, 5, 20)
"""Milliseconds, where batches are TorchServe's own: it waits for each further request."""
WORTH = 1.03
"""How much faster a neighbour must be to be gone on from: less is noise."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One way to serve the archive."""

    workers: int
    threads: int
    batch_size: int
    batch_delay: int
    """maxBatchDelay: microseconds with eager batches, else milliseconds."""

    def to_settings(self) -> dict[str, int]:
        """Return the keys of model-config.yaml."""
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.batch_delay,
            "handler.threads": self.threads,
        }

    def to_entry(self) -> dict[str, int]:
        """Return the keys of a model's entry in deploy.yaml."""
        return {
            "workers": self.workers,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "batch_delay_ms": self.batch_delay,
        }

    def __str__(self) -> str:
        """Return it in a few words."""
        return (
            f"{self.workers} x {self.threads} threads, batch {self.batch_size},"
            f" delay {self.batch_delay}"
        )


@dataclass(frozen=True)
class Measurement:
    """What a candidate did under one load: so many connections, each asking again once answered."""

    connections: int
    throughput: float
    """Answers a second."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests: int
    errors: int
    """Answers of another status than the sample's, and connections that broke."""

    def holds(self, bound_ms: float) -> bool:
        """Whether 99 of 100 answers came within the bound, and none was an error."""
        return self.requests > 0 and not self.errors and self.p99_ms <= bound_ms


@dataclass(frozen=True)
class Trial:
    """One candidate, measured once."""

    candidate: Candidate
    stage: str
    """packed: as the archive says; search; confirmation."""
    measurements: tuple[Measurement, ...]
    load_seconds: float = 0.0
    """Until its workers were READY."""
    failure: str = ""
    """Why it could not be served; empty where it could."""

    def find_best(self, bound_ms: float) -> Measurement | None:
        """Return the fastest load within the bound, else the one with the lowest p99."""
        sound = [item for item in self.measurements if item.requests and not item.errors]
        return max(sound, key=lambda item: _score(item, bound_ms), default=None)


@dataclass(frozen=True)
class Space:
    """Everything that may be tried."""

    cores: int
    batch_sizes: tuple[int, ...] = BATCH_SIZES[:6]
    delays: tuple[int, ...] = EAGER_DELAYS
    has_threads: bool = True
    """Whether the handler takes a number of threads; one of ours does."""

    def seeds(self) -> Iterator[Candidate]:
        """Yield where to begin, far from one another: single steps do not cross every plateau.

        A worker for every core, with middling and with the largest batches: those may pay off only
        under a load that the others do not bear. Then all cores for one worker.
        """
        size = self.batch_sizes[min(3, len(self.batch_sizes) - 1)]
        first = Candidate(self.cores, 1, size, self.delays[0])
        shapes = [first, replace(first, batch_size=self.batch_sizes[-1])]
        if self.has_threads:
            shapes.append(replace(first, workers=1, threads=self.cores))
        yield from dict.fromkeys(map(self.normalise, shapes))

    def normalise(self, candidate: Candidate) -> Candidate:
        """Return the candidate without a delay that could make no difference."""
        if candidate.batch_size == 1:
            return replace(candidate, batch_delay=self.delays[0])
        return candidate

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield what differs by one step: first the batch, then the cores' use, then the delay."""
        sizes, delays = self.batch_sizes, self.delays
        steps = [replace(candidate, batch_size=n) for n in _near(sizes, candidate.batch_size)]
        counts = self._counts()
        workers = _near(counts, candidate.workers)
        threads = _near(counts, candidate.threads) if self.has_threads else []
        steps += [
            replace(candidate, workers=w, threads=t)
            for w in [candidate.workers, *workers]
            for t in [candidate.threads, *threads]
            if w * t <= self.cores
        ]
        steps += [replace(candidate, batch_delay=n) for n in _near(delays, candidate.batch_delay)]
        for step in dict.fromkeys(map(self.normalise, steps)):
            if step != candidate:
                yield step

    def _counts(self) -> tuple[int, ...]:
        """Return numbers of workers or threads: powers of two, and what divides the cores."""
        powers = {1 << exponent for exponent in range(self.cores.bit_length())}
        divisors = {n for n in range(1, self.cores + 1) if self.cores % n == 0}
        return tuple(sorted(n for n in powers | divisors if n <= self.cores))


def propose(space: Space, trials: Sequence[Trial], *, bound_ms: float) -> Candidate | None:
    """Return what to try next: a seed, else a neighbour of the best so far; None where it is best.

    The best is left for a neighbour only where that one is better by more than noise.
    """
    tried = {trial.candidate for trial in trials}
    for seed in space.seeds():
        if seed not in tried:
            return seed
    best = _climb(trials, bound_ms)
    for neighbour in space.neighbours(best.candidate) if best else ():
        if neighbour not in tried:
            return neighbour
    return None


def _climb(trials: Sequence[Trial], bound_ms: float) -> Trial | None:
    """Return the best trial, where a later one counts as better only beyond noise."""
    best: Trial | None = None
    for trial in trials:
        found = trial.find_best(bound_ms)
        before = best.find_best(bound_ms) if best else None
        if found is not None and (before is None or _is_better(found, before, bound_ms)):
            best = trial
    return best


def _is_better(one: Measurement, other: Measurement, bound_ms: float) -> bool:
    if one.holds(bound_ms) != other.holds(bound_ms):
        return one.holds(bound_ms)
    if one.holds(bound_ms):
        return one.throughput > other.throughput * WORTH
    return one.p99_ms * WORTH < other.p99_ms


def _score(item: Measurement, bound_ms: float) -> tuple[bool, float]:
    """Return what is greater for the better: throughput within the bound, nearness outside."""
    return (True, item.throughput) if item.holds(bound_ms) else (False, -item.p99_ms)


def rank(trials: Iterable[Trial], *, bound_ms: float) -> list[tuple[Trial, Measurement]]:
    """Return the trials that were answered, each with its best load, the best first."""
    found = [(trial, best) for trial in trials if (best := trial.find_best(bound_ms)) is not None]
    return sorted(found, key=lambda pair: _score(pair[1], bound_ms), reverse=True)


@dataclass(frozen=True)
class Verdict:
    """A candidate under the load that it is best at, over all its rounds."""

    candidate: Candidate
    connections: int
    rounds: int
    throughput: tuple[float, float, float]
    """Answers a second: median, least, most."""
    p99_ms: tuple[float, float, float]
    """Median, least, most."""
    errors: int
    is_packed: bool = False
    """Whether it is what the archive itself says."""

    def holds(self, bound_ms: float) -> bool:
        """Whether its median p99 is within the bound, and no answer was an error."""
        return not self.errors and self.p99_ms[0] <= bound_ms

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they stand in the file of a tuning."""
        names = ("median", "least", "most")
        return {
            **vars(self.candidate),
            "connections": self.connections,
            "rounds": self.rounds,
            "throughput": dict(zip(names, self.throughput, strict=True)),
            "p99_ms": dict(zip(names, self.p99_ms, strict=True)),
            "errors": self.errors,
            "packed": self.is_packed,
        }


def judge(rounds: Sequence[Trial], *, bound_ms: float, packed: Candidate) -> list[Verdict]:
    """Return a verdict on each candidate of the confirming rounds, the best first.

    A round that could not be served counts as an error: the candidate is not to be relied on.
    """
    verdicts = []
    for candidate in dict.fromkeys(trial.candidate for trial in rounds):
        mine = [trial for trial in rounds if trial.candidate == candidate]
        loads = [item for trial in mine for item in trial.measurements if item.requests]
        if not loads:
            continue
        verdicts.append(
            Verdict(
                candidate,
                loads[0].connections,
                len(loads),
                _spread([item.throughput for item in loads]),
                _spread([item.p99_ms for item in loads]),
                sum(item.errors for item in loads) + len(mine) - len(loads),
                is_packed=candidate == packed,
            )
        )

    def key(verdict: Verdict) -> tuple[bool, float]:
        holds = verdict.holds(bound_ms)
        return holds, verdict.throughput[0] if holds else -verdict.p99_ms[0]

    return sorted(verdicts, key=key, reverse=True)


def find_frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (p99, throughput) that no other point beats in both, by rising p99."""
    frontier: list[tuple[float, float]] = []
    for latency, throughput in sorted(points, key=lambda point: (point[0], -point[1])):
        if not frontier or throughput > frontier[-1][1]:
            frontier.append((latency, throughput))
    return frontier


def _near(values: Sequence[int], value: int) -> list[int]:
    """Return the next larger and the next smaller of sorted values."""
    larger = [item for item in values if item > value][:1]
    smaller = [item for item in values if item < value][-1:]
    return larger + smaller


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
