"""Requests in every form, answers in every form, metrics and log of a real TorchServe."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marwright.archive import Run
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

JSON, NPY, RAW = "application/json", "application/x-npy", "application/octet-stream"
PROBLEM = "application/problem+json"
HOT = 2000
"""The model fails for it."""
SCHEMA = {"type": ["object", "array"], "properties": {"top": {"type": "integer"}}}


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 1000).any()):
            raise RuntimeError("too hot")
        return x * 2


@pytest.fixture(scope="module")
def send(
    server: TorchServe, connect: Callable[..., Any], pack_own: Callable[..., Path]
) -> Iterator[Callable[..., Any]]:
    """Return a function that sends requests to a server with `double`, and with `plain`.

    `plain` is the same model, but answers by TorchServe's own path through the worker.
    """
    handler = {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32"}], "max_bytes": 50_000}
    for name, fast in (("double", True), ("plain", False)):
        settings = {"handler": {**handler, "fast_worker": fast}}
        archive = pack_own(name, "tensor", Double(), settings=settings, input={"schema": SCHEMA})
        register(server.client, archive)
    yield connect(server)
    for name in ("double", "plain"):
        server.client.models.unregister(name, "1.0")
        (server.store / f"{name}.mar").unlink()


def write_npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, "float32"))
    return buffer.getvalue()


def load_npy(body: bytes) -> list[Any]:
    return np.load(io.BytesIO(body), allow_pickle=False).tolist()


def make_v2(*rows: list[float]) -> dict[str, Any]:
    data = [value for row in rows for value in row]
    return {"name": "x", "shape": [len(rows), 2], "datatype": "FP32", "data": data}


def test_tensorflow_servings_rest_api_is_answered_on_its_own_route(
    send: Callable[..., Any],
) -> None:
    path = "/v1/models/double:predict"
    answer = send(path, json={"instances": [[1, 2], {"x": [3, 4]}]})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, JSON)
    assert answer.content == b'{"predictions":[[2.0,4.0],[6.0,8.0]]}'
    columns = send(path, json={"signature_name": "serving_default", "inputs": {"x": [[1, 2]]}})
    assert columns.json() == {"outputs": [[2, 4]]}
    # As `requests.post(url, data=json.dumps(...))` sends it, without a content type.
    assert send(path, b'{"instances": [[1, 2]]}').json() == {"predictions": [[2, 4]]}


def test_kserves_v2_protocol_is_answered_on_its_own_route(send: Callable[..., Any]) -> None:
    body = {"id": "mine", "inputs": [make_v2([1, 2], [3, 4])]}
    answer = send("/v2/models/double/infer", json=body)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, JSON)
    output = {"name": "output", "shape": [2, 2], "datatype": "FP32", "data": [2, 4, 6, 8]}
    assert answer.json() == {
        "model_name": "double",
        "model_version": "1.0",
        "id": "mine",
        "outputs": [output],
    }


def test_images_come_in_base64_by_both_protocols(send: Callable[..., Any], run: Run) -> None:
    scans = [sample.path.read_bytes() for sample in run.samples[:2]]
    texts = [base64.b64encode(scan).decode() for scan in scans]
    v1 = send("/v1/models/cnn:predict", json={"instances": [{"b64": text} for text in texts]})
    labels = [next(iter(prediction)) for prediction in v1.json()["predictions"]]
    assert labels == [sample.prediction for sample in run.samples[:2]]
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES", "data": texts}
    v2 = {
        output["name"]: output
        for output in send("/v2/models/cnn/infer", json={"inputs": [tensor]}).json()["outputs"]
    }
    assert v2["probabilities"]["shape"] == [2, 10]
    assert v2["label"]["datatype"] == "BYTES"
    assert v2["label"]["data"] == labels


def test_forms_have_one_thing_or_many(send: Callable[..., Any], run: Run) -> None:
    path = "/predictions/double"
    one, two = write_npy([1, 2]), write_npy([3, 4])
    assert send(path, files={"a": one}).json() == [2, 4]
    assert send(path, files={"a": one, "b": two}).json() == [[2, 4], [6, 8]]
    parts = {"a": ("a.json", b"[1, 2]", JSON), "b": ("b.npy", two, NPY)}
    assert send(path, files=parts).json() == [[2, 4], [6, 8]]
    scans = {sample.path.name: sample.path.read_bytes() for sample in run.samples[:4]}
    answers = send("/predictions/cnn", files=scans).json()
    assert [next(iter(answer)) for answer in answers] == [s.prediction for s in run.samples[:4]]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", JSON),
        (NPY, NPY),
        (RAW, RAW),
        ("application/json;q=0.1, application/x-npy", NPY),
        ("text/html,*/*;q=0.1", JSON),
    ],
)
def test_the_answer_is_written_as_the_client_asks(
    send: Callable[..., Any], accept: str, kind: str
) -> None:
    answer = send("/predictions/double", write_npy([[1, 2], [3, 4]]), headers={"Accept": accept})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, kind)
    if kind == JSON:
        assert answer.content == b"[[2.0,4.0],[6.0,8.0]]"
    elif kind == NPY:
        assert load_npy(answer.content) == [[2, 4], [6, 8]]
    else:
        assert (answer.headers["x-array-shape"], answer.headers["x-array-dtype"]) == (
            "2,2",
            "float32",
        )
        assert np.frombuffer(answer.content, "<f4").tolist() == [2, 4, 6, 8]


# Path's end, arguments of the request, and the status it gets.
REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({"body": b""}, 400),
    "no JSON": ({"body": b"[1, 2", "kind": JSON}, 400),
    "a form that curl -d makes": (
        {"body": b"[1]", "kind": "application/x-www-form-urlencoded"},
        400,
    ),
    "nothing of ours accepted": ({"json": [1, 2], "headers": {"Accept": "text/html"}}, 406),
    "many bytes": ({"body": bytes(50_001)}, 413),
    "many items": ({"json": {"instances": [[1, 2]] * 65}}, 413),
    "no npy": ({"body": b"text", "kind": NPY}, 415),
    "another shape": ({"json": [1, 2, 3]}, 422),
    "NaN": ({"body": write_npy([1, np.nan])}, 422),
    "what the schema forbids": ({"json": {"data": [1, 2], "top": "5"}}, 422),
    "what the model fails for": ({"json": [HOT, 2]}, 500),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_a_problem_with_its_own_status_and_one_line_in_the_log(
    send: Callable[..., Any], server: TorchServe, name: str
) -> None:
    arguments, status = REFUSED[name]
    answer = send("/predictions/double", **arguments)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, PROBLEM)
    problem = answer.json()
    assert (problem["status"], problem["title"]) == (status, answer.reason)
    (line,) = wait_for_lines(server, answer.headers["x-request-id"])
    record = json.loads(json.loads(line)["message"])
    assert (record["event"], record["status"]) == ("request_failed", status)
    assert (record["model"], record["version"]) == ("double", "1.0")
    assert record["reason"]
    assert record.get("instance") == problem.get("instance")
    assert (status == 500) == ("too hot" in record.get("traceback", ""))
    assert "too hot" not in answer.text


def wait_for_lines(server: TorchServe, text: str) -> list[str]:
    """Return the log's lines that hold a text; the log may be a moment behind the answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if lines := [line for line in server.log_file.read_text().splitlines() if text in line]:
            return lines
        time.sleep(0.05)
    return []


def test_a_good_request_leaves_no_line(send: Callable[..., Any], server: TorchServe) -> None:
    before = len(server.log_file.read_text())
    good = [send("/predictions/double", json=[1, 2]) for _ in range(20)]
    assert {answer.status_code for answer in good} == {200}
    # What fails after them has its line after theirs, were there any.
    bad = send("/predictions/double", json=[1]).headers["x-request-id"]
    assert wait_for_lines(server, bad)
    lines = server.log_file.read_text()[before:].splitlines()
    ours = [line for line in lines if "MODEL_LOG" in line or "ACCESS_LOG" in line]
    assert len(ours) == 1
    for answer in good:
        assert answer.headers["x-request-id"] not in "".join(lines)


def test_stages_sizes_and_statuses_are_seen_at_the_metrics_port(
    send: Callable[..., Any], server: TorchServe, read_counters: Callable[..., Any]
) -> None:
    time.sleep(5.5)  # counts of requests before are handed over within five seconds
    before = read_counters(server, "double")
    for body, count in (([1, 2], 5), ([1], 3), ([HOT, 1], 2)):
        for _ in range(count):
            send("/predictions/double", json=body)
    time.sleep(5.5)
    after = read_counters(server, "double")
    new = {key: round(value - before.get(key, 0), 6) for key, value in after.items()}
    assert new["requests_total", "status=200"] == 5
    assert new["requests_total", "status=422"] == 3
    assert new["requests_total", "status=500"] == 2
    assert new["batch_size_count",] == new["batch_size_sum",] == new["batch_size_bucket", "le=1"]
    assert new["batch_size_count",] == 10
    for stage in ("decode", "preprocess", "infer", "postprocess"):
        name = f"stage={stage}"
        assert new["stage_seconds_count", name] == 10
        assert new["stage_seconds_bucket", "le=+Inf", name] == 10
        assert 0 < new["stage_seconds_sum", name] < 10
        buckets = sorted(
            (float(key[1].removeprefix("le=")), value)
            for key, value in after.items()
            if key[0] == "stage_seconds_bucket" and key[2] == name
        )
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)


def test_torchserves_own_metrics_are_there_too(
    send: Callable[..., Any], server: TorchServe
) -> None:
    send("/predictions/double", json=[1, 2])
    text = send("/metrics", method="GET", url=server.endpoint.metrics_url).text
    assert 'ts_inference_requests_total{model_name="double"' in text


# By both paths through the worker.
ALIKE: dict[str, dict[str, Any]] = {
    "JSON": {"json": [1, 2]},
    "a batch": {"json": [[1, 2], [3, 4]]},
    "instances": {"json": {"instances": [[1, 2]]}},
    "v2": {"json": {"id": "mine", "inputs": [make_v2([1, 2])]}},
    "npy": {"body": write_npy([1, 2]), "headers": {"Accept": NPY}},
    "raw": {"body": write_npy([1, 2]), "headers": {"Accept": RAW}},
    "parts": {"files": {"a": ("a", b"[1, 2]", JSON), "b": ("b", write_npy([3, 4]), NPY)}},
    "text": {"body": base64.b64encode(write_npy([1, 2])), "kind": "text/plain"},
    "chunks": {"body": "chunks", "kind": JSON},
    **{name: arguments for name, (arguments, status) in REFUSED.items() if status != 500},
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_short_way_through_the_worker_answers_as_torchserves_own(
    send: Callable[..., Any], name: str
) -> None:
    answers = []
    for model in ("double", "plain"):
        arguments = dict(ALIKE[name])
        if arguments.get("body") == "chunks":
            arguments["body"] = iter([b"[1,", b" 2]"])
        answer = send(f"/predictions/{model}", **arguments)
        headers = {key: text for key, text in answer.headers.items() if key != "x-request-id"}
        body = answer.content.replace(b'"model_name":"plain"', b'"model_name":"double"')
        length = headers.pop("content-length", None)
        answers.append((answer.status_code, answer.reason, headers, body, length is None))
    assert answers[0] == answers[1]


def test_what_is_too_large_for_the_server_never_reaches_a_handler(
    send: Callable[..., Any], server: TorchServe
) -> None:
    answer = send("/predictions/double", bytes(6_600_000))
    assert answer.status_code == 413
