"""How often a canary is stopped for nothing, and how soon when it is worse.

Run as `make bench WHAT=canary`; writes benchmarks/results/canary.json. Releases are simulated with
fixed seeds: a look after every 10 requests of the candidate, four comparisons at each look (errors,
median and 95th percentile of the latency, agreement of shadowed answers), which share ALPHA. Two
kinds of equal versions: at the default limits, and with no tolerance at all, which is the worst
case for false stops. The stop is at the first look that finds the candidate worse. For contrast,
`naive` stops at the first look where a z-test of both error rates is below 0.05.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from marwright.release.evidence import PRIORS, Bets
from marwright.release.statistics import Counts, compare_errors, compare_latency, judge_agreement

RESULTS = Path(__file__).parent / "results/canary.json"
ALPHA = 0.05
EACH = ALPHA / 4
STEP = 10
"""Requests of the candidate between two looks."""
MOST = 5000
"""Requests of the candidate; beyond, a release is over."""
LOOKS = STEP * np.arange(1, MOST // STEP + 1)
EQUAL, WORSE = 2000, 200
"""Releases simulated: of equal versions, and of each worse one at each share."""
SHARES = (0.05, 0.25, 0.5)
QUANTILES = (0.5, 0.95)


def main() -> None:
    """Simulate everything and write the result."""
    started = time.perf_counter()
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {p: version(p) for p in ("marwright", "numpy")},
        "python": platform.python_version(),
        "alpha": ALPHA,
        "equal": {
            "default limits": stop_equal(margin=0.005, ratio=1.2, agree=0.97),
            "no tolerance": stop_equal(margin=0.0, ratio=1.0, agree=0.95),
        },
        "errors 1 % -> 3 %": stop_errors(0.01, 0.03),
        "30 % slower, sigma 0.3": stop_slow(0.3, 1.3),
        "30 % slower, sigma 0.6": stop_slow(0.6, 1.3),
        "10 times slower, sigma 0.6": stop_slow(0.6, 10.0),
        "one look": time_looks(),
    }
    result["seconds"] = round(time.perf_counter() - started, 1)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def stop_equal(*, margin: float, ratio: float, agree: float) -> dict[str, Any]:
    """Count the releases of equal versions that are stopped, by what, at a share of a half."""
    stops = dict.fromkeys(("errors", "median", "p95", "agreement", "any", "naive"), 0)
    for seed in range(EQUAL):
        random = np.random.default_rng([1, seed])
        arms = draw_errors(random, 0.02, 0.02, share=0.5)
        draw = (draw_lognormal, draw_bimodal)[seed % 2]
        stable, candidate = draw(random, MOST), draw(random, MOST)
        agreed = np.cumsum(random.random(MOST) < agree, dtype=np.int64)[LOOKS - 1]
        found = {
            "errors": stop_by_errors(*arms, margin=margin) is not None,
            "agreement": stop_by_agreement(agreed) is not None,
        }
        for name, quantile in zip(("median", "p95"), QUANTILES, strict=True):
            stop = stop_by_latency(stable, candidate, LOOKS, quantile=quantile, ratio=ratio)
            found[name] = stop is not None
        found["any"] = any(found.values())
        found["naive"] = stop_naively(*arms)
        for name, stopped in found.items():
            stops[name] += stopped
    return {"releases": EQUAL} | {name: round(count / EQUAL, 4) for name, count in stops.items()}


def stop_errors(before: float, after: float) -> dict[str, Any]:
    """Count the candidate's requests until a higher error rate stops it, at each share."""
    result: dict[str, Any] = {}
    for share in SHARES:
        for margin in (0.0, 0.005):
            stops = []
            for seed in range(WORSE):
                random = np.random.default_rng([2, seed])
                arms = draw_errors(random, before, after, share=share)
                stops.append(stop_by_errors(*arms, margin=margin))
            result[f"share {share}, margin {margin}"] = describe(stops)
    return result


def stop_slow(sigma: float, slower: float) -> dict[str, Any]:
    """Count the candidate's requests until its latency stops it, at each share."""
    result: dict[str, Any] = {}
    most = MOST if slower < 2 else 500
    looks = LOOKS[: most // STEP]
    for share in SHARES:
        sent = np.round(looks * (1 - share) / share).astype(int)
        stops: dict[str, list[int | None]] = {"median": [], "p95": [], "any": []}
        for seed in range(WORSE if share > 0.1 else WORSE // 4):
            random = np.random.default_rng([3, seed])
            stable = draw_lognormal(random, int(sent[-1]), sigma)
            candidate = slower * draw_lognormal(random, most, sigma)
            found = [stop_by_latency(stable, candidate, sent, quantile=q) for q in QUANTILES]
            stops["median"].append(found[0])
            stops["p95"].append(found[1])
            stops["any"].append(min((stop for stop in found if stop), default=None))
        result[f"share {share}"] = {name: describe(values) for name, values in stops.items()}
    return result


def stop_by_errors(stable: list[Counts], candidate: list[Counts], *, margin: float) -> int | None:
    """Return the candidate's requests at the first look that finds its error rate too high."""
    # A look's bets depend on the looks before it alone: the running sum is the evidence at each.
    won = np.cumsum(Bets.place(stable, candidate).win(margin, worse=True))
    stop = find_first(won >= -np.log(EACH))
    if stop is not None:
        seen = stop // STEP
        comparison = compare_errors(stable[:seen], candidate[:seen], margin=margin, alpha=EACH)
        assert comparison.verdict == "worse"
    return stop


def stop_by_latency(
    stable: NDArray[np.float64],
    candidate: NDArray[np.float64],
    sent: NDArray[np.int64],
    *,
    quantile: float,
    ratio: float = 1.2,
) -> int | None:
    """Return the candidate's requests at the first look that finds a quantile too high.

    The evidence is the lowest over all pairs of quantiles, so any few pairs bound it from above:
    the comparison is made only at looks where these leave it possible.
    """
    looks = LOOKS[: len(sent)]
    levels = quantile + np.linspace(-0.02, 0.02, 9)
    fast, slow = np.quantile(stable, levels), np.quantile(candidate, levels)
    pairs = list(zip(fast, np.minimum(slow[4], ratio * fast), strict=True))
    pairs += zip(np.maximum(fast[4], slow / ratio), slow, strict=True)
    likely = np.full(len(looks), np.inf)
    for own, other in pairs:
        weight = weigh(np.cumsum(stable <= own)[sent - 1], sent, quantile)
        weight += weigh(np.cumsum(candidate <= other)[looks - 1], looks, quantile)
        likely = np.minimum(likely, weight)
    for look in np.flatnonzero(likely >= -np.log(EACH)):
        comparison = compare_latency(
            stable[: sent[look]],
            candidate[: looks[look]],
            quantile=quantile,
            ratio=ratio,
            alpha=EACH,
        )
        assert np.log(comparison.e_value) <= likely[look] + 1e-6
        if comparison.verdict == "worse":
            return int(looks[look])
    return None


def stop_by_agreement(agreed: NDArray[np.int64]) -> int | None:
    """Return the inputs at the first look that finds too little agreement."""
    low = agreed < 0.95 * LOOKS
    for look in np.flatnonzero(low & (weigh(agreed, LOOKS, 0.95) >= -np.log(EACH) - 1e-6)):
        count, total = int(agreed[look]), int(LOOKS[look])
        if judge_agreement(count, total, least=0.95, alpha=EACH).verdict == "worse":
            return total
    return None


def stop_naively(stable: list[Counts], candidate: list[Counts]) -> bool:
    """Tell whether a z-test that is repeated at each look ever falls below 0.05."""
    (few, total), (more, _) = np.array(stable).T, np.array(candidate).T
    pooled = (few + more) / (2 * total)
    deviation = np.sqrt(np.maximum(pooled * (1 - pooled) * 2 / total, 1e-12))
    return bool(((more - few) / total / deviation > norm.isf(0.05)).any())


def weigh(below: NDArray[np.int64], total: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """Return the logs of the evidence against a share: Beta-binomial over binomial likelihoods."""
    each = [
        betaln(weight * share + below, weight * (1 - share) + total - below)
        - betaln(weight * share, weight * (1 - share))
        for weight in PRIORS
    ]
    mixed = np.logaddexp.reduce(each) - np.log(len(each))
    likelihood = below * np.log(share) + (total - below) * np.log(1 - share)
    return np.asarray(mixed - likelihood, dtype=np.float64)


def draw_errors(
    random: np.random.Generator, before: float, after: float, *, share: float
) -> tuple[list[Counts], list[Counts]]:
    """Draw what both arms have answered at each look; stable first."""
    sent = round(STEP * (1 - share) / share)
    arms = []
    for rate, step in ((before, sent), (after, STEP)):
        errors = np.cumsum(random.binomial(step, rate, len(LOOKS)))
        arms.append([Counts(int(e), step * (i + 1)) for i, e in enumerate(errors)])
    return arms[0], arms[1]


def draw_lognormal(
    random: np.random.Generator, count: int, sigma: float = 0.6
) -> NDArray[np.float64]:
    """Draw latencies in seconds around 20 ms."""
    return 0.02 * random.lognormal(0.0, sigma, count)


def draw_bimodal(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Draw latencies of which a twentieth is some 15 times as long, in whole milliseconds."""
    slow = random.random(count) < 0.05
    return np.round(draw_lognormal(random, count, 0.3) * np.where(slow, 15, 1), 3)


def find_first(hit: NDArray[np.bool_]) -> int | None:
    """Return the candidate's requests at the first look that is marked."""
    return int(LOOKS[hit.argmax()]) if hit.any() else None


def describe(stops: list[int | None]) -> dict[str, Any]:
    """Return median and p90 of the requests until the stop; None where it is not within MOST."""
    ordered = sorted(MOST + 1 if stop is None else stop for stop in stops)
    points = (ordered[(len(ordered) - 1) // 2], ordered[int(0.9 * (len(ordered) - 1))])
    median, p90 = (None if point > MOST else point for point in points)
    stopped = sum(stop is not None for stop in stops) / len(stops)
    return {"releases": len(stops), "stopped": round(stopped, 3), "median": median, "p90": p90}


def time_looks() -> dict[str, float]:
    """Time one look at 10,000 requests an arm, in milliseconds, the best of five."""
    random = np.random.default_rng(4)
    arms = draw_errors(random, 0.01, 0.01, share=0.5)
    values = draw_lognormal(random, 10_000).tolist(), draw_lognormal(random, 10_000).tolist()
    looks: dict[str, Callable[[], object]] = {
        "errors, 500 looks": lambda: compare_errors(*arms, margin=0.005, alpha=EACH),
        "latency": lambda: compare_latency(*values, alpha=EACH),
        "agreement": lambda: judge_agreement(9_600, 10_000, least=0.95, alpha=EACH),
    }
    result = {}
    for name, look in looks.items():
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            look()
            seconds.append(time.perf_counter() - started)
        result[name] = round(1000 * min(seconds), 2)
    return result


if __name__ == "__main__":
    main()
