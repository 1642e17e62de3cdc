"""Every metric there is: the endpoint, the alert rules, the dashboards and the docs have them here.

Names follow Prometheus' rules: base units, `_total` for counters, `_seconds`, `_bytes`, `_ratio`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FAMILIES", "Family", "find_family", "LABEL_LIMIT"]

Kind = Literal["counter", "gauge", "histogram"]
Origin = Literal["supervisor", "door", "handler", "gateway", "monitor"]

LABEL_LIMIT = 200
"""Most values of one label that a server does not choose itself: class names, drift subjects."""


@dataclass(frozen=True)
class Family:
    """One metric."""

    name: str
    """As it stands in a query; of a histogram without _bucket, _sum and _count."""
    kind: Kind
    labels: tuple[str, ...]
    """What tells its series apart; behind a gateway `replica` comes besides."""
    origin: Origin
    """supervisor: what it sees of processes and of the management API. door: TorchServe's HTTP
    pipeline. handler: in the workers. gateway: the site. monitor: `marwright monitor`, by a file.
    """
    help: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))


VERSION = ("model", "version")

FAMILIES = (
    # The server.
    Family(
        "marwright_build_info",
        "gauge",
        ("marwright", "torchserve", "torch"),
        "supervisor",
        "1; the labels are the versions that run.",
    ),
    Family(
        "marwright_server_up",
        "gauge",
        (),
        "supervisor",
        "1 where TorchServe runs and answers, else 0.",
    ),
    Family(
        "marwright_server_ready",
        "gauge",
        (),
        "supervisor",
        "1 where every wanted version has its workers and answers, else 0.",
    ),
    Family(
        "marwright_server_restarts_total",
        "counter",
        (),
        "supervisor",
        "Times that the server was started again because it had failed.",
    ),
    Family(
        "marwright_server_memory_bytes",
        "gauge",
        (),
        "supervisor",
        "Resident memory of the Java process.",
    ),
    Family(
        "marwright_server_cpu_seconds_total",
        "counter",
        (),
        "supervisor",
        "CPU time of the Java process.",
    ),
    Family(
        "marwright_scrape_errors_total",
        "counter",
        ("source",),
        "supervisor",
        "Times that a part of these metrics could not be read.",
    ),
    Family(
        "marwright_series_dropped_total",
        "counter",
        ("family",),
        "supervisor",
        "Series that scrapes left out: too many values of a label, or no metric of this table.",
    ),
    # Models and workers.
    Family(
        "marwright_model_ready",
        "gauge",
        VERSION,
        "supervisor",
        "1 where the version has its workers and answers, else 0.",
    ),
    Family(
        "marwright_model_default",
        "gauge",
        VERSION,
        "supervisor",
        "1 where the version answers requests that name none, else 0.",
    ),
    Family(
        "marwright_workers_wanted", "gauge", VERSION, "supervisor", "Workers that are configured."
    ),
    Family(
        "marwright_workers_ready", "gauge", VERSION, "supervisor", "Workers that can take requests."
    ),
    Family(
        "marwright_worker_restarts_total",
        "counter",
        VERSION,
        "supervisor",
        "Workers that ended although nobody asked for it, and were replaced.",
    ),
    Family(
        "marwright_worker_memory_bytes",
        "gauge",
        VERSION,
        "supervisor",
        "Resident memory of all workers.",
    ),
    Family(
        "marwright_worker_cpu_seconds_total",
        "counter",
        VERSION,
        "supervisor",
        "CPU time of all workers.",
    ),
    Family(
        "marwright_queue_length",
        "gauge",
        VERSION,
        "supervisor",
        "Requests that wait for a worker.",
    ),
    Family(
        "marwright_queue_room",
        "gauge",
        VERSION,
        "supervisor",
        "Requests that may wait besides; at 0 further ones are refused.",
    ),
    # Requests.
    Family(
        "marwright_http_requests_total",
        "counter",
        (*VERSION, "status"),
        "door",
        "Predictions and explanations over HTTP, by the status that they were answered with.",
    ),
    Family(
        "marwright_http_request_seconds",
        "histogram",
        VERSION,
        "door",
        "From a request's head to the last byte of its answer.",
    ),
    Family(
        "marwright_queue_seconds_total",
        "counter",
        VERSION,
        "door",
        "Time that requests waited for a worker, all together.",
    ),
    Family(
        "marwright_requests_total",
        "counter",
        (*VERSION, "status"),
        "handler",
        "Requests that the handler answered, gRPC included.",
    ),
    Family(
        "marwright_stage_seconds",
        "histogram",
        (*VERSION, "stage"),
        "handler",
        "Time of a batch in each stage: decode, preprocess, infer, postprocess.",
    ),
    Family("marwright_batch_size", "histogram", VERSION, "handler", "Requests of one batch."),
    # The prediction log.
    Family(
        "marwright_predictions_logged_total",
        "counter",
        VERSION,
        "handler",
        "Predictions that were written to the prediction log.",
    ),
    Family(
        "marwright_predictions_lost_total",
        "counter",
        VERSION,
        "handler",
        "Predictions that were to be logged and were not: a full disk, a full queue.",
    ),
    Family(
        "marwright_prediction_log_bytes",
        "gauge",
        (),
        "monitor",
        "Size of the prediction log's folder.",
    ),
    Family(
        "marwright_prediction_log_rows_total",
        "counter",
        ("outcome",),
        "monitor",
        "Rows of the spool: kept, malformed, expired, skewed (kept under the time of collection);"
        " dropped: removed for want of room.",
    ),
    Family(
        "marwright_prediction_timestamp_seconds",
        "gauge",
        VERSION,
        "monitor",
        "When the latest logged prediction was made, since the epoch.",
    ),
    # Drift and quality.
    Family(
        "marwright_drift_score",
        "gauge",
        (*VERSION, "test", "subject"),
        "monitor",
        "How far the last window is from the reference, in the test's own measure.",
    ),
    Family(
        "marwright_drift_p_value",
        "gauge",
        (*VERSION, "test", "subject"),
        "monitor",
        "The chance of such a score without a shift, corrected for all comparisons.",
    ),
    Family(
        "marwright_drift_detected",
        "gauge",
        VERSION,
        "monitor",
        "1 where the last window counts as shifted, else 0.",
    ),
    Family(
        "marwright_drift_window_rows",
        "gauge",
        VERSION,
        "monitor",
        "Predictions in the last window.",
    ),
    Family(
        "marwright_drift_timestamp_seconds",
        "gauge",
        VERSION,
        "monitor",
        "When the last window was compared, since the epoch.",
    ),
    Family(
        "marwright_quality_accuracy_ratio",
        "gauge",
        VERSION,
        "monitor",
        "Share of labelled predictions that were right.",
    ),
    Family(
        "marwright_quality_accuracy_lower_ratio",
        "gauge",
        VERSION,
        "monitor",
        "Lower end of its confidence interval (95 %).",
    ),
    Family(
        "marwright_quality_accuracy_upper_ratio",
        "gauge",
        VERSION,
        "monitor",
        "Upper end of its confidence interval (95 %).",
    ),
    Family(
        "marwright_quality_labels",
        "gauge",
        VERSION,
        "monitor",
        "Logged predictions whose true label is known.",
    ),
    # Releases.
    Family(
        "marwright_split_share_ratio",
        "gauge",
        (*VERSION, "arm"),
        "gateway",
        "Share of a model's requests that a version gets; arm shadow: copies of them.",
    ),
    Family("marwright_gateway_up", "gauge", (), "gateway", "1 where nginx runs, else 0."),
    Family(
        "marwright_gateway_restarts_total",
        "counter",
        (),
        "gateway",
        "Times that nginx was started again because it had ended.",
    ),
    Family(
        "marwright_replica_ready",
        "gauge",
        (),
        "gateway",
        "1 where the replica is ready, else 0.",
    ),
    Family(
        "marwright_release_open",
        "gauge",
        (*VERSION, "step"),
        "monitor",
        "1 while a release of the version is neither finished nor taken back.",
    ),
    Family(
        "marwright_release_begun_timestamp_seconds",
        "gauge",
        VERSION,
        "monitor",
        "When the open release began, since the epoch.",
    ),
    # The monitoring itself.
    Family(
        "marwright_monitor_failures_total",
        "counter",
        ("duty",),
        "monitor",
        "Times that a duty of the monitoring failed: collecting, comparing, measuring.",
    ),
)
"""In the order of the endpoint and of the docs."""

_BY_NAME = {name: family for family in FAMILIES for name in (family.name, *family.series)}


def find_family(name: str) -> Family | None:
    """Return the family of a sample's name; None where there is no such metric."""
    return _BY_NAME.get(name)
