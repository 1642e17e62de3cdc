from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

Import = Callable[[str], Any]

JSON, NPY, RAW = "application/json", "application/x-npy", "application/octet-stream"


@pytest.fixture
def render(handlers: Import) -> Callable[..., Any]:
    """Return a function that writes predictions, each a tensor, as a handler would."""
    response, request = handlers("inference_response"), handlers("inference_request")

    def render_outputs(
        *outputs: Any, form: str = "one", accept: str = "", client_id: str = "", values: Any = None
    ) -> Any:
        return response.render(
            request.InferenceRequest("id", form, [], accept=accept, client_id=client_id),
            [output.tolist() for output in outputs] if values is None else values,
            lambda: [{"scores": output} for output in outputs],
            model="m",
            version="1.0",
        )

    return render_outputs


def load_npy(body: bytes) -> Any:
    return np.load(io.BytesIO(body), allow_pickle=False)


ONE, TWO = torch.tensor([1.0, 0.5]), torch.tensor([2.0, 0.25])


@pytest.mark.parametrize(
    ("form", "outputs", "body"),
    [
        ("one", [ONE], b"[1.0,0.5]"),
        ("one", [ONE, TWO], b"[[1.0,0.5],[2.0,0.25]]"),
        ("many", [ONE], b"[[1.0,0.5]]"),
        ("many", [ONE, TWO], b"[[1.0,0.5],[2.0,0.25]]"),
        ("v1", [ONE], b'{"predictions":[[1.0,0.5]]}'),
        ("columns", [ONE, TWO], b'{"outputs":[[1.0,0.5],[2.0,0.25]]}'),
        (
            "v2",
            [ONE, TWO],
            b'{"model_name":"m","model_version":"1.0","id":"id","outputs":[{"name":"scores",'
            b'"shape":[2,2],"datatype":"FP32","data":[1.0,0.5,2.0,0.25]}]}',
        ),
    ],
)
def test_an_answer_has_the_form_of_its_request_and_no_spaces(
    render: Callable[..., Any], form: str, outputs: list[torch.Tensor], body: bytes
) -> None:
    answer = render(*outputs, form=form)
    assert (answer.status, answer.content_type, answer.body) == (200, JSON, body)
    assert (answer.phrase, answer.headers) == ("", {})


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        (NPY, NPY),
        (NPY.upper(), NPY),
        (RAW, RAW),
        ("text/html, application/x-npy", NPY),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON),
        ("application/json;q=0.1, application/x-npy;q=0.9", NPY),
        ("application/json; Q=0.1 , application/octet-stream ; q=0.2", RAW),
        ("*/*;q=0.1, application/x-npy", NPY),
        ("application/json;q=0, */*", NPY),
        ("application/x-npy;q=1.2.3, application/json;q=0.01", JSON),
        ("application/x-npy, application/json", JSON),  # of equal weight: ours first
    ],
)
def test_the_client_chooses_how_its_answer_is_written(
    render: Callable[..., Any], accept: str, kind: str
) -> None:
    assert render(ONE, accept=accept).content_type == kind


@pytest.mark.parametrize("accept", ["a", " ", "a/", "a/b;", "a/b,", ";q=", "*/*;"])
def test_no_accept_header_keeps_a_worker_busy(handlers: Import, accept: str) -> None:
    started = time.perf_counter()
    with contextlib.suppress(handlers("problem").RejectedInput):
        handlers("inference_response").choose_type(f"x{accept * 2000}x", (JSON, NPY, RAW))
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize("accept", ["text/html", "image/*", "nonsense", "application/json;q=0"])
def test_a_client_that_takes_nothing_of_ours_is_told_what_there_is(
    handlers: Import, render: Callable[..., Any], accept: str
) -> None:
    with pytest.raises(handlers("problem").RejectedInput, match=NPY) as caught:
        render(ONE, accept=accept)
    assert caught.value.status == 406


@pytest.mark.parametrize("form", ["one", "many", "v1", "columns"])
def test_npy_holds_the_numbers_to_the_last_bit(render: Callable[..., Any], form: str) -> None:
    output = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    answer = render(output, form=form, accept=NPY)
    array = load_npy(answer.body)
    assert array.shape == ((3, 5) if form == "one" else (1, 3, 5))
    assert array.tobytes() == output.numpy().tobytes()
    assert answer.headers == {"x-array-name": "scores"}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bool"])
def test_raw_numbers_are_little_endian_with_shape_and_type_beside_them(
    render: Callable[..., Any], dtype: str
) -> None:
    array = np.arange(6).reshape(2, 3).astype(np.dtype(dtype).newbyteorder(">"))
    answer = render(array, form="many", accept=RAW)
    assert answer.headers == {
        "x-array-name": "scores",
        "x-array-shape": "1,2,3",
        "x-array-dtype": dtype,
    }
    found = np.frombuffer(answer.body, np.dtype(dtype).newbyteorder("<")).reshape(1, 2, 3)
    assert np.array_equal(found[0], array)


def test_bfloat16_is_written_as_float32(render: Callable[..., Any]) -> None:
    output = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    assert load_npy(render(output, accept=NPY).body).tolist() == [1.5, -2.0]
    (written,) = json.loads(render(output, form="v2").body)["outputs"]
    assert (written["datatype"], written["data"]) == ("FP32", [1.5, -2.0])


def test_an_output_that_needs_a_gradient_is_written_too(render: Callable[..., Any]) -> None:
    assert load_npy(render(ONE.clone().requires_grad_(), accept=NPY).body).tolist() == [1, 0.5]


@pytest.mark.parametrize("accept", [NPY, RAW])
def test_text_is_no_array_of_numbers(
    handlers: Import, render: Callable[..., Any], accept: str
) -> None:
    with pytest.raises(handlers("problem").RejectedInput, match="found text") as caught:
        render(["a", "b"], values=["a"], accept=accept)
    assert caught.value.status == 406


def test_v2_names_every_array_and_its_type(handlers: Import) -> None:
    response, request = handlers("inference_response"), handlers("inference_request")
    arrays = {
        "label": ["cat", "é"],
        "box": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
        "seen": np.array([True, False]),
        "score": torch.tensor(0.5, dtype=torch.float64),
    }
    asked = request.InferenceRequest("id", "v2", [], client_id="mine")
    answer = response.render(asked, [0], lambda: [arrays], model="m", version="2")
    body = json.loads(answer.body)
    assert (body["id"], body["model_version"]) == ("mine", "2")
    assert [(o["name"], o["shape"], o["datatype"], o["data"]) for o in body["outputs"]] == [
        ("label", [1, 2], "BYTES", ["cat", "é"]),
        ("box", [1, 2, 2], "INT16", [1, 2, 3, 4]),
        ("seen", [1, 2], "BOOL", [True, False]),
        ("score", [1], "FP64", [0.5]),
    ]


@pytest.mark.parametrize(("form", "accept"), [("v2", ""), ("many", NPY), ("v1", RAW)])
def test_outputs_of_unlike_shapes_make_no_array(
    handlers: Import, render: Callable[..., Any], form: str, accept: str
) -> None:
    with pytest.raises(handlers("problem").RejectedInput, match="one shape") as caught:
        render(torch.zeros(2), torch.zeros(3), form=form, accept=accept)
    assert caught.value.status == 422
    assert render(torch.zeros(1), torch.zeros(2), form="many").body == b"[[0.0],[0.0,0.0]]"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_is_no_answer(render: Callable[..., Any], value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        render(torch.tensor([value]))
    assert np.isnan(load_npy(render(torch.tensor([float("nan")]), accept=NPY).body)).all()


def test_arrays_are_made_only_where_the_answer_needs_them(handlers: Import) -> None:
    def fail() -> Any:
        raise AssertionError("nobody asked for arrays")

    asked = handlers("inference_request").InferenceRequest("id", "v1", [])
    answer = handlers("inference_response").render(asked, [1, 2], fail, model="m", version="1")
    assert answer.body == b'{"predictions":[1,2]}'


def test_text_is_written_in_utf_8_whatever_it_holds(render: Callable[..., Any]) -> None:
    assert render(values=["é"]).body == '"é"'.encode()
    # A client may send half a pair of UTF-16 as its id; JSON can say it, UTF-8 cannot.
    body = render(ONE, form="v2", client_id="\ud800").body
    assert json.loads(body)["id"] == "\ud800"


def test_a_problem_is_a_response_with_its_own_type(handlers: Import) -> None:
    response = handlers("inference_response").render_problem(413, "too much", instance="5")
    assert (response.status, response.content_type) == (413, "application/problem+json")
    assert response.phrase == "Content Too Large"
    assert json.loads(response.body)["instance"] == "urn:uuid:5"
