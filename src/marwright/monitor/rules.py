"""When somebody is told: Prometheus' recording rules and alert rules, made from one table.

Windows and thresholds are those of a deploy.yaml's `monitoring.targets`, `releases.canary` and of
this file. docs/runbook.md has a section for every alert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from marwright.server.deployment import Deployment

__all__ = ["Alert", "list_alerts", "list_recordings", "Recording", "render_rules", "Times"]

RUNBOOK = "docs/runbook.md"
SCRAPE_SECONDS = 5.0
LEAST_SCRAPE_SECONDS = 0.5
SAMPLES = 4
"""Scrapes that the shortest window must hold; a rate takes two, and one may be late."""

VERSION = "server, model, version"
MODEL = "server, model"
FAILED = 'marwright_http_requests_total{status=~"5.."}'
REQUESTS = "marwright_http_requests_total"
ANSWERED = 'marwright_http_requests_total{status=~"2.."}'

LEAST_FAILURES = 10
"""Failed requests in the long window below which an error budget burns for nobody to see: where
two requests come an hour, one that fails is half of them."""
LEAST_REQUESTS = 100
"""Requests in a window below which its p95 or p99 is only its slowest request."""
LEAST_CANARY_FAILURES = 5
DEVIATIONS = 3.0
"""Standard errors by which a candidate's share of errors must be above the stable version's."""
LEAST_SLOWER = 1.5
"""Times the stable version's p95: a histogram's edges tell no smaller ones apart."""
LARGEST_SHARE = 0.5
"""Share of failed requests that is always too many, however low the target."""

DAY = 86_400.0
HOUR = 3_600.0
MINUTE = 60.0
LONG_WINDOWS = {"6h": 6 * HOUR, "1d": DAY, "3d": 3 * DAY}
COUNTED_WINDOWS = {"1h", "6h", "1d", "3d"}
"""Of which the failed requests are counted too."""
WINDOWS = {"5m": 5 * MINUTE, "30m": 30 * MINUTE, "1h": HOUR, "2h": 2 * HOUR, **LONG_WINDOWS}


@dataclass(frozen=True)
class Times:
    """Durations as rules have them, all divided by one factor: a drill takes minutes, not hours."""

    scale: float = 1.0

    @property
    def scrape_seconds(self) -> float:
        """How often a server is read, and the rules are looked at."""
        return max(SCRAPE_SECONDS / self.scale, LEAST_SCRAPE_SECONDS)

    def shrink(self, seconds: float) -> float:
        """Return a duration divided by the factor."""
        return seconds / self.scale

    def span(self, seconds: float) -> str:
        """Return how long a condition must hold."""
        return show_span(self.shrink(seconds))

    def window(self, seconds: float) -> str:
        """Return a window to look back, as `[5m]`; one of fewer scrapes than it needs is longer."""
        return f"[{show_span(max(self.shrink(seconds), SAMPLES * self.scrape_seconds))}]"


@dataclass(frozen=True)
class Recording:
    """An expression whose value is kept under a name of its own."""

    name: str
    """LEVEL:METRIC:OPERATION; a window in it is the one of a factor of 1."""
    expression: str
    long: bool = False
    """Whether it is looked at once a minute only: its window is of hours."""


@dataclass(frozen=True)
class Alert:
    """What somebody is told of, and what they are to do."""

    name: str
    expression: str
    hold_seconds: float
    """How long it must be so."""
    severity: Literal["page", "ticket"]
    """page: clients notice, now. ticket: it can wait for the morning."""
    summary: str
    """What is so, and what to do; Prometheus fills in the labels."""

    @property
    def anchor(self) -> str:
        """Its section of the runbook."""
        return self.name.lower()


def list_recordings(times: Times) -> tuple[Recording, ...]:
    """Return what is kept under a name, each after what it uses itself."""
    return tuple([*_record_models(times), *_record_versions(times), *_record_arms()])


def list_alerts(deployment: Deployment, times: Times) -> tuple[Alert, ...]:
    """Return every alert, with the thresholds of a deployment."""
    return (
        *_watch_server(times),
        *_watch_budget(deployment),
        *_watch_versions(deployment, times),
        *_watch_data(deployment, times),
        *_watch_releases(deployment, times),
    )


def render_rules(deployment: Deployment, *, scale: float = 1.0) -> str:
    """Return Prometheus' rule file; `scale` divides every duration in it."""
    times = Times(scale)
    recordings = list_recordings(times)
    groups: list[dict[str, Any]] = [
        {
            "name": "marwright",
            "rules": [_render_recording(one) for one in recordings if not one.long],
        },
        {
            "name": "marwright-long",
            "interval": show_span(max(times.shrink(MINUTE), times.scrape_seconds)),
            "rules": [_render_recording(one) for one in recordings if one.long],
        },
        {
            "name": "marwright-alerts",
            "rules": [_render_alert(one, times) for one in list_alerts(deployment, times)],
        },
    ]
    return yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000)


def show_span(seconds: float) -> str:
    """Return a duration in Prometheus' form, in the largest unit that it is a whole number of."""
    milliseconds = max(1, round(seconds * 1000))
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def _render_recording(recording: Recording) -> dict[str, Any]:
    return {"record": recording.name, "expr": recording.expression}


def _render_alert(alert: Alert, times: Times) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        **({"for": times.span(alert.hold_seconds)} if alert.hold_seconds else {}),
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": f"{RUNBOOK}#{alert.anchor}"},
    }


def _record_models(times: Times) -> Iterator[Recording]:
    """Yield the share of failed requests in each window, and how many they are."""
    for label, seconds in WINDOWS.items():
        window, long = times.window(seconds), label in LONG_WINDOWS
        failed = f"sum by ({MODEL}) (rate({FAILED}{window}))"
        yield Recording(
            f"model:marwright_http_failures:ratio_rate{label}",
            f"{failed} / sum by ({MODEL}) (rate({REQUESTS}{window}))",
            long,
        )
        if label in COUNTED_WINDOWS:
            yield Recording(
                f"model:marwright_http_failures:increase{label}",
                f"sum by ({MODEL}) (increase({FAILED}{window}))",
                long,
            )


def _record_versions(times: Times) -> Iterator[Recording]:
    """Yield what each version answered in the last minutes."""
    window = times.window(5 * MINUTE)
    requests = "version:marwright_http_requests:increase5m"
    yield Recording(requests, f"sum by ({VERSION}) (increase({REQUESTS}{window}))")
    yield Recording(
        "version:marwright_http_failures:increase5m",
        # 0 where nothing failed yet: there is no such series before the first one.
        f"sum by ({VERSION}) (increase({FAILED}{window})) or {requests} * 0",
    )
    for name, quantile in (("p95", 0.95), ("p99", 0.99)):
        yield Recording(
            f"version:marwright_http_request_seconds:{name}_5m",
            f"histogram_quantile({quantile}, sum by ({VERSION}, le)"
            f" (rate(marwright_http_request_seconds_bucket{window})))",
        )


def _record_arms() -> Iterator[Recording]:
    """Yield the same for the candidate and the stable version of a split, and their difference."""
    for arm in ("candidate", "stable"):
        is_arm = f'max by ({VERSION}) (marwright_split_share_ratio{{arm="{arm}"}})'
        if arm == "candidate":
            is_arm = f"({is_arm} > 0)"
        for metric in (
            "marwright_http_requests:increase5m",
            "marwright_http_failures:increase5m",
            "marwright_http_request_seconds:p95_5m",
        ):
            yield Recording(f"{arm}:{metric}", f"version:{metric} and on ({VERSION}) {is_arm}")
    failed, requests = "marwright_http_failures:increase5m", "marwright_http_requests:increase5m"
    match = f"on ({MODEL}) group_left ()"
    yield Recording(
        "candidate:marwright_http_failures:excess5m",
        f"candidate:{failed} / candidate:{requests}"
        f" - {match} (stable:{failed} / stable:{requests})",
    )
    pooled = (
        f"((candidate:{failed} + {match} stable:{failed})"
        f" / (candidate:{requests} + {match} stable:{requests}))"
    )
    # The standard error of the difference of two shares, were they the same one.
    yield Recording(
        "candidate:marwright_http_failures:deviation5m",
        f"sqrt({pooled} * (1 - {pooled})"
        f" * ((1 / candidate:{requests}) + {match} (1 / stable:{requests})))",
    )


def _watch_server(times: Times) -> Iterator[Alert]:
    yield Alert(
        "MarwrightDown",
        'up{job="marwright"} == 0'
        " or max by (server) (marwright_server_up) == 0"
        " or max by (server) (marwright_replica_ready) == 0"
        " or max by (server) (marwright_gateway_up) == 0",
        30,
        "page",
        "The server {{ $labels.server }} answers nobody: marwright status says whether its"
        " supervisor starts it again; where that was killed, marwright serve adopts or starts it",
    )
    yield Alert(
        "MarwrightNotReady",
        "min by (server) (marwright_server_ready) == 0"
        " or min by (server) (marwright_replica_ready) == 0",
        5 * MINUTE,
        "ticket",
        "The server {{ $labels.server }} is up, and not all that is wanted of it is ready:"
        " marwright status names the version or the replica",
    )
    window = times.window(15 * MINUTE)
    yield Alert(
        "MarwrightServerRestarts",
        f"sum by (server) (increase(marwright_server_restarts_total{window})) >= 2",
        0,
        "page",
        "The server {{ $labels.server }} was started again {{ $value | humanize }} times in a short"
        " time, and lost what it held each time: marwright logs --level error",
    )
    yield Alert(
        "MarwrightWorkerRestarts",
        f"sum by ({VERSION}) (increase(marwright_worker_restarts_total{window})) >= 3",
        0,
        "ticket",
        "Workers of {{ $labels.model }} {{ $labels.version }} ended {{ $value | humanize }} times"
        " in a short time: marwright logs --model {{ $labels.model }} --level error;"
        " marwright rollback if the version is new",
    )


def _watch_budget(deployment: Deployment) -> Iterator[Alert]:
    """Multi-window, multi-burn-rate alerts: how fast the failures of 30 days are used up.

    The factors and windows are those of Google's SRE workbook, chapter 5.
    """
    budget = 1 - deployment.monitoring.targets.availability / 100

    def burn(factor: float, long: str, short: str) -> str:
        ratio, limit = (
            "model:marwright_http_failures:ratio_rate",
            min(factor * budget, LARGEST_SHARE),
        )
        return (
            f"({ratio}{long} > {limit:.6g} and {ratio}{short} > {limit:.6g}"
            f" and model:marwright_http_failures:increase{long} >= {LEAST_FAILURES})"
        )

    yield Alert(
        "MarwrightErrorBudgetBurnFast",
        f"{burn(14.4, '1h', '5m')} or {burn(6, '6h', '30m')}",
        0,
        "page",
        "{{ $labels.model }} fails {{ $value | humanizePercentage }} of its requests with 5xx:"
        " marwright logs --model {{ $labels.model }} --level error; marwright rollback if it began"
        " with a release",
    )
    yield Alert(
        "MarwrightErrorBudgetBurnSlow",
        f"{burn(3, '1d', '2h')} or {burn(1, '3d', '6h')}",
        0,
        "ticket",
        "{{ $labels.model }} fails {{ $value | humanizePercentage }} of its requests with 5xx, more"
        " than it may over 30 days: marwright logs --model {{ $labels.model }} --level error",
    )


def _watch_versions(deployment: Deployment, times: Times) -> Iterator[Alert]:
    target = deployment.monitoring.targets.p99_seconds
    yield Alert(
        "MarwrightLatencyHigh",
        f"version:marwright_http_request_seconds:p99_5m >= {target:g}"
        f" and version:marwright_http_requests:increase5m >= {LEAST_REQUESTS}",
        2 * MINUTE,
        "page",
        "One request in 100 to {{ $labels.model }} {{ $labels.version }} takes"
        " {{ $value | humanizeDuration }} or more: see in marwright top whether they wait or the"
        " model is slow; more workers, or less traffic",
    )
    window = times.window(5 * MINUTE)
    ahead = times.shrink(10 * MINUTE)
    yield Alert(
        "MarwrightQueueGrowing",
        f"(min_over_time(marwright_queue_length{window}) > 0"
        f" and predict_linear(marwright_queue_length{window}, {ahead:g})"
        " > marwright_queue_length + marwright_queue_room)"
        f" or max_over_time(marwright_queue_room{times.window(MINUTE)}) == 0",
        MINUTE,
        "page",
        "The queue of {{ $labels.model }} {{ $labels.version }} is full, or will be within minutes;"
        " then requests are refused: marwright models scale {{ $labels.model }} for more workers",
    )
    yield _watch_memory(times)
    yield Alert(
        "MarwrightVersionWithoutWorkers",
        f"sum by ({VERSION}) (marwright_workers_wanted) > 0"
        f" unless sum by ({VERSION}) (marwright_workers_ready) > 0",
        MINUTE,
        "page",
        "{{ $labels.model }} {{ $labels.version }} has no worker and answers 503: marwright status"
        " shows the worker's traceback; marwright rollback if the version is new",
    )


def _watch_memory(times: Times) -> Alert:
    memory = f"sum by ({VERSION}) (deriv(marwright_worker_memory_bytes%s)) * {times.shrink(HOUR):g}"
    size = f"sum by ({VERSION}) (marwright_worker_memory_bytes)"
    long, short = times.window(HOUR), times.window(10 * MINUTE)
    # Both windows, as for the error budget: what a start or more workers take is no growth, and
    # has left the short one soon.
    return Alert(
        "MarwrightMemoryGrowing",
        f"{memory % long} > 0.1 * {size} and {memory % short} > 0.1 * {size}",
        15 * MINUTE,
        "ticket",
        "The workers of {{ $labels.model }} {{ $labels.version }} grow by"
        " {{ $value | humanize1024 }}B an hour: set memory_limit of its entry in"
        " deploy.yaml, which renews them, and look for what the handler keeps",
    )


def _watch_data(deployment: Deployment, times: Times) -> Iterator[Alert]:
    yield Alert(
        "MarwrightDrift",
        f"max by ({VERSION}) (marwright_drift_detected) == 1",
        5 * MINUTE,
        "ticket",
        "The requests of {{ $labels.model }} {{ $labels.version }} are not those it was trained"
        " for: marwright drift names what has shifted",
    )
    monitoring = deployment.monitoring
    share = monitoring.predictions.share / 100 if monitoring.predictions else 0.0
    # So many answers that one of them must have been logged, but for one chance in a million.
    # Explanations are among them, and are not logged: their status is all that is known.
    enough = 1 if share >= 1 else math.ceil(math.log(1e-6) / math.log1p(-max(share, 1e-4)))
    window = times.window(15 * MINUTE)
    log_age = times.shrink(15 * MINUTE)
    drift_age = max(log_age, 3 * monitoring.drift.every_seconds)
    yield Alert(
        "MarwrightDataStale",
        f"(time() - max by ({VERSION}) (marwright_prediction_timestamp_seconds) > {log_age:g}"
        f" or time() - max by ({VERSION}) (marwright_drift_timestamp_seconds) > {drift_age:g})"
        f" and on ({VERSION}) sum by ({VERSION}) (increase({ANSWERED}{window})) >= {enough}",
        MINUTE,
        "ticket",
        "{{ $labels.model }} {{ $labels.version }} is asked, and its prediction log or its drift is"
        " {{ $value | humanizeDuration }} old: what marwright monitor up says on its standard error"
        " names the reason",
    )
    yield Alert(
        "MarwrightPredictionsLost",
        f"sum by ({VERSION}) (increase(marwright_predictions_lost_total{window})) >= 1",
        0,
        "ticket",
        "{{ $value | humanize }} predictions of {{ $labels.model }} {{ $labels.version }} could not"
        " be logged; serving goes on: look for a full disk below monitoring.predictions.folder",
    )


def _watch_releases(deployment: Deployment, times: Times) -> Iterator[Alert]:
    canary = deployment.releases.canary
    slower = max(canary.slower, LEAST_SLOWER)
    match = f"on ({MODEL}) group_left ()"
    errors, requests = "marwright_http_failures", "marwright_http_requests:increase5m"
    yield Alert(
        "MarwrightCanaryWorse",
        f"(candidate:{errors}:excess5m > {canary.errors:g} + {DEVIATIONS:g}"
        f" * candidate:{errors}:deviation5m"
        f" and candidate:{errors}:increase5m >= {LEAST_CANARY_FAILURES})"
        f" or (candidate:marwright_http_request_seconds:p95_5m > {match}"
        f" ({slower:g} * stable:marwright_http_request_seconds:p95_5m)"
        f" and candidate:{requests} >= {LEAST_REQUESTS}"
        f" and on ({MODEL}) stable:{requests} >= {LEAST_REQUESTS})",
        MINUTE,
        "page",
        "{{ $labels.model }} {{ $labels.version }}, the candidate, fails more or is slower than the"
        " stable version: marwright rollback {{ $labels.model }}",
    )
    yield Alert(
        "MarwrightReleaseStuck",
        f"time() - max by ({VERSION}) (marwright_release_begun_timestamp_seconds)"
        f" > {times.shrink(2 * HOUR):g} and on ({VERSION}) marwright_release_open == 1",
        0,
        "ticket",
        "The release of {{ $labels.model }} {{ $labels.version }} is open for"
        " {{ $value | humanizeDuration }}: the same marwright release finishes it, marwright"
        " rollback takes it back",
    )
