"""TorchServe's own metrics, under our names."""

from __future__ import annotations

from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.torchserve import QueueTimes, translate

TEXT = """\
# HELP ts_queue_latency_microseconds Torchserve prometheus counter metric with unit: Microseconds
# TYPE ts_queue_latency_microseconds counter
ts_queue_latency_microseconds{model_name="cnn",model_version="default",hostname="h",} 2000000.0
ts_queue_latency_microseconds{model_name="cnn",model_version="1.0",hostname="h",} 500000.0
marwright_requests_total{model_name="cnn",model_version="1.0",status="200",Hostname="h",} 11.0
marwright_stage_seconds_sum{model_name="cnn",model_version="1.0",stage="infer",Hostname="h",} 1.5E-4
MemoryUsed{Level="Host",Hostname="h",} 5.0
"""


def read(text: str, queue: QueueTimes, **defaults: str) -> tuple[str, int]:
    exposition = Exposition()
    failed = translate(text, exposition, queue, defaults)
    queue.write(exposition)
    lines = exposition.render().decode().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")), failed


def test_labels_have_our_names_and_the_host_is_gone() -> None:
    text, failed = read(TEXT, QueueTimes(), cnn="2.0")
    assert text.splitlines() == [
        'marwright_queue_seconds_total{model="cnn",version="2.0"} 2',
        'marwright_queue_seconds_total{model="cnn",version="1.0"} 0.5',
        'marwright_requests_total{model="cnn",version="1.0",status="200"} 11.0',
        'marwright_stage_seconds_sum{model="cnn",version="1.0",stage="infer"} 1.5E-4',
    ]
    assert failed == 0


def test_what_waited_for_the_default_counts_for_the_default_of_then() -> None:
    queue = QueueTimes()
    first = 'ts_queue_latency_microseconds{model_name="cnn",model_version="default"} 1000000\n'
    read(first, queue, cnn="1.0")
    text, _ = read(first.replace("1000000", "1500000"), queue, cnn="2.0")
    assert 'version="1.0"} 1\n' in text
    assert text.endswith('version="2.0"} 0.5')


def test_a_server_that_was_started_again_adds_to_what_was_counted() -> None:
    queue = QueueTimes()
    line = 'ts_queue_latency_microseconds{model_name="cnn",model_version="1.0"} 3000000\n'
    read(line, queue)
    text, _ = read(line.replace("3000000", "1000000"), queue)
    assert text.endswith(" 4")
    queue.restart()
    text, _ = read(line, queue)
    assert text.endswith(" 7")


def test_half_an_answer_is_counted() -> None:
    assert read(TEXT[:-9], QueueTimes())[1] == 1
