from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marwright.client import Client, Metrics, Tensor
from marwright.errors import ClientError, StorageError, UsageError

OUTPUT = {"name": "y", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
ANSWER = {"model_name": "cnn", "model_version": "1.0", "id": "mine", "outputs": [OUTPUT]}


def read_body(service: Any) -> Any:
    return json.loads(service.asked[-1].body)


def test_text_lists_and_arrays_are_inputs_too(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply())
    for data in ("grün", [1, 2], np.array([1.5], "float32")):
        client.predict("cnn", data)
    kinds = [asked.headers["Content-Type"] for asked in service.asked]
    assert kinds == ["text/plain; charset=utf-8", "application/json", "application/x-npy"]
    assert [asked.body for asked in service.asked[:2]] == ["grün".encode(), b"[1, 2]"]
    assert service.asked[2].body.startswith(b"\x93NUMPY")


@pytest.mark.parametrize("data", [7, None, object(), np.array([object()])])
def test_what_is_no_input_is_a_usage_error_and_not_sent(
    service: Any, client: Client, data: object
) -> None:
    with pytest.raises(UsageError):
        client.predict("cnn", data)
    assert service.asked == []


def test_the_form_of_the_answer_can_be_chosen(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply(body=b"{}"))
    answer = client.predict("cnn", b"", accept="application/x-npy")
    assert service.asked[0].headers["Accept"] == "application/x-npy"
    with pytest.raises(UsageError, match="no array"):
        answer.numpy()


def test_v1_sends_instances_and_returns_predictions(
    service: Any, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "scan.png").write_bytes(b"scan")
    service.answer({"predictions": [1, 2]})
    instances = [b"scan", tmp_path / "scan.png", {"x": np.array([1, 2])}, [3]]
    assert client.predict_v1("my net", instances) == [1, 2]
    assert service.lines == ["POST /v1/models/my%20net:predict"]
    b64 = {"b64": "c2Nhbg=="}
    assert read_body(service) == {"instances": [b64, b64, {"x": [1, 2]}, [3]]}
    client.predict_v1("cnn", [], version="2.0", parameters={"top": 1})
    assert service.lines[1] == "POST /predictions/cnn/2.0"
    assert read_body(service) == {"instances": [], "parameters": {"top": 1}}


def test_v1_explains_too(service: Any, client: Client) -> None:
    service.answer({"explanations": ["because"]})
    assert client.explain_v1("cnn", [1]) == ["because"]
    client.explain_v1("cnn", [1], version="2.0")
    assert service.lines == ["POST /v1/models/cnn:explain", "POST /explanations/cnn/2.0"]


def test_v2_sends_arrays_and_returns_arrays(service: Any, client: Client) -> None:
    service.answer(ANSWER)
    arrays = {"x": np.array([[1, 2]], "int64"), "image": [b"scan", "text"], "name": np.array("a")}
    answer = client.infer("cnn", arrays, id="mine", parameters={"top": 1})
    assert service.lines == ["POST /v2/models/cnn/infer"]
    assert read_body(service) == {
        "inputs": [
            {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]},
            {"name": "image", "shape": [2], "datatype": "BYTES", "data": ["c2Nhbg==", "text"]},
            {"name": "name", "shape": [], "datatype": "BYTES", "data": ["a"]},
        ],
        "id": "mine",
        "parameters": {"top": 1},
    }
    assert (answer.model, answer.version, answer.id) == ("cnn", "1.0", "mine")
    assert answer["y"].dtype == np.float32
    assert answer["y"].tolist() == [[1, 2], [3, 4.5]]
    with pytest.raises(UsageError, match="no output z"):
        answer["z"]
    client.infer("cnn", list(answer.outputs.values()), version="2.0")
    assert service.lines[1] == "POST /predictions/cnn/2.0"
    assert read_body(service) == {"inputs": [OUTPUT]}


@pytest.mark.parametrize(
    "values", [np.array([1j]), np.array([None]), [b"a", 1], [[1], [1, 2]], np.array([np.nan])]
)
def test_what_the_protocol_has_no_words_for_is_a_usage_error(
    service: Any, client: Client, values: Any
) -> None:
    with pytest.raises(UsageError):
        client.infer("cnn", {"x": values})
    assert service.asked == []


def test_a_file_that_is_missing_is_a_storage_error(client: Client, tmp_path: Path) -> None:
    for call in (client.predict_v1, lambda name, paths: client.infer(name, {"x": paths})):
        with pytest.raises(StorageError, match=r"gone\.png"):
            call("cnn", [tmp_path / "gone.png"])


@pytest.mark.parametrize(
    "outputs",
    [7, [{}], [{**OUTPUT, "shape": None}], [{**OUTPUT, "shape": ["a"]}], [{**OUTPUT, "data": 7}]],
)
def test_an_answer_that_is_no_v2_is_a_client_error(
    service: Any, client: Client, outputs: Any
) -> None:
    service.answer({**ANSWER, "outputs": outputs})
    with pytest.raises(ClientError):
        client.infer("cnn", {"x": [1]})


def test_nested_data_is_read_and_data_that_does_not_fit_is_a_client_error() -> None:
    nested = Tensor.from_response({**OUTPUT, "data": [[1, 2], [3, 4]]})
    assert nested.numpy().tolist() == [[1, 2], [3, 4]]
    for change in ({"data": [1]}, {"data": ["a"] * 4}, {"datatype": "UINT8", "data": [999] * 4}):
        with pytest.raises(ClientError, match="y is no array"):
            Tensor.from_response(OUTPUT | change).numpy()


TEXT = """# HELP ts_inference_requests_total Total
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="cnn",model_version="1.0"} 3.0
ts_inference_requests_total{model_name="cnn",model_version="2.0"} 4.0
ts_inference_requests_total{model_name="net",model_version="1.0"} 5.0
"""


def test_metrics_are_families_that_can_be_asked(
    service: Any, connect: Any, reply: Any, endpoint: Any
) -> None:
    client = connect(dataclasses.replace(endpoint, metrics_url=service.url + "/"))
    service.answer(reply(body=TEXT.encode()))
    metrics = client.metrics(names=["a b"])
    assert service.lines == ["GET /metrics?name%5B%5D=a%20b"]
    assert [family.type for family in metrics.families] == ["counter"]
    name = "ts_inference_requests_total"
    assert metrics.total(name) == 12
    assert metrics.total(name, model_name="cnn") == 7
    assert [sample.value for sample in metrics.find(name, model_version="2.0")] == [4]
    assert metrics.total("never_counted") == 0


def test_metrics_of_another_form_or_of_nowhere_are_client_errors(client: Client) -> None:
    with pytest.raises(ClientError, match="Prometheus"):
        Metrics.from_response('<html lang="en">\n{"a": 1}')
    with pytest.raises(UsageError, match="metrics address"):
        client.metrics()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "OPTIONS /"),
        ({"api": "management"}, "OPTIONS /"),
        ({"model": "cnn"}, "OPTIONS /predictions/cnn"),
        ({"api": "management", "model": "cnn", "version": "1.0"}, "OPTIONS /models/cnn/1.0"),
    ],
)
def test_an_api_describes_itself(service: Any, client: Client, arguments: Any, line: str) -> None:
    service.answer({"openapi": "3.0.1"})
    assert client.openapi(**arguments) == {"openapi": "3.0.1"}
    assert service.lines == [line]
