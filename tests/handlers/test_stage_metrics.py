from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Import = Callable[[str], Any]

# ts leaves its version file open when imported, and the metrics file that it reads.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SIZE = "marwright_batch_size"
STAGE = "marwright_stage_seconds"
REQUESTS = "marwright_requests_total"


class Cache:
    """TorchServe's metrics cache with every name declared; keeps what it is handed."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.calls = 0
        self.lock = threading.Lock()  # TorchServe's prints a line, which needs none

    def get_metric(self, name: str) -> Any:
        cache = self

        class Metric:
            def add_or_update(self, value: float, labels: list[str]) -> None:
                with cache.lock:
                    cache.calls += 1
                    cache.counts[name, tuple(labels)] += value  # type: ignore[assignment]  # seconds

        return Metric()


class Context:
    def __init__(self, metrics: Any) -> None:
        self.metrics = metrics


@pytest.fixture
def cache(handlers: Import, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache that is handed something only by a test's own flush."""
    monkeypatch.setattr(handlers("stage_metrics"), "FLUSH_SECONDS", 3600)
    return Cache()


@pytest.fixture
def metrics(handlers: Import, cache: Cache) -> Any:
    return handlers("stage_metrics").StageMetrics(Context(cache), model="m", version="2.0")


def test_a_batch_is_counted_by_size_stage_and_status(metrics: Any, cache: Cache) -> None:
    metrics.record(2, [("decode", 0.003), ("infer", 0.2)], [200, 422])
    metrics.record(1, [("decode", 0.001), ("infer", 0.1)], [200])
    metrics.flush()
    assert cache.counts[f"{SIZE}_count", ("m", "2.0")] == 2
    assert cache.counts[f"{SIZE}_sum", ("m", "2.0")] == 3
    assert cache.counts[f"{STAGE}_count", ("m", "2.0", "infer")] == 2
    assert cache.counts[f"{STAGE}_sum", ("m", "2.0", "decode")] == pytest.approx(0.004)
    assert cache.counts[REQUESTS, ("m", "2.0", "200")] == 2
    assert cache.counts[REQUESTS, ("m", "2.0", "422")] == 1


def test_buckets_are_cumulative_and_an_edge_belongs_to_its_bucket(
    metrics: Any, cache: Cache
) -> None:
    for size in (1, 2, 3, 8, 1000):
        metrics.record(size, [], [])
    metrics.flush()
    found = {le: cache.counts[f"{SIZE}_bucket", ("m", "2.0", le)] for le in ("1", "2", "4", "8")}
    assert found == {"1": 1, "2": 2, "4": 3, "8": 4}
    assert cache.counts[f"{SIZE}_bucket", ("m", "2.0", "128")] == 4
    assert cache.counts[f"{SIZE}_bucket", ("m", "2.0", "+Inf")] == 5


@pytest.mark.parametrize(
    ("seconds", "edge", "below"),
    [(0.0, "0.0001", ""), (0.0001, "0.0001", ""), (0.0003, "0.0005", "0.00025"), (10, "10", "2.5")],
)
def test_a_stage_falls_into_the_first_bucket_that_holds_it(
    metrics: Any, cache: Cache, seconds: float, edge: str, below: str
) -> None:
    metrics.record(1, [("infer", seconds)], [])
    metrics.flush()
    assert cache.counts[f"{STAGE}_bucket", ("m", "2.0", "infer", edge)] == 1
    assert cache.counts[f"{STAGE}_bucket", ("m", "2.0", "infer", below)] == 0


def test_what_was_handed_over_is_not_handed_over_again(metrics: Any, cache: Cache) -> None:
    metrics.record(1, [("infer", 0.1)], [200])
    metrics.flush()
    calls = cache.calls
    metrics.flush()
    assert cache.calls == calls > 0


def test_the_cost_of_a_flush_does_not_grow_with_the_load(metrics: Any, cache: Cache) -> None:
    for _ in range(1000):
        metrics.record(8, [("infer", 0.002)], [200] * 8)
    metrics.flush()
    assert cache.calls < 50
    assert cache.counts[REQUESTS, ("m", "2.0", "200")] == 8000


def test_nothing_is_lost_between_threads(metrics: Any, cache: Cache) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # else they hardly ever meet

    def work() -> None:
        for number in range(500):
            metrics.record(1, [("infer", 0.001)], [200])
            if number % 50 == 0:
                metrics.flush()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    metrics.flush()
    assert cache.counts[REQUESTS, ("m", "2.0", "200")] == 2000


def test_a_stop_watch_measures_each_stage_once(handlers: Import) -> None:
    recorded = []

    class Recorder:
        def record(self, *values: Any) -> None:
            recorded.append(values)

    watch = handlers("stage_metrics").StopWatch(Recorder(), 3)
    for stage in ("decode", "preprocess", "infer"):
        watch.lap(stage)
    watch.finish("postprocess", [200, 200, 500])
    ((size, laps, statuses),) = recorded
    assert (size, statuses) == (3, [200, 200, 500])
    assert [stage for stage, _ in laps] == ["decode", "preprocess", "infer", "postprocess"]
    assert all(0 <= seconds < 1 for _, seconds in laps)


@pytest.mark.parametrize("reason", ["disabled", "undeclared", "declared in part", "no cache"])
def test_nothing_is_counted_that_nobody_would_read(
    handlers: Import, cache: Cache, reason: str
) -> None:
    class Undeclared:
        def get_metric(self, name: str) -> Any:
            raise KeyError(name)

    class DeclaredInPart(Cache):
        def get_metric(self, name: str) -> Any:
            if name.endswith("_sum"):
                raise KeyError(name)
            return super().get_metric(name)

    sources = {"undeclared": Undeclared(), "declared in part": DeclaredInPart(), "no cache": None}
    source = sources.get(reason, cache)
    before = threading.active_count()
    metrics = handlers("stage_metrics").StageMetrics(
        Context(source), model="m", version="1", enabled=reason != "disabled"
    )
    metrics.start(8).finish("decode", [200] * 8)
    assert threading.active_count() == before
    assert cache.calls == 0


def test_logged_and_lost_predictions_are_counted(metrics: Any, cache: Cache) -> None:
    metrics.count_predictions(2, 0)
    metrics.count_predictions(1, 5)
    metrics.flush()
    assert cache.counts["marwright_predictions_logged_total", ("m", "2.0")] == 3
    assert cache.counts["marwright_predictions_lost_total", ("m", "2.0")] == 5


def test_a_metrics_file_of_an_older_server_still_gets_what_it_declares(
    handlers: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers("stage_metrics"), "FLUSH_SECONDS", 3600)

    class Older(Cache):
        def get_metric(self, name: str) -> Any:
            if "predictions" in name:
                raise KeyError(name)
            return super().get_metric(name)

    cache = Older()
    metrics = handlers("stage_metrics").StageMetrics(Context(cache), model="m", version="1")
    metrics.count_predictions(2, 1)
    metrics.record(1, [], [200])
    metrics.flush()
    assert cache.counts[REQUESTS, ("m", "1", "200")] == 1
    assert not [name for name, _ in cache.counts if "predictions" in name]


def test_counts_are_handed_over_by_themselves(
    handlers: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers("stage_metrics"), "FLUSH_SECONDS", 0.01)
    handed = threading.Event()

    class Eager(Cache):
        def get_metric(self, name: str) -> Any:
            if self.counts:
                handed.set()
            return super().get_metric(name)

    metrics = handlers("stage_metrics").StageMetrics(Context(Eager()), model="m", version="1")
    metrics.record(1, [], [200])
    assert handed.wait(5)


@pytest.fixture
def torchserve_cache(root: Path) -> Any:
    """TorchServe's own cache with our metrics file, as a worker makes it."""
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    cache = MetricsCacheYamlImpl(config_file_path=str(root / "src/marwright/server/metrics.yaml"))
    cache.initialize_cache()
    return cache


def test_torchserve_takes_every_series_without_a_complaint(
    handlers: Import, torchserve_cache: Any, caplog: pytest.LogCaptureFixture, root: Path
) -> None:
    # It throws away, with an error in the log, what has other labels than the file declares.
    metrics = handlers("stage_metrics").StageMetrics(
        Context(torchserve_cache), model="m", version="1"
    )
    with caplog.at_level(logging.INFO):
        watch = metrics.start(3)
        for stage in ("decode", "preprocess", "infer"):
            watch.lap(stage)
        watch.finish("postprocess", [200, 415, 500])
        metrics.count_predictions(3, 1)
        metrics.flush()
    lines = [record for record in caplog.records if "[METRICS]marwright" in record.message]
    assert not [record for record in lines if record.levelno >= logging.WARNING]
    assert any("marwright_requests_total.Count:1|#model_name:m" in r.message for r in lines)
    names = {record.message.split("]")[1].split(".")[0] for record in lines}
    declared = {metric["name"] for metric in read_metrics(root, "model_metrics")["counter"]}
    assert names == declared


def read_metrics(root: Path, section: str) -> Any:
    return yaml.safe_load((root / "src/marwright/server/metrics.yaml").read_text())[section]


def test_torchserves_own_metrics_stay_as_they_are(root: Path) -> None:
    # It counts only what the file declares; ours takes the place of its own.
    import ts

    own = yaml.safe_load((Path(ts.__file__).parent / "configs/metrics.yaml").read_text())
    assert sort_metrics(read_metrics(root, "ts_metrics")) == sort_metrics(own["ts_metrics"])
    ours = sort_metrics(read_metrics(root, "model_metrics"))
    assert all(item in ours for item in sort_metrics(own["model_metrics"]))


def sort_metrics(section: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, str, list[str]]]:
    return sorted(
        (kind, item["name"], item["unit"], item["dimensions"])
        for kind, items in section.items()
        for item in items
    )
