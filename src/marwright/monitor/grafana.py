"""A dashboard for Grafana 10 and 11, made from the table of metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marwright.server.metrics.families import Family, find_family

__all__ = ["Panel", "render_dashboard", "ROWS"]

SCHEMA_VERSION = 38
"""Of Grafana 10.0; later ones bring a dashboard up to their own, earlier ones know no newer one."""
COLUMNS = 24
"""Of Grafana's grid."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = 'instance=~"$instance"'
REPLICA = 'replica=~"$replica"'
VERSION = 'model=~"$model",version=~"$version"'

_METRIC = re.compile(r"\b(marwright_\w+)(?:\{([^}]*)\})?")
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
        names = [match[1] for text, _ in self.queries for match in _METRIC.finditer(text)]
        return list({family.name: family for family in map(_find, names)}.values())


def _find(name: str) -> Family:
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


def render_dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it, or is provisioned with it."""
    return {
        "uid": "marwright",
        "title": "marwright",
        "description": "Servers, models, their versions side by side, drift and quality.",
        "tags": ["marwright"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "links": [],
        "annotations": {"list": []},
        "templating": {"list": list(_list_variables())},
        "panels": list(_place_panels()),
    }


def _list_variables() -> Iterator[dict[str, Any]]:
    """Yield what is chosen at the top; each but the first offers what the ones before leave."""
    yield {
        "name": "datasource",
        "label": "data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "refresh": 1,
        "regex": "",
        "multi": False,
        "includeAll": False,
        "options": [],
    }
    for name, label, metric, matchers in (
        ("instance", "server", "marwright_server_up", ""),
        ("replica", "replica", "marwright_server_up", f"{{{SERVER}}}"),
        ("model", "model", "marwright_model_ready", f"{{{SERVER}}}"),
        ("version", "version", "marwright_model_ready", f'{{{SERVER},model=~"$model"}}'),
    ):
        query = f"label_values({metric}{matchers}, {name})"
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "qryType": 1, "refId": "variable"},
            "hide": 0,
            "refresh": 2,
            "regex": "",
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",  # also a series without the label: a server behind no gateway
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "options": [],
        }


def _place_panels() -> Iterator[dict[str, Any]]:
    """Yield the rows and their panels, each at its place in the grid."""
    number = top = 0
    for title, panels in ROWS.items():
        number += 1
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": place,
            "panels": [],
        }
        top += 1
        left = height = 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            high = 4 if panel.kind in {"stat", "names"} else 8
            place = {"h": high, "w": panel.width, "x": left, "y": top}
            yield {"id": number, "gridPos": place, **_render_panel(panel)}
            left, height = left + panel.width, max(height, high)
        top += height


def _render_panel(panel: Panel) -> dict[str, Any]:
    is_table = panel.kind == "table"
    return {
        "type": {"names": "stat", "time": "state-timeline"}.get(panel.kind, panel.kind),
        "title": panel.title,
        "description": " ".join(family.help for family in panel.families),
        "datasource": SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": SOURCE,
                "expr": _METRIC.sub(_choose, expression),
                "legendFormat": "" if is_table else legend,
                "format": "table" if is_table else "time_series",
                "instant": is_table,
                "range": not is_table,
                "editorMode": "code",
            }
            for place, (expression, legend) in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _render_field(panel), "overrides": _override(panel)},
        "options": _OPTIONS[panel.kind],
        "transformations": [{"id": "merge", "options": {}}] if is_table else [],
    }


def _choose(match: re.Match[str]) -> str:
    """Return a metric with what the variables choose of it."""
    family = _find(match[1])
    is_of_site = family.origin in {"gateway", "monitor"}  # no replica's own, and in none's choice
    replica = "" if is_of_site else REPLICA
    version = VERSION if "model" in family.labels else ""
    return f"{match[1]}{{{','.join(filter(None, (match[2], SERVER, replica, version)))}}}"


def _render_field(panel: Panel) -> dict[str, Any]:
    """Return how a panel's values are written and coloured."""
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for value, color in panel.steps]
    mappings: list[dict[str, Any]] = []
    if panel.states is not None:
        colors = ("green", "red") if panel.states.good == 0 else ("red", "green")
        words = zip((panel.states.no, panel.states.yes), colors, strict=True)
        options = {
            str(value): {"index": value, "text": text, "color": color}
            for value, (text, color) in enumerate(words)
        }
        mappings = [{"type": "value", "options": options}]
    by_value = panel.kind != "timeseries"
    field: dict[str, Any] = {
        "unit": panel.unit,
        "mappings": mappings,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if by_value else "palette-classic"},
        "custom": _CUSTOM.get(panel.kind, {}),
    }
    if panel.kind == "timeseries":
        style = {"mode": "dashed" if panel.steps else "off"}
        field["custom"] = {**_CUSTOM["timeseries"], "thresholdsStyle": style}
    return field


def _override(panel: Panel) -> list[dict[str, Any]]:
    """Return what the columns of a table are called, and their units."""
    if panel.kind != "table":
        return []
    hide: list[dict[str, Any]] = [{"id": "custom.hidden", "value": True}]
    columns = [("Time", hide)]
    for place, ((_, name), unit) in enumerate(zip(panel.queries, panel.units, strict=True)):
        properties: list[dict[str, Any]] = [
            {"id": "displayName", "value": name},
            {"id": "unit", "value": unit},
        ]
        columns.append((f"Value #{chr(ord('A') + place)}", properties))
    return [
        {"matcher": {"id": "byName", "options": name}, "properties": properties}
        for name, properties in columns
    ]


_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
_STAT = {
    "graphMode": "none",
    "colorMode": "background",
    "justifyMode": "auto",
    "orientation": "auto",
    "textMode": "value_and_name",
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stat": _STAT,
    "names": {**_STAT, "colorMode": "none", "textMode": "name"},
    "time": {
        "showValue": "never",
        "rowHeight": 0.9,
        "mergeValues": True,
        "alignValue": "left",
        "legend": _LEGEND,
        "tooltip": {"mode": "single", "sort": "none"},
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}
_CUSTOM: dict[str, dict[str, Any]] = {
    "timeseries": {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 10,
        "showPoints": "auto",
        "spanNulls": False,
        "axisSoftMin": 0,
    },
    "time": {"lineWidth": 0, "fillOpacity": 80},
    "table": {"align": "auto"},
}
