from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Import = Callable[[str], Any]

# ts leaves its version file open when imported.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

NPY = "application/x-npy"
DECLARED = [{"name": "x", "shape": [2], "datatype": "FP32"}]


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Pair(torch.nn.Module):
    """Two inputs; two outputs with names."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"difference": left - right, "product": left * right}


class Sum(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1)


class Halves(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / 2, x.sum(dim=1)


@pytest.fixture
def double(handlers: Import, start: Callable[..., Any]) -> Any:
    return start(handlers("tensor").TensorHandler, Double(), inputs=DECLARED)


@pytest.fixture
def pair(handlers: Import, start: Callable[..., Any]) -> Any:
    """Its inputs are named by the model file: left and right."""
    return start(handlers("tensor").TensorHandler, Pair())


def ask(handler: Any, *requests: Any) -> list[tuple[int, Any]]:
    """Return status and content of each request's answer."""
    return [
        (answer.status, json.loads(answer.body) if "json" in answer.content_type else answer.body)
        for answer in handler.answer(requests)
    ]


def write_npy(values: Any, dtype: str = "float32") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def make_v2(name: str, data: Any, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": list(np.shape(data)), "datatype": datatype, "data": data}


BODIES: dict[str, tuple[Any, Any]] = {
    "one list": ([1, 2], [2, 4]),
    "data": ({"data": [1, 2]}, [2, 4]),
    "a batch of lists": ([[1, 2], [3, 4]], [[2, 4], [6, 8]]),
    "a batch of one": ([[1, 2]], [[2, 4]]),
    "instances": ({"instances": [[1, 2], [3, 4]]}, {"predictions": [[2, 4], [6, 8]]}),
    "instances by name": ({"instances": [{"x": [1, 2]}]}, {"predictions": [[2, 4]]}),
    "instances of base64": (
        {"instances": [{"b64": base64.b64encode(write_npy([1, 2])).decode()}]},
        {"predictions": [[2, 4]]},
    ),
    "a column": ({"inputs": [[1, 2], [3, 4]]}, {"outputs": [[2, 4], [6, 8]]}),
    "a column by name": ({"inputs": {"x": [[1, 2]]}}, {"outputs": [[2, 4]]}),
    "one v2 tensor": (make_v2("x", [1, 2]), [2, 4]),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_is_answered_in_its_own_form(double: Any, post: Callable[..., Any], name: str) -> None:
    body, expected = BODIES[name]
    assert ask(double, post(body)) == [(200, expected)]


def test_npy_is_one_thing_or_a_batch_as_its_dimensions_say(
    double: Any, post: Callable[..., Any]
) -> None:
    one, batch = write_npy([1, 2]), write_npy([[1, 2], [3, 4]])
    assert ask(double, post(one), post(batch)) == [(200, [2, 4]), (200, [[2, 4], [6, 8]])]
    (answer,) = double.answer([post(batch, accept=NPY)])
    assert np.load(io.BytesIO(answer.body)).tolist() == [[2, 4], [6, 8]]


def test_each_part_of_a_form_is_one_thing(double: Any, post: Callable[..., Any]) -> None:
    one, two = write_npy([1, 2]), write_npy([3, 4])
    assert ask(double, post(parts={"a": one})) == [(200, [2, 4])]
    assert ask(double, post(parts={"a": one, "b": two})) == [(200, [[2, 4], [6, 8]])]


def test_v2_is_answered_in_v2(double: Any, post: Callable[..., Any]) -> None:
    body = {"id": "mine", "inputs": [make_v2("x", [[1, 2], [3, 4]])]}
    assert ask(double, post(body)) == [
        (
            200,
            {
                "model_name": "m",
                "model_version": "1.0",
                "id": "mine",
                "outputs": [
                    {
                        "name": "output",
                        "shape": [2, 2],
                        "datatype": "FP32",
                        "data": [2, 4, 6, 8],
                    }
                ],
            },
        )
    ]


FIRST = {"difference": [-2, -2], "product": [3, 8]}


def test_several_inputs_are_found_by_their_names(pair: Any, post: Callable[..., Any]) -> None:
    left, right = [[1, 2], [0, 1]], [[3, 4], [5, 6]]
    both = [FIRST, {"difference": [-5, -5], "product": [0, 6]}]
    assert ask(
        pair,
        post({"instances": [{"right": [3, 4], "left": [1, 2]}]}),
        post({"inputs": {"right": right, "left": left}}),
        post(parts={"right": write_npy(right), "left": write_npy(left)}),
        post({"inputs": [make_v2("right", right), make_v2("left", left)]}),
    ) == [
        (200, {"predictions": [FIRST]}),
        (200, {"outputs": both}),
        (200, both),
        (200, make_v2_pair([-2, -2, -5, -5], [3, 8, 0, 6])),
    ]


def make_v2_pair(differences: list[float], products: list[float]) -> dict[str, Any]:
    outputs = [
        {"name": name, "shape": [2, 2], "datatype": "FP32", "data": data}
        for name, data in (("difference", differences), ("product", products))
    ]
    return {"model_name": "m", "model_version": "1.0", "id": "request-0", "outputs": outputs}


def test_outputs_without_names_are_numbered(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(handlers("tensor").TensorHandler, Halves(), inputs=DECLARED)
    assert ask(handler, post([2, 4])) == [(200, [[1, 2], 6])]
    ((_, body),) = ask(handler, post({"inputs": [make_v2("x", [[2, 4]])]}))
    assert [(o["name"], o["shape"]) for o in body["outputs"]] == [
        ("output_0", [1, 2]),
        ("output_1", [1]),
    ]


REFUSED: dict[str, tuple[Any, int, str]] = {
    "another shape": ([1, 2, 3], 422, "x of shape [2], found [3]"),
    "a batch of another shape": ([[1, 2, 3]], 422, "x of shape [2], found [3]"),
    "a batch of batches": ([[[1, 2]]], 422, "x of shape [2], found [1, 2]"),
    "a number": (5, 422, "one batch axis"),
    "no rows": (write_npy(np.zeros((0, 2))), 422, "one batch axis"),
    "NaN in npy": (write_npy([1, np.nan]), 422, "finite"),
    "a number beyond float32": ([1e39, 0], 422, "finite"),
    "an unknown input": ({"inputs": {"y": [[1, 2]]}}, 422, "inputs ['x'], found ['y']"),
    "an unknown v2 input": ({"inputs": [make_v2("y", [[1, 2]])]}, 422, "found ['y']"),
    "many rows": (write_npy(np.zeros((65, 2))), 413, "64 items, found 65"),
    "a million rows": (write_npy(np.zeros((1_000_000, 2))), 413, "64 items, found 1,000,000"),
    "text": (b"text", 415, "expected npy"),
    "one bad instance among good ones": ({"instances": [[1, 2], ["a"]]}, 422, "something else"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_does_not_take_is_refused_beside_a_good_request(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], name: str
) -> None:
    body, status, reason = REFUSED[name]
    kind = handlers("tensor").TensorHandler
    double = start(kind, Double(), inputs=DECLARED, max_bytes=20_000_000)
    bad, good = ask(double, post(body), post([1, 2]))
    assert good == (200, [2, 4])
    assert (bad[0], reason in bad[1]["detail"]) == (status, True), bad


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"instances": [[1, 2]]}, "an object with ['left', 'right']"),
        ({"instances": [{"left": [1]}]}, "an object with ['left', 'right']"),
        ([1, 2], "inputs ['left', 'right'], found ['']"),
        ({"inputs": {"left": [[1]], "right": [[1], [2]]}}, "found [1, 2]"),
    ],
)
def test_several_inputs_must_all_be_there_and_of_one_length(
    pair: Any, post: Callable[..., Any], body: Any, reason: str
) -> None:
    ((status, problem),) = ask(pair, post(body))
    assert status == 422
    assert reason in problem["detail"]


def test_without_a_declared_shape_an_array_is_a_batch(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(handlers("tensor").TensorHandler, Double())
    assert ask(handler, post([[1, 2], [3, 4]]), post([1, 2]), post({"instances": [1]})) == [
        (200, [[2, 4], [6, 8]]),
        (200, [2, 4]),
        (200, {"predictions": [2]}),
    ]


def test_scalars_may_be_declared(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    inputs = [{"name": "x", "shape": []}]
    handler = start(handlers("tensor").TensorHandler, Double(), inputs=inputs)
    answers = ask(handler, post(3), post([1, 2]), post(write_npy(4)))
    assert answers == [(200, 6), (200, [2, 4]), (200, 8)]


def test_nan_goes_to_a_model_that_declares_to_take_it(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    inputs = [{**DECLARED[0], "allow_nan": True}]
    handler = start(handlers("tensor").TensorHandler, Double(), inputs=inputs)
    (answer,) = handler.answer([post(write_npy([np.nan, 1]), accept=NPY)])
    assert np.array_equal(np.load(io.BytesIO(answer.body)), [np.nan, 2], equal_nan=True)


def test_the_declared_type_reaches_the_model(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    inputs = [{"name": "x", "shape": [2], "datatype": "INT64"}]
    handler = start(handlers("tensor").TensorHandler, Double(), inputs=inputs)
    *good, bad = ask(handler, post([1, 2]), post(write_npy([1, 2], "uint8")), post([1.5, 2]))
    assert good == [(200, [2, 4])] * 2
    assert bad[0] == 422


@pytest.mark.parametrize(
    ("shape", "warmed"), [([2], True), ([None], False), (None, False), ([], True)]
)
def test_a_model_is_warmed_up_where_its_shapes_are_known(
    handlers: Import, start: Callable[..., Any], shape: list[int] | None, warmed: bool
) -> None:
    inputs = [{"name": "x", "shape": shape}]
    handler = start(handlers("tensor").TensorHandler, Double(), inputs=inputs)
    assert (handler.make_example() is not None) == warmed


def test_an_unknown_key_of_an_input_is_told_at_the_start(
    handlers: Import, start: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['dtype'\]"):
        start(handlers("tensor").TensorHandler, Double(), inputs=[{"dtype": "FP32"}])


FILES = [base64.b64encode(write_npy(values)).decode() for values in ([1, 2], [3, 4])]


@pytest.mark.parametrize(
    ("body", "key", "told"),
    [
        ({"inputs": FILES}, "outputs", [[2, 4], [6, 8]]),
        ({"inputs": {"x": [{"b64": file} for file in FILES]}}, "outputs", [[2, 4], [6, 8]]),
        ({"inputs": [{"data": [1, 2]}, {"data": [3, 4]}]}, "outputs", [[2, 4], [6, 8]]),
    ],
)
def test_of_several_files_in_one_column_each_is_answered(
    double: Any, post: Callable[..., Any], body: Any, key: str, told: Any
) -> None:
    assert ask(double, post(body)) == [(200, {key: told})]


def test_v2s_files_are_each_answered(double: Any, post: Callable[..., Any]) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": FILES}
    ((status, answer),) = ask(double, post({"inputs": [tensor]}))
    assert status == 200
    assert answer["outputs"][0]["data"] == [2, 4, 6, 8]


def test_an_input_of_several_that_comes_twice_is_refused(
    pair: Any, post: Callable[..., Any]
) -> None:
    parts = [("left", write_npy([1, 2]), NPY), ("left", write_npy([3, 4]), NPY)]
    ((status, answer),) = ask(pair, post()._replace(row=parts))
    assert (status, "several times" in answer["detail"]) == (422, True)


def describe(
    handlers: Import, start: Callable[..., Any], tmp_path: Path, *requests: Any, **settings: Any
) -> list[dict[str, Any]]:
    """Return what the prediction log has of requests to a handler of rows of two numbers."""
    log = {"folder": str(tmp_path / "log"), "share": 100, "score": "energy"}
    handler = start(
        handlers("tensor").TensorHandler, Double(), inputs=DECLARED, prediction_log=log, **settings
    )
    handler.answer(requests)
    handler.prediction_log.close()
    (path,) = (tmp_path / "log/spool").iterdir()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_row_is_logged_with_its_numbers_by_place_and_no_prediction_of_several(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    (line,) = describe(handlers, start, tmp_path, post([0.5, 2]))
    assert line["features"] == {"value_0": 0.5, "value_1": 2.0}
    assert not {"prediction", "confidence", "embedding", "score"} & set(line)


def test_an_archive_that_knows_columns_and_labels_has_them_in_the_log(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    np.savez(folder / "reference.npz", feature_names=np.array(["length", "depth"]))
    (folder / "classes.json").write_text('["short", "long"]')
    first, second = describe(handlers, start, tmp_path, post([0, 1]), post([[3, 0]]))
    assert first["features"] == {"length": 0.0, "depth": 1.0}
    assert (first["prediction"], second["prediction"]) == ("long", "short")
    assert first["confidence"] == pytest.approx(torch.softmax(torch.tensor([0.0, 2.0]), 0)[1])
    assert first["embedding"] == [0.0, 2.0]
    assert first["score"] == pytest.approx(-torch.logsumexp(torch.tensor([0.0, 2.0]), 0))


def test_a_reference_that_is_broken_costs_the_names_alone(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "reference.npz").write_bytes(b"PK\3\4 no archive")
    (line,) = describe(handlers, start, tmp_path, post([0.5, 2]))
    assert list(line["features"]) == ["value_0", "value_1"]


def test_a_single_number_is_the_prediction(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    log = {"folder": str(tmp_path / "log"), "share": 100}
    handler = start(handlers("tensor").TensorHandler, Sum(), inputs=DECLARED, prediction_log=log)
    handler.answer([post([0.5, 2]), post(list(range(100)))])
    handler.prediction_log.close()
    (path,) = (tmp_path / "log/spool").iterdir()
    good, bad = (json.loads(line) for line in path.read_text().splitlines())
    assert good["prediction"] == "2.5"
    assert (bad["status"], "prediction" in bad) == (422, False)


def test_a_score_is_told_to_the_client_where_the_outputs_are_logits(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/classes.json").write_text('["short", "long"]')
    handler = start(handlers("tensor").TensorHandler, Double(), inputs=DECLARED, ood_score="energy")
    one, several = handler.answer([post([0, 1]), post([[0, 1], [50, 0]])])
    assert one.headers == {"x-ood-score": "-2.12693"}
    assert several.headers == {"x-ood-score": "-2.12693,-100"}
