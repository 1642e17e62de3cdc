from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from marwright.client import Answer, Health, ModelSummary, ModelVersion
from marwright.client.results import parse_json
from marwright.errors import ClientError


def make_answer(body: bytes) -> Answer:
    return Answer(200, "text/plain", body, "id", 0.1)


@pytest.mark.parametrize("body", [b"", b"seven", b"\xff\xfe", b"{", b"[" * 100_000])
def test_an_answer_that_is_no_json_says_so(body: bytes) -> None:
    with pytest.raises(ClientError, match="JSON"):
        make_answer(body).json()


@pytest.mark.parametrize("body", [b"7", b"null", b'["a"]', b'"text"'])
def test_any_json_is_an_answer(body: bytes) -> None:
    assert make_answer(body).json() in (7, None, ["a"], "text")


def test_only_healthy_is_healthy() -> None:
    assert Health("Healthy").healthy
    assert not Health("healthy?").healthy


@pytest.mark.parametrize(
    ("ready", "workers", "is_ready"), [(1, 1, True), (0, 1, False), (1, 2, False), (0, 0, False)]
)
def test_a_version_is_ready_with_all_its_workers_and_at_least_one(
    described: Any, ready: int, workers: int, is_ready: bool
) -> None:
    version = ModelVersion.from_response(described(ready=ready, workers=workers))
    assert version.ready is is_ready


def test_a_worker_without_a_pid_is_read(described: Any) -> None:
    item = described()
    del item["workers"][0]["pid"], item["workers"][0]["memoryUsage"]
    worker = ModelVersion.from_response(item).workers[0]
    assert (worker.id, worker.pid, worker.memory_bytes) == ("9000", -1, 0)


def test_results_cannot_be_changed(described: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelVersion.from_response(described()).version = "9"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", None),
        ("workers", 7),
        ("workers", "x"),
        ("workers", [{"id": 9000}]),
        ("workers", [{"id": 9000, "status": "READY", "pid": None}]),
        ("batchSize", None),
        ("minWorkers", {}),
        ("maxBatchDelay", "soon"),
    ],
)
def test_a_field_of_another_shape_is_a_client_error(
    described: Any, key: str, value: object
) -> None:
    body = json.dumps({**described(), key: value}).encode()
    with pytest.raises(ClientError, match="GET /models/cnn"):
        parse_json(body, "GET /models/cnn", ModelVersion.from_response)


def test_a_summary_names_model_and_archive() -> None:
    summary = ModelSummary.from_response({"modelName": "cnn", "modelUrl": "cnn.mar"})
    assert (summary.name, summary.archive) == ("cnn", "cnn.mar")
