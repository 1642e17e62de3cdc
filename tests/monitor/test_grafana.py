"""deploy/grafana.json is what the program makes; WRITE_TABLE=1 writes it anew."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until

from marwright.monitor import panels
from marwright.monitor.grafana import render_dashboard
from marwright.monitor.panels import Panel
from marwright.server.metrics.families import FAMILIES, Family, find_family

SITE = {"gateway", "monitor"}
"""Whose series are no replica's; the replicas' readiness is told by the gateway."""
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*", "$replica": ".*", "$model": ".*"}
VARIABLES["$version"] = ".*"
TYPES = {"row", "timeseries", "stat", "state-timeline", "table"}
UNITS = {"s", "bytes", "percentunit", "reqps", "cps", "short", "none"}


def list_panels() -> list[dict[str, Any]]:
    return [panel for panel in render_dashboard()["panels"] if panel["type"] != "row"]


def list_expressions() -> list[str]:
    return [target["expr"] for panel in list_panels() for target in panel["targets"]]


def fill(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def list_labels(family: Family) -> set[str]:
    """What a scraped series of the family may have."""
    replica = set() if family.origin in SITE and "replica_ready" not in family.name else {"replica"}
    return {*family.labels, *replica, "instance"}


def read_metrics(expression: str) -> Iterator[tuple[str, str]]:
    """Yield each metric's name and its matchers."""
    for name, _, matchers in re.findall(r"(\bmarwright_\w+)(\{([^}]*)\})?", expression):
        yield name, matchers


def test_grafanas_own_library_reads_the_dashboard_and_loses_nothing_of_it() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    ours = render_dashboard()
    theirs = json.loads(JSONEncoder().encode(Dashboard.from_json(ours)))
    assert list(find_missing(ours, theirs)) == []
    assert list(find_missing({**ours, "odd": 1}, theirs)) == [".odd"]


def find_missing(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Yield where `theirs` has not what `ours` has; it may have defaults besides."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from find_missing(value, theirs.get(key), f"{place}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from find_missing(*pair, f"{place}[{number}]")
    elif ours != theirs:
        yield place


def test_the_file_is_what_the_program_makes(root: Path) -> None:
    path = root / "deploy/grafana.json"
    text = json.dumps(render_dashboard(), indent=2) + "\n"
    if os.environ.get("WRITE_TABLE"):
        path.write_text(text, encoding="utf-8")
        return
    assert path.read_text("utf-8") == text


def test_every_metric_and_label_of_the_panels_is_in_the_table() -> None:
    for expression in list_expressions():
        read = list(read_metrics(expression))
        assert read, expression
        known: set[str] = {"le"} if "_bucket" in expression else set()
        for name, matchers in read:
            family = find_family(name)
            assert family is not None, name
            assert name in family.series, f"{name} has no such series"
            asked = set(re.findall(r"(\w+)[=!]", matchers))
            assert asked <= list_labels(family), expression
            assert "instance" in asked, expression
            known |= list_labels(family)
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= known, expression


def test_a_legend_names_labels_that_its_series_have() -> None:
    for panel in list_panels():
        for target in panel["targets"]:
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            families = [find_family(name) for name, _ in read_metrics(target["expr"])]
            kept = set(groups[0].split(", ")) if groups else list_labels(families[0])  # type: ignore[arg-type]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target


def test_every_metric_of_the_table_is_on_a_panel() -> None:
    shown = {find_family(name) for text in list_expressions() for name, _ in read_metrics(text)}
    assert shown == set(FAMILIES)


def test_a_panel_of_a_metric_that_does_not_exist_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    panel = Panel("Wishes", (("rate(marwright_wishes_total[5m])", ""),))
    monkeypatch.setitem(panels.ROWS, "Wishes", (panel,))
    with pytest.raises(LookupError, match="marwright_wishes_total"):
        render_dashboard()


def test_panels_say_what_their_metrics_mean() -> None:
    for panel in list_panels():
        for name, _ in (pair for t in panel["targets"] for pair in read_metrics(t["expr"])):
            family = find_family(name)
            assert family is not None
            assert family.help in panel["description"]


def test_no_two_panels_have_one_place_or_one_number() -> None:
    panels = render_dashboard()["panels"]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for x, y in itertools.product(range(place["w"]), range(place["h"])):
            cell = (place["x"] + x, place["y"] + y)
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({y for _, y in taken}) == max(y for _, y in taken) + 1  # no gap between rows


def test_it_has_the_rows_and_the_form_that_grafana_documents() -> None:
    dashboard = render_dashboard()
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == list(panels.ROWS)
    assert {"uid", "title", "schemaVersion", "time", "templating", "annotations"} <= set(dashboard)
    assert "id" not in dashboard  # Grafana's own; a number would overwrite another dashboard
    for panel in dashboard["panels"]:
        assert panel["type"] in TYPES
        if panel["type"] == "row":
            continue
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in UNITS, panel["title"]
        first, *others = defaults["thresholds"]["steps"]
        assert first["value"] is None
        assert [step["value"] for step in others] == sorted(step["value"] for step in others)
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == list("ABCDEFGHIJ")[: len(letters)]


def test_variables_are_declared_before_they_are_used() -> None:
    declared: list[str] = []
    for variable in render_dashboard()["templating"]["list"]:
        text = json.dumps([variable.get("query"), variable.get("datasource")])
        assert set(re.findall(r"\$\{?(\w+)", text)) <= set(declared), variable["name"]
        declared.append(variable["name"])
    assert declared == ["datasource", "instance", "replica", "model", "version"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(render_dashboard()["panels"])))
    assert used == {*declared, "__rate_interval"}


def test_it_is_the_same_each_time() -> None:
    assert json.dumps(render_dashboard()) == json.dumps(render_dashboard())


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    return path


def test_promtool_can_read_every_expression(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{place}", "expr": fill(expression)}
        for place, expression in enumerate(list_expressions())
    ]
    path = tmp_path / "rules.yaml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        [promtool, "check", "rules", path], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


VALUES = {"model": "cnn", "stage": "infer", "source": "door", "family": "x", "arm": "canary"}
VALUES |= {
    "test": "ks",
    "subject": "features.ink",
    "step": "canary 25",
    "duty": "drift",
    "outcome": "kept",
    "marwright": "0.1",
}
VALUES |= {"torchserve": "0.12.0", "torch": "2.9"}


def write_samples(scrape: int) -> str:
    """Return an endpoint's text with two versions and statuses of everything there is."""
    lines = []
    for family in FAMILIES:
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        doubled = [label for label in ("version", "status") if label in family.labels]
        for chosen in itertools.product(
            *({"version": "12", "status": ("200", "500")}[d] for d in doubled)
        ):
            labels = {label: VALUES.get(label, "") for label in family.labels}
            labels.update(zip(doubled, chosen, strict=True))
            if "replica" in list_labels(family):
                labels["replica"] = "1"
            for series in family.series:
                ends = ({"le": "0.1"}, {"le": "+Inf"}) if series.endswith("_bucket") else ({},)
                for end in ends:
                    pairs = ",".join(f'{k}="{v}"' for k, v in {**labels, **end}.items())
                    lines.append(f"{series}{{{pairs}}} {scrape}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Serve metrics of which every counter grows by one with each scrape."""
    scrapes = itertools.count(1)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(write_samples(next(scrapes)).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def ask(
    endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Return a function that asks a real Prometheus that has scraped the endpoint twice."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: Debian's package prometheus has it")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "500ms"},
                "scrape_configs": [
                    {"job_name": "marwright", "static_configs": [{"targets": [endpoint]}]}
                ],
            }
        )
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    command = [program, f"--config.file={folder / 'prometheus.yml'}", "--log.level=error"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]

    def query(path: str, **words: str) -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            data = json.load(answer)["data"]
        return list(data["result"] if path == "query" else data)

    def has_scraped() -> bool:
        try:
            found = query("query", query="min(changes(marwright_http_requests_total[1m]))")
        except OSError:
            return False
        return bool(found) and float(found[0]["value"][1]) >= 2

    process = subprocess.Popen(command)
    try:
        wait_until(has_scraped, timeout=60, what="two scrapes")
        yield query
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_real_prometheus_has_something_for_every_line_of_every_panel(
    ask: Callable[..., list[dict[str, Any]]],
) -> None:
    for target in (target for panel in list_panels() for target in panel["targets"]):
        found = ask("query", query=fill(target["expr"]))
        assert found, target["expr"]
        assert all(series["value"][1] != "NaN" for series in found), target["expr"]
        legends = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"replica"}
        assert all(legends <= set(series["metric"]) for series in found), target["expr"]


def test_a_real_prometheus_has_the_variables_values(
    ask: Callable[..., list[dict[str, Any]]], endpoint: str
) -> None:
    offered = {}
    for variable in render_dashboard()["templating"]["list"][1:]:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert query is not None
        series = ask("series", **{"match[]": fill(query[1])})
        offered[variable["name"]] = {one.get(query[2], "") for one in series}
    assert offered == {
        "instance": {endpoint},
        "replica": {"1"},
        "model": {"cnn"},
        "version": {"1", "2"},
    }


def test_a_share_of_errors_is_nought_where_nothing_failed(
    ask: Callable[..., list[dict[str, Any]]],
) -> None:
    (panel,) = [one for one in list_panels() if one["title"] == "Share of 5xx of each version"]
    expression = fill(panel["targets"][0]["expr"])
    assert {row["value"][1] for row in ask("query", query=expression)} == {"0.5"}
    without = expression.replace("5..", "6..")
    assert {row["value"][1] for row in ask("query", query=without)} == {"0"}
