"""The search, on machines that are made up: a cost model says what each candidate does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from marwright.tuning.search import (
    Candidate,
    Measurement,
    Space,
    Trial,
    find_frontier,
    judge,
    propose,
    rank,
)

Cost = Callable[[Candidate, int], tuple[float, float]]


def serve_in_batches(cores: int) -> Cost:
    """Return a machine on which a batch costs 2 ms and 0.2 ms an item, and threads help little."""

    def cost(candidate: Candidate, connections: int) -> tuple[float, float]:
        speed = min(candidate.workers, cores) * candidate.threads**0.3
        size = min(candidate.batch_size, max(1, connections // candidate.workers))
        batch_ms = 2 + 0.2 * size + candidate.batch_delay / 1000
        throughput = min(1000 * size * speed / batch_ms, 1000 * connections / batch_ms)
        return throughput, 1.2 * 1000 * connections / throughput

    return cost


def serve_one_at_a_time(cores: int) -> Cost:
    """Return a machine whose model gains nothing by batches and all by threads."""

    def cost(candidate: Candidate, connections: int) -> tuple[float, float]:
        throughput = 100.0 * candidate.threads**0.9 * candidate.workers**0.5
        throughput /= 1 + 0.05 * candidate.batch_size
        return throughput, 1000 * connections / throughput

    return cost


def try_out(candidate: Candidate, cost: Cost, stage: str = "search") -> Trial:
    found = []
    for connections in (1, 4, 16, 64):
        throughput, p99 = cost(candidate, connections)
        found.append(Measurement(connections, throughput, p99 / 2, p99 * 0.9, p99, 1000, 0))
    return Trial(candidate, stage, tuple(found))


def search(space: Space, cost: Cost, bound_ms: float, most: int = 100) -> list[Trial]:
    trials = [try_out(Candidate(1, space.cores, 8, 1), cost, "packed")]
    while len(trials) < most and (candidate := propose(space, trials, bound_ms=bound_ms)):
        trials.append(try_out(candidate, cost))
    return trials


def find_optimum(space: Space, cost: Cost, bound_ms: float) -> float:
    """Return the throughput of the best of all candidates, each of them tried."""
    counts = range(1, space.cores + 1)
    everything = [
        try_out(Candidate(workers, threads, size, delay), cost)
        for workers in counts
        for threads in counts
        if workers * threads <= space.cores
        for size in space.batch_sizes
        for delay in space.delays
    ]
    return rank(everything, bound_ms=bound_ms)[0][1].throughput


@pytest.mark.parametrize("machine", [serve_in_batches, serve_one_at_a_time])
@pytest.mark.parametrize(("cores", "bound_ms"), [(2, 50), (2, 12), (8, 20), (8, 400)])
def test_the_search_ends_near_the_optimum_with_few_trials(
    machine: Callable[[int], Cost], cores: int, bound_ms: float
) -> None:
    space, cost = Space(cores), machine(cores)
    trials = search(space, cost, bound_ms)
    best = rank(trials, bound_ms=bound_ms)[0][1]
    assert best.holds(bound_ms)
    assert best.throughput >= 0.9 * find_optimum(space, cost, bound_ms)
    assert len(trials) <= 25


def test_no_candidate_is_tried_twice_and_all_are_of_the_space() -> None:
    space = Space(4, batch_sizes=(1, 2, 4))
    tried = [trial.candidate for trial in search(space, serve_in_batches(4), 50)][1:]
    assert len(set(tried)) == len(tried)
    assert all(one.workers * one.threads <= 4 and one.batch_size <= 4 for one in tried)
    assert not any(one.batch_size == 1 and one.batch_delay > 1 for one in tried)


def test_threads_are_left_alone_where_the_handler_takes_none() -> None:
    trials = search(Space(8, has_threads=False), serve_in_batches(8), 50)
    assert {trial.candidate.threads for trial in trials[1:]} == {1}


def test_a_candidate_that_fails_is_passed_over() -> None:
    space, cost = Space(2), serve_in_batches(2)
    trials = [try_out(Candidate(1, 1, 8, 1), cost)]
    for _ in range(40):
        candidate = propose(space, trials, bound_ms=50)
        if candidate is None:
            break
        fits = candidate.batch_size <= 8
        trials.append(
            try_out(candidate, cost) if fits else Trial(candidate, "search", (), failure="no")
        )
    best = rank(trials, bound_ms=50)[0][0].candidate
    assert best.batch_size <= 8
    assert any(trial.failure for trial in trials)


def test_a_load_with_errors_never_counts() -> None:
    fast = Measurement(64, 9000, 1, 1, 1, 9000, errors=1)
    slow = Measurement(1, 10, 2, 2, 2, 10, errors=0)
    trial = Trial(Candidate(1, 1, 1, 1), "search", (slow, fast))
    assert trial.find_best(50) is slow
    assert trial.find_best(0.5) is slow  # where neither is within the bound, too


def test_outside_the_bound_the_nearest_is_best() -> None:
    near = Measurement(1, 10, 60, 60, 60, 10, 0)
    far = Measurement(64, 900, 600, 600, 600, 900, 0)
    trial = Trial(Candidate(1, 1, 1, 1), "search", (near, far))
    assert trial.find_best(50) is near


def make_round(candidate: Candidate, throughput: float, p99: float, errors: int = 0) -> Trial:
    load = Measurement(16, throughput, p99, p99, p99, 100, errors)
    return Trial(candidate, "confirmation", (load,))


def test_the_verdict_is_by_medians_and_tells_the_spread() -> None:
    one, other = Candidate(2, 1, 8, 1), Candidate(1, 2, 8, 1)
    rounds = [make_round(one, rate, p99) for rate, p99 in ((300, 10), (100, 90), (200, 20))]
    rounds += [make_round(other, rate, 60) for rate in (400, 500, 600)]
    first, second = judge(rounds, bound_ms=50, packed=other)
    assert (first.candidate, first.throughput, first.p99_ms) == (one, (200, 100, 300), (20, 10, 90))
    assert first.holds(50)
    assert not second.holds(50)
    assert second.is_packed


def test_a_round_that_could_not_be_served_counts_against_the_candidate() -> None:
    one = Candidate(2, 1, 8, 1)
    rounds = [make_round(one, 300, 10), Trial(one, "confirmation", (), failure="died")]
    assert not judge(rounds, bound_ms=50, packed=one)[0].holds(50)


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    points = [(10, 100), (20, 90), (20, 300), (5, 50), (30, 300)]
    assert find_frontier(points) == [(5, 50), (10, 100), (20, 300)]
