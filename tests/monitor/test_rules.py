"""Every alert fires where it is to, and is silent where it is not: asked of promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from marwright.monitor.rules import (
    SAMPLES,
    Alert,
    Recording,
    Times,
    list_alerts,
    list_recordings,
    render_rules,
    show_span,
)
from marwright.server.deployment import Deployment
from marwright.server.metrics.families import find_family
from marwright.server.sections import MonitoringSettings, PredictionSettings, TargetSettings

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool: apt-get install prometheus")

DEPLOYMENT = Deployment(
    monitoring=MonitoringSettings(predictions=PredictionSettings(share=10, folder=Path("/p")))
)
TARGET_LABELS = {"job", "server", "instance", "replica"}
"""What Prometheus and the gateway add to every series."""
VERSION = '{model="cnn",version="1.0"}'


@dataclass(frozen=True)
class Case:
    """Series as promtool takes them, and whether an alert then fires."""

    alert: str
    what: str
    series: dict[str, str]
    at: str
    fires: str = ""
    """The labels of the alert that fires, in braces; "" where none does."""
    minutes: int = 1
    """Between two values, and two looks at the rules."""


def count_requests(ok: str, failed: str, version: str = "1.0") -> dict[str, str]:
    name = f'marwright_http_requests_total{{server="s",model="cnn",version="{version}",status='
    return {f'{name}"200"}}': ok, f'{name}"503"}}': failed}


def label(name: str, version: str = "1.0", **labels: str) -> str:
    more = "".join(f',{key}="{value}"' for key, value in labels.items())
    return f'{name}{{server="s",model="cnn",version="{version}"{more}}}'


def make_latencies(fast: int, slow: int, version: str = "1.0") -> dict[str, str]:
    """Return the series of so many requests a minute below 50 ms, and so many of 1 to 2.5 s."""
    name = "marwright_http_request_seconds_bucket"
    below = {"0.025": 0, "0.05": fast, "0.1": fast, "0.5": fast, "1": fast}
    below |= {"2.5": fast + slow, "+Inf": fast + slow}
    return {label(name, version, le=edge): f"0+{count}x90" for edge, count in below.items()} | {
        label("marwright_http_requests_total", version, status="200"): f"0+{fast + slow}x90"
    }


def make_split(candidate: dict[str, str], stable: dict[str, str]) -> dict[str, str]:
    return {
        **candidate,
        **stable,
        label("marwright_split_share_ratio", "2.0", arm="candidate"): "0.5x90",
        label("marwright_split_share_ratio", "1.0", arm="stable"): "0.5x90",
    }


UP = {'up{job="marwright",server="s"}': "1x90"}
CASES = (
    Case("MarwrightDown", "no answer", {'up{job="marwright",server="s"}': "1x5 0x10"}, "8m", "{}"),
    Case("MarwrightDown", "no Java", {'marwright_server_up{server="s"}': "1x5 0x10"}, "8m", "{}"),
    Case("MarwrightDown", "no nginx", {'marwright_gateway_up{server="s"}': "0x9"}, "8m", "{}"),
    Case(
        "MarwrightDown",
        "no replica",
        {f'marwright_replica_ready{{server="s",replica="{n}"}}': "0x9" for n in (1, 2)},
        "8m",
        "{}",
    ),
    Case("MarwrightDown", "all is well", {**UP, 'marwright_server_up{server="s"}': "1x90"}, "8m"),
    Case("MarwrightDown", "one missed read", {'up{job="marwright",server="s"}': "1x5 0 1x9"}, "8m"),
    Case(
        "MarwrightDown",
        "one replica of two",
        {f'marwright_replica_ready{{server="s",replica="{n}"}}': f"{n}x9" for n in (0, 1)},
        "8m",
    ),
    Case(
        "MarwrightNotReady",
        "six minutes",
        {'marwright_server_ready{server="s"}': "1x5 0x20"},
        "12m",
        "{}",
    ),
    Case(
        "MarwrightNotReady",
        "one replica of two",
        {f'marwright_replica_ready{{server="s",replica="{n}"}}': f"{n}x20" for n in (0, 1)},
        "12m",
        "{}",
    ),
    Case("MarwrightNotReady", "a start", {'marwright_server_ready{server="s"}': "0x3 1x20"}, "6m"),
    Case(
        "MarwrightServerRestarts",
        "twice",
        {'marwright_server_restarts_total{server="s"}': "0x5 1x3 2x20"},
        "12m",
        "{}",
    ),
    Case(
        "MarwrightServerRestarts",
        "once",
        {'marwright_server_restarts_total{server="s"}': "0x5 1x20"},
        "12m",
    ),
    Case(
        "MarwrightWorkerRestarts",
        "in a loop",
        {label("marwright_worker_restarts_total"): "0x5 0+1x20"},
        "12m",
        VERSION,
    ),
    Case(
        "MarwrightWorkerRestarts",
        "two, and a calm hour",
        {label("marwright_worker_restarts_total"): "0x5 1x2 2x90"},
        "12m",
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "2 % fail for an hour",
        count_requests("0+98x90", "0+2x90"),
        "80m",
        '{model="cnn"}',
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "all fail for two minutes",
        count_requests("0+100x60 6000x30", "0x60 0+100x30"),
        "63m",
        '{model="cnn"}',
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "1 % fail for six hours",
        count_requests("0+99x400", "0+1x400"),
        "390m",
        '{model="cnn"}',
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "0.1 % fail",
        count_requests("0+999x400", "0+1x400"),
        "390m",
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "it is over",
        count_requests("0+98x90", "0x5 0+20x10 200x80"),
        "50m",
    ),
    Case(
        "MarwrightErrorBudgetBurnFast",
        "one of two requests an hour fails",
        count_requests("0x30 1x60", "0x20 1x70"),
        "40m",
    ),
    Case(
        "MarwrightErrorBudgetBurnSlow",
        "0.4 % fail for a day",
        count_requests("0+9960x150", "0+40x150"),
        "1450m",
        '{model="cnn"}',
        minutes=10,
    ),
    Case(
        "MarwrightErrorBudgetBurnSlow",
        "0.2 % fail for three days",
        count_requests("0+9980x440", "0+20x440"),
        "4350m",
        '{model="cnn"}',
        minutes=10,
    ),
    Case(
        "MarwrightErrorBudgetBurnSlow",
        "0.05 % fail",
        count_requests("0+19990x150", "0+10x150"),
        "1450m",
        minutes=10,
    ),
    Case(
        "MarwrightErrorBudgetBurnSlow",
        "three of a hundred requests a day fail",
        count_requests("0x70 100x80", "0x80 3x70"),
        "1450m",
        minutes=10,
    ),
    Case("MarwrightLatencyHigh", "2 % are slow", make_latencies(980, 20), "15m", VERSION),
    Case("MarwrightLatencyHigh", "0.5 % are slow", make_latencies(995, 5), "15m"),
    Case("MarwrightLatencyHigh", "one of ten requests", make_latencies(1, 1), "15m"),
    Case(
        "MarwrightQueueGrowing",
        "full in five minutes",
        {
            label("marwright_queue_length"): "0x5 5+5x60",
            label("marwright_queue_room"): "100x5 95-5x60",
        },
        "19m",
        VERSION,
    ),
    Case(
        "MarwrightQueueGrowing",
        "full",
        {label("marwright_queue_length"): "100x60", label("marwright_queue_room"): "0x60"},
        "16m",
        VERSION,
    ),
    Case(
        "MarwrightQueueGrowing",
        "half full, and stays so",
        {
            label("marwright_queue_length"): "50 52 48 51 49 50 52 48 51 49 50 52 48 51 49 50x20",
            label("marwright_queue_room"): "50x60",
        },
        "12m",
    ),
    Case(
        "MarwrightQueueGrowing",
        "full for a moment",
        {
            label("marwright_queue_length"): "0x5 100 0x60",
            label("marwright_queue_room"): "9x5 0 9x9",
        },
        "7m",
    ),
    Case(
        "MarwrightMemoryGrowing",
        "a third an hour",
        {label("marwright_worker_memory_bytes"): "3e8+2e6x120"},
        "90m",
        VERSION,
    ),
    Case(
        "MarwrightMemoryGrowing",
        "another worker",
        {label("marwright_worker_memory_bytes"): "3e8x60 6e8x60"},
        "80m",
    ),
    Case(
        "MarwrightMemoryGrowing",
        "a twentieth an hour",
        {label("marwright_worker_memory_bytes"): "3e8+25e4x120"},
        "90m",
    ),
    Case(
        "MarwrightVersionWithoutWorkers",
        "none of two",
        {label("marwright_workers_wanted"): "2x20", label("marwright_workers_ready"): "2x5 0x15"},
        "9m",
        VERSION,
    ),
    Case(
        "MarwrightVersionWithoutWorkers",
        "never registered",
        {label("marwright_workers_wanted"): "2x20"},
        "9m",
        VERSION,
    ),
    Case(
        "MarwrightVersionWithoutWorkers",
        "one of two",
        {label("marwright_workers_wanted"): "2x20", label("marwright_workers_ready"): "1x20"},
        "9m",
    ),
    Case(
        "MarwrightVersionWithoutWorkers",
        "none is wanted",
        {label("marwright_workers_wanted"): "0x20", label("marwright_workers_ready"): "0x20"},
        "9m",
    ),
    Case(
        "MarwrightVersionWithoutWorkers",
        "in one replica of two",
        {
            label("marwright_workers_wanted", replica="1"): "1x20",
            label("marwright_workers_wanted", replica="2"): "1x20",
            label("marwright_workers_ready", replica="1"): "1x20",
            label("marwright_workers_ready", replica="2"): "0x20",
        },
        "9m",
    ),
    Case(
        "MarwrightDrift",
        "six windows",
        {label("marwright_drift_detected"): "0x5 1x20"},
        "12m",
        VERSION,
    ),
    Case("MarwrightDrift", "one window", {label("marwright_drift_detected"): "0x5 1 0x20"}, "12m"),
    Case(
        "MarwrightDataStale",
        "an old log",
        {
            label("marwright_prediction_timestamp_seconds"): "60x60",
            **count_requests("0+50x60", "0x60"),
        },
        "30m",
        VERSION,
    ),
    Case(
        "MarwrightDataStale",
        "an old window",
        {
            label("marwright_prediction_timestamp_seconds"): "0+60x60",
            label("marwright_drift_timestamp_seconds"): "60x60",
            **count_requests("0+50x60", "0x60"),
        },
        "30m",
        VERSION,
    ),
    Case(
        "MarwrightDataStale",
        "both are fresh",
        {
            label("marwright_prediction_timestamp_seconds"): "0+60x60",
            label("marwright_drift_timestamp_seconds"): "0+60x60",
            **count_requests("0+50x60", "0x60"),
        },
        "30m",
    ),
    Case(
        "MarwrightDataStale",
        "a handler that fails each request",
        {
            label("marwright_prediction_timestamp_seconds"): "60x60",
            label("marwright_drift_timestamp_seconds"): "60x60",
            **count_requests("50x60", "0+50x60"),
        },
        "30m",
    ),
    Case(
        "MarwrightDataStale",
        "so few requests that none may have been logged",
        {
            label("marwright_prediction_timestamp_seconds"): "60x60",
            **count_requests("0+5x60", "0x60"),
        },
        "30m",
    ),
    Case(
        "MarwrightPredictionsLost",
        "two are lost",
        {label("marwright_predictions_lost_total"): "0x5 2x10"},
        "8m",
        VERSION,
    ),
    Case(
        "MarwrightPredictionsLost",
        "none since long",
        {label("marwright_predictions_lost_total"): "0x5 2x60"},
        "50m",
    ),
    Case(
        "MarwrightCanaryWorse",
        "a tenth of its requests fail",
        make_split(count_requests("0+90x60", "0+10x60", "2.0"), count_requests("0+100x60", "0x60")),
        "20m",
        '{model="cnn",version="2.0"}',
    ),
    Case(
        "MarwrightCanaryWorse",
        "twice as slow",
        make_split(make_latencies(900, 100, "2.0"), make_latencies(1000, 0)),
        "20m",
        '{model="cnn",version="2.0"}',
    ),
    Case(
        "MarwrightCanaryWorse",
        "both fail alike",
        make_split(
            count_requests("0+90x60", "0+10x60", "2.0"), count_requests("0+90x60", "0+10x60")
        ),
        "20m",
    ),
    Case(
        "MarwrightCanaryWorse",
        "the stable one is worse",
        make_split(count_requests("0+100x60", "0x60", "2.0"), count_requests("0+9x60", "0+90x60")),
        "20m",
    ),
    Case(
        "MarwrightCanaryWorse",
        "one of two requests fails",
        make_split(
            count_requests("0x15 1x60", "0x15 1x60", "2.0"), count_requests("0+90x60", "0x60")
        ),
        "17m",
    ),
    Case(
        "MarwrightCanaryWorse",
        "no split",
        {**count_requests("0+9x60", "0+90x60", "2.0"), **count_requests("0+90x60", "0x60")},
        "20m",
    ),
    Case(
        "MarwrightReleaseStuck",
        "three hours",
        {
            label("marwright_release_open", step="canary 50 %"): "1x300",
            label("marwright_release_begun_timestamp_seconds"): "60x300",
        },
        "181m",
        VERSION,
    ),
    Case(
        "MarwrightReleaseStuck",
        "an hour",
        {
            label("marwright_release_open", step="canary 50 %"): "1x300",
            label("marwright_release_begun_timestamp_seconds"): "60x300",
        },
        "61m",
    ),
)


def render_case(case: Case) -> dict[str, Any]:
    """Return one of promtool's tests: which alerts fire then, by their labels."""
    selector = f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}'
    labels = ", ".join(re.findall(r"(\w+)=", case.fires)) or "alertstate"
    expected = case.fires if case.fires != "{}" else '{alertstate="firing"}'
    return {
        "name": f"{case.alert}: {case.what}",
        "interval": f"{case.minutes}m",
        "input_series": [{"series": key, "values": text} for key, text in case.series.items()],
        "promql_expr_test": [
            {
                "expr": f"count by ({labels}) ({selector})",
                "eval_time": case.at,
                "exp_samples": [{"labels": expected, "value": 1}] if case.fires else [],
            }
        ],
    }


def run_promtool(folder: Path, cases: tuple[Case, ...]) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yml").write_text(render_rules(DEPLOYMENT))
    tests = {
        "rule_files": ["rules.yml"],
        "group_eval_order": ["marwright", "marwright-long", "marwright-alerts"],
        "evaluation_interval": f"{max(case.minutes for case in cases)}m",
        "tests": [render_case(case) for case in cases],
    }
    (folder / "tests.yml").write_text(yaml.safe_dump(tests, sort_keys=False))
    return subprocess.run(
        [str(PROMTOOL), "test", "rules", "tests.yml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def list_names() -> list[str]:
    return [alert.name for alert in list_alerts(DEPLOYMENT, Times())]


@needs_promtool
@pytest.mark.parametrize("name", list_names())
def test_each_alert_fires_where_it_is_to_and_is_silent_where_not(name: str, tmp_path: Path) -> None:
    cases = tuple(case for case in CASES if case.alert == name)
    done = run_promtool(tmp_path, cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    for fires in (True, False):
        assert {case.alert for case in CASES if bool(case.fires) is fires} == set(list_names())


@needs_promtool
def test_a_case_that_expects_the_wrong_thing_is_noticed(tmp_path: Path) -> None:
    wrong = Case("MarwrightDown", "nothing is wrong", UP, "8m", "{}")
    assert run_promtool(tmp_path, (wrong,)).returncode == 1


@needs_promtool
@pytest.mark.parametrize("scale", [1, 7, 60, 720])
def test_promtool_has_no_complaint_at_any_scale(scale: float, tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(render_rules(DEPLOYMENT, scale=scale))
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(list_names()) + len(list_recordings(Times(scale)))
    assert f"{count} rules found" in done.stdout


def list_expressions() -> list[str]:
    times = Times()
    rules: list[Alert | Recording] = [
        *list_alerts(DEPLOYMENT, times),
        *list_recordings(times),
    ]
    return [rule.expression for rule in rules]


def test_no_rule_names_a_metric_that_does_not_exist() -> None:
    recorded = {recording.name for recording in list_recordings(Times())}
    for expression in list_expressions():
        bare = re.sub(r'"[^"]*"', "", expression)
        named = set(re.findall(r"[A-Za-z_][\w:]*", bare))
        assert all(name in recorded for name in named if ":" in name), expression
        metrics = [name for name in named if name.startswith("marwright") and ":" not in name]
        assert all(find_family(name) for name in metrics), expression


def test_every_recording_is_used() -> None:
    text = "\n".join(list_expressions())
    for recording in list_recordings(Times()):
        assert recording.name in text


def test_no_rule_names_a_label_that_the_metric_does_not_have() -> None:
    looked = 0
    for expression in list_expressions():
        for name, labels in re.findall(r"(marwright_\w+)\{([^}]*)\}", expression):
            looked += 1
            assert set(re.findall(r"(\w+)=", labels)) <= allow(name), expression
        for labels, name in re.findall(r"by \(([^)]*)\) \((?:\w+\()?(marwright_\w+)", expression):
            looked += 1
            assert set(labels.split(", ")) <= allow(name), expression
    assert looked > 40


def allow(name: str) -> set[str]:
    family = find_family(name)
    assert family is not None
    edges = {"le"} if name.endswith("_bucket") else set()
    return {*family.labels, *TARGET_LABELS, *edges}


def test_a_summary_fills_in_labels_that_its_alert_has() -> None:
    for alert in list_alerts(DEPLOYMENT, Times()):
        names = re.findall(r"marwright_\w+", alert.expression)
        families = [family for name in names if (family := find_family(name))]
        known = {"server", *(name for family in families for name in family.labels)}
        if ":" in alert.expression:  # what is recorded is by model, or by version
            by_version = re.search("(version|candidate):", alert.expression)
            known |= {"model", "version"} if by_version else {"model"}
        assert set(re.findall(r"\$labels\.(\w+)", alert.summary)) <= known, alert.name


def test_a_summary_says_what_to_do() -> None:
    for alert in list_alerts(DEPLOYMENT, Times()):
        assert re.search(r": (\w+ ){0,6}marwright |: (look|set|the same) ", alert.summary), alert


def test_thresholds_are_those_of_the_deployment() -> None:
    targets = TargetSettings(availability=99.5, p99_seconds=0.25)
    deployment = Deployment(monitoring=MonitoringSettings(targets=targets))
    rules = {alert.name: alert.expression for alert in list_alerts(deployment, Times())}
    assert "p99_5m >= 0.25" in rules["MarwrightLatencyHigh"]
    assert "ratio_rate1h > 0.072" in rules["MarwrightErrorBudgetBurnFast"]
    assert "ratio_rate3d > 0.005" in rules["MarwrightErrorBudgetBurnSlow"]


def test_a_low_target_still_has_a_rate_of_failures_that_is_too_high() -> None:
    deployment = Deployment(monitoring=MonitoringSettings(targets=TargetSettings(availability=80)))
    rules = {alert.name: alert.expression for alert in list_alerts(deployment, Times())}
    assert "ratio_rate1h > 0.5 " in rules["MarwrightErrorBudgetBurnFast"]


def test_a_scale_divides_windows_and_holds_and_leaves_room_for_scrapes() -> None:
    times = Times(60)
    assert (times.span(120), times.window(3600)) == ("2s", "[1m]")
    assert times.window(60) == f"[{show_span(SAMPLES * times.scrape_seconds)}]"
    assert Times().window(300) == "[5m]"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.05, "50ms"), (5, "5s"), (300, "5m"), (7200, "2h"), (259_200, "3d"), (90, "90s")],
)
def test_durations_are_prometheus_own(seconds: float, shown: str) -> None:
    assert show_span(seconds) == shown
