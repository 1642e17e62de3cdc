"""A dashboard for Grafana 10 and 11, made from the table of metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from marwright.monitor.panels import METRIC, ROWS, Panel, find_metric

__all__ = ["render_dashboard"]

SCHEMA_VERSION = 38
"""Of Grafana 10.0; later ones bring a dashboard up to their own, earlier ones know no newer one."""
COLUMNS = 24
"""Of Grafana's grid."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = 'instance=~"$instance"'
REPLICA = 'replica=~"$replica"'
VERSION = 'model=~"$model",version=~"$version"'


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
                "expr": METRIC.sub(_choose, expression),
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
    family = find_metric(match[1])
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
