"""What the panels of Grafana's dashboard show, and of which metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass

from marwright.server.metrics.families import Family, find_family

__all__ = ["find_metric", "METRIC", "Panel", "ROWS", "States"]

METRIC = re.compile(r"\b(marwright_\w+)(?:\{([^}]*)\})?")
"""In the expressions below: a metric, and what is asked of its labels there."""


@dataclass(frozen=True)
class States:
    """What 0 and 1 mean on a panel."""

    no: str
    yes: str
    good: int = 1


@dataclass(frozen=True)
class Panel:
    """One panel; what the variables choose is added to its expressions."""

    title: str
    queries: tuple[tuple[str, str], ...]
    """Expression and legend of each line."""
    unit: str = "short"
    width: int = 8
    kind: str = "timeseries"
    states: States | None = None
    steps: tuple[tuple[float, str], ...] = ()
    """From which value on it has which colour."""
    units: tuple[str, ...] = ()
    """Of a table's columns, which are its queries."""

    @property
    def families(self) -> list[Family]:
        """What it is made from, each once."""
        names = [match[1] for text, _ in self.queries for match in METRIC.finditer(text)]
        return list({family.name: family for family in map(find_metric, names)}.values())


def find_metric(name: str) -> Family:
    """Return the family of a metric that a panel names; raises LookupError where there is none."""
    family = find_family(name)
    if family is None:
        raise LookupError(f"no metric has the name {name}")
    return family


def _rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}[$__rate_interval]))"


def _growth(name: str, by: str) -> str:
    return f"sum by ({by}) (increase({name}[$__rate_interval]))"


def _share_of_errors(by: str) -> str:
    """Return the share of requests that failed; 0 where there were requests and no such series."""
    all_of_them = _rate("marwright_http_requests_total", by)
    failed = _rate('marwright_http_requests_total{status=~"5.."}', by)
    return f"({failed} or 0 * {all_of_them}) / {all_of_them}"


def _quantile(share: float, by: str) -> str:
    return f"histogram_quantile({share}, {_rate('marwright_http_request_seconds_bucket', by)})"


def _mean(histogram: str, by: str) -> str:
    return f"{_rate(f'{histogram}_sum', by)} / {_rate(f'{histogram}_count', by)}"


ONE = "{{instance}} {{replica}}"
"""A server's legend."""
BOTH = "{{model}} {{version}}"
"""A version's legend."""
PLACE = "instance, replica"
PAIR = "model, version"
UP = States("down", "up")
READY = States("not ready", "ready")
ERRORS = ((0.001, "yellow"), (0.01, "red"))
SERVER_ROW = (
    Panel("Up", (("marwright_server_up", ONE),), "none", 4, "stat", UP),
    Panel("Ready", (("marwright_server_ready", ONE),), "none", 4, "stat", READY),
    Panel("Gateway", (("marwright_gateway_up", "{{instance}}"),), "none", 4, "stat", UP),
    Panel("Replicas", (("marwright_replica_ready", ONE),), "none", 4, "stat", READY),
    Panel(
        "Software",
        (("marwright_build_info", "{{marwright}}, TorchServe {{torchserve}}, torch {{torch}}"),),
        "none",
        8,
        "names",
    ),
    Panel(
        "Memory",
        (
            ("marwright_server_memory_bytes", f"Java {ONE}"),
            (f"sum by ({PLACE}) (marwright_worker_memory_bytes)", f"workers {ONE}"),
        ),
        "bytes",
    ),
    Panel(
        "CPU, cores in use",
        (
            (_rate("marwright_server_cpu_seconds_total", PLACE), f"Java {ONE}"),
            (_rate("marwright_worker_cpu_seconds_total", PLACE), f"workers {ONE}"),
        ),
    ),
    Panel(
        "Restarts",
        (
            (_growth("marwright_server_restarts_total", PLACE), f"server {ONE}"),
            (_growth("marwright_gateway_restarts_total", "instance"), "gateway {{instance}}"),
        ),
        steps=((1, "red"),),
    ),
    Panel(
        "Metrics that could not be read",
        ((_growth("marwright_scrape_errors_total", f"{PLACE}, source"), f"{{{{source}}}}: {ONE}"),),
        width=12,
        steps=((1, "red"),),
    ),
    Panel(
        "Series that were left out",
        ((_growth("marwright_series_dropped_total", f"{PLACE}, family"), "{{family}}"),),
        width=12,
        steps=((1, "red"),),
    ),
)
MODEL_ROW = (
    Panel("Requests", ((_rate("marwright_http_requests_total", "model"), "{{model}}"),), "reqps"),
    Panel(
        "Answers by status",
        ((_rate("marwright_http_requests_total", "status"), "{{status}}"),),
        "reqps",
    ),
    Panel(
        "Share of answers that are 5xx",
        ((_share_of_errors("model"), "{{model}}"),),
        "percentunit",
        steps=ERRORS,
    ),
    Panel(
        "Latency",
        tuple(
            (_quantile(share, "le, model"), f"{{{{model}}}} p{share * 100:.0f}")
            for share in (0.5, 0.95, 0.99)
        ),
        "s",
    ),
    Panel(
        "Time of a batch in each stage",
        ((_mean("marwright_stage_seconds", "stage"), "{{stage}}"),),
        "s",
    ),
    Panel(
        "Wait for a worker",
        (
            (
                f"{_rate('marwright_queue_seconds_total', 'model')}"
                f" / {_rate('marwright_http_requests_total', 'model')}",
                "{{model}}",
            ),
        ),
        "s",
    ),
    Panel(
        "Queue",
        (
            (f"sum by ({PAIR}) (marwright_queue_length)", f"{BOTH}: wait"),
            (f"sum by ({PAIR}) (marwright_queue_room)", f"{BOTH}: room"),
        ),
    ),
    Panel("Requests in a batch", ((_mean("marwright_batch_size", PAIR), BOTH),)),
    Panel(
        "Answers of the handler, by status",
        ((_rate("marwright_requests_total", "status"), "{{status}}"),),
        "reqps",
    ),
    Panel(
        "Workers",
        (
            (f"sum by ({PAIR}) (marwright_workers_ready)", f"{BOTH}: ready"),
            (f"sum by ({PAIR}) (marwright_workers_wanted)", f"{BOTH}: wanted"),
        ),
    ),
    Panel(
        "Workers replaced",
        ((_growth("marwright_worker_restarts_total", PAIR), BOTH),),
        steps=((1, "red"),),
    ),
    Panel(
        "Workers' memory", ((f"sum by ({PAIR}) (marwright_worker_memory_bytes)", BOTH),), "bytes"
    ),
)
COMPARISON_ROW = (
    Panel(
        "Versions now",
        (
            (f"max by ({PAIR}) (marwright_model_default)", "default"),
            (f'max by ({PAIR}) (marwright_split_share_ratio{{arm!="shadow"}})', "share"),
            (_rate("marwright_http_requests_total", PAIR), "requests"),
            (_share_of_errors(PAIR), "5xx"),
            (_quantile(0.5, f"le, {PAIR}"), "p50"),
            (_quantile(0.99, f"le, {PAIR}"), "p99"),
            (f"max by ({PAIR}) (marwright_quality_accuracy_ratio)", "accuracy"),
            (f"max by ({PAIR}) (marwright_drift_detected)", "drift"),
        ),
        width=24,
        kind="table",
        units=("none", "percentunit", "reqps", "percentunit", "s", "s", "percentunit", "none"),
    ),
    Panel(
        "Ready",
        ((f"max by ({PAIR}) (marwright_model_ready)", BOTH),),
        "none",
        6,
        "time",
        READY,
    ),
    Panel(
        "Share of the requests",
        ((f"max by ({PAIR}, arm) (marwright_split_share_ratio)", f"{BOTH} {{{{arm}}}}"),),
        "percentunit",
        6,
    ),
    Panel(
        "Steps of open releases",
        ((f"max by ({PAIR}, step) (marwright_release_open)", f"{BOTH} {{{{step}}}}"),),
        "none",
        6,
        "time",
        States("closed", "open"),
    ),
    Panel(
        "Since open releases began",
        ((f"time() - max by ({PAIR}) (marwright_release_begun_timestamp_seconds)", BOTH),),
        "s",
        6,
    ),
    Panel(
        "Requests of each version", ((_rate("marwright_http_requests_total", PAIR), BOTH),), "reqps"
    ),
    Panel(
        "Share of 5xx of each version",
        ((_share_of_errors(PAIR), BOTH),),
        "percentunit",
        steps=ERRORS,
    ),
    Panel("p99 of each version", ((_quantile(0.99, f"le, {PAIR}"), BOTH),), "s"),
)
DRIFT_ROW = (
    Panel(
        "Shifted",
        ((f"max by ({PAIR}) (marwright_drift_detected)", BOTH),),
        "none",
        8,
        "time",
        States("no shift", "shifted", good=0),
    ),
    Panel("Rows of the last window", (("marwright_drift_window_rows", BOTH),)),
    Panel(
        "Since the last comparison",
        ((f"time() - max by ({PAIR}) (marwright_drift_timestamp_seconds)", BOTH),),
        "s",
    ),
    Panel(
        "Score: the 20 highest",
        (("topk(20, marwright_drift_score)", f"{BOTH} {{{{test}}}} {{{{subject}}}}"),),
        "none",
        12,
    ),
    Panel(
        "Corrected p: the 20 lowest",
        (("bottomk(20, marwright_drift_p_value)", f"{BOTH} {{{{test}}}} {{{{subject}}}}"),),
        "none",
        12,
    ),
)
QUALITY_ROW = (
    Panel(
        "Accuracy, and its interval (95 %)",
        (
            ("marwright_quality_accuracy_ratio", BOTH),
            ("marwright_quality_accuracy_lower_ratio", f"{BOTH} lower"),
            ("marwright_quality_accuracy_upper_ratio", f"{BOTH} upper"),
        ),
        "percentunit",
        16,
    ),
    Panel("Labels that are known", (("marwright_quality_labels", BOTH),)),
    Panel(
        "Predictions logged",
        (
            (_rate("marwright_predictions_logged_total", PAIR), f"{BOTH} logged"),
            (_rate("marwright_predictions_lost_total", PAIR), f"{BOTH} lost"),
        ),
        "cps",
    ),
    Panel(
        "Size of the prediction log", (("marwright_prediction_log_bytes", "{{instance}}"),), "bytes"
    ),
    Panel(
        "What became of the log's rows",
        ((_rate("marwright_prediction_log_rows_total", "outcome"), "{{outcome}}"),),
        "cps",
    ),
    Panel(
        "Duties of the monitoring that failed",
        ((_rate("marwright_monitor_failures_total", "duty"), "{{duty}}"),),
        "cps",
    ),
    Panel(
        "Since the latest logged prediction",
        ((f"time() - max by ({PAIR}) (marwright_prediction_timestamp_seconds)", BOTH),),
        "s",
    ),
)
ROWS = {
    "Server": SERVER_ROW,
    "Model": MODEL_ROW,
    "Version comparison": COMPARISON_ROW,
    "Drift": DRIFT_ROW,
    "Predictions and quality": QUALITY_ROW,
}
"""The panels, from top to bottom."""
