from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

Import = Callable[[str], Any]

JSON = "application/json"
TENSOR = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
HELLO = base64.b64encode(b"hello").decode()


@pytest.fixture
def read(handlers: Import) -> Callable[..., Any]:
    """Return a function that reads a request, with the default limits or the given ones."""
    module = handlers("inference_request")

    def read_incoming(incoming: Any, check: Any = None, **limits: int) -> Any:
        return module.read_request(incoming, module.RequestLimits(**limits), check)

    return read_incoming


@pytest.fixture
def refuse(handlers: Import, read: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives the rejection of a request."""

    def refuse_incoming(*arguments: Any, **limits: int) -> Any:
        with pytest.raises(handlers("problem").RejectedInput) as caught:
            read(*arguments, **limits)
        return caught.value

    return refuse_incoming


def values(request: Any) -> list[Any]:
    return [part.value for part in request.parts]


# A body, and the form and values that are read from it.
BODIES: dict[str, tuple[Any, str, list[Any]]] = {
    "a list": ([1, 2], "one", [[1, 2]]),
    "an object": ({"data": HELLO}, "one", [{"data": HELLO}]),
    "instances": ({"instances": [1, [2], {"b64": HELLO}]}, "v1", [1, [2], {"b64": HELLO}]),
    "instances with a signature": ({"signature_name": "s", "instances": [1]}, "v1", [1]),
    "columns by name": ({"inputs": {"a": [1], "b": [2]}}, "columns", [[1], [2]]),
    "one column": ({"inputs": [[1, 2]]}, "columns", [[[1, 2]]]),
    "a column of texts": ({"inputs": ["a", "b"]}, "columns", ["a", "b"]),
    "a column of files": ({"inputs": {"x": [{"b64": HELLO}] * 2}}, "columns", [{"b64": HELLO}] * 2),
    "one column of base64": ({"inputs": {"b64": HELLO}}, "columns", [{"b64": HELLO}]),
    "v2": ({"inputs": [TENSOR, {**TENSOR, "name": "y"}]}, "v2", [TENSOR, {**TENSOR, "name": "y"}]),
    "v2 with texts": (
        {"inputs": [{**TENSOR, "shape": [2], "datatype": "BYTES", "data": [HELLO, "b"]}]},
        "v2",
        [HELLO, "b"],
    ),
    "v2 with a tensor that is none": ({"inputs": [TENSOR, 5]}, "columns", [[TENSOR, 5]]),
    "no inputs": ({"inputs": []}, "columns", [[]]),
}


@pytest.mark.parametrize("name", BODIES)
def test_json_is_read_by_the_protocol_it_follows(
    read: Callable[..., Any], post: Callable[..., Any], name: str
) -> None:
    body, form, expected = BODIES[name]
    request = read(post(body))
    assert (request.form, values(request)) == (form, expected)


@pytest.mark.parametrize("name", BODIES)
def test_json_that_torchserve_parsed_is_read_alike(
    handlers: Import, read: Callable[..., Any], post: Callable[..., Any], name: str
) -> None:
    body = BODIES[name][0]
    assert read(handlers("inference_request").Incoming("r", {"body": body}, JSON)).parts == [
        type(part)(part.value, JSON if part.content_type else "", part.name)
        for part in read(post(body)).parts
    ]


@pytest.mark.parametrize("kind", [JSON, "Application/JSON", "application/json; charset=utf-8"])
def test_json_is_known_by_its_content_type(
    read: Callable[..., Any], post: Callable[..., Any], kind: str
) -> None:
    assert values(read(post(b"[1]", kind))) == [[1]]
    assert values(read(post(b"[1]", "application/octet-stream"))) == [b"[1]"]


def test_a_protocols_client_may_leave_the_content_type_out(
    read: Callable[..., Any], post: Callable[..., Any]
) -> None:
    # requests.post(url, data=json.dumps(...)) and Triton's client do.
    assert read(post(b'{"instances": [1]}', "")).form == "v1"
    assert read(post(json.dumps({"inputs": [TENSOR]}).encode(), "")).form == "v2"
    assert values(read(post(b'{"data": [1]}', ""))) == [b'{"data": [1]}']
    assert values(read(post(b'{"instances": [1]}', "image/png"))) == [b'{"instances": [1]}']


def test_a_form_has_a_part_for_each_field(
    read: Callable[..., Any], post: Callable[..., Any]
) -> None:
    one = read(post(parts={"picture": (b"png", "image/png")}))
    assert (one.form, values(one), one.parts[0].content_type) == ("one", [b"png"], "image/png")
    many = read(post(parts={"a": b"1", "b": b"2"}))
    assert (many.form, values(many)) == ("many", [b"1", b"2"])
    assert [part.name for part in many.parts] == ["a", "b"]


def test_a_forms_json_is_read_as_json(read: Callable[..., Any], post: Callable[..., Any]) -> None:
    # TorchServe's own worker parses it.
    request = read(post(parts={"a": (b'{"x": [1]}', JSON), "b": (b"[2]", "image/png")}))
    assert values(request) == [{"x": [1]}, b"[2]"]


def test_text_is_decoded_where_it_can_be(
    read: Callable[..., Any], post: Callable[..., Any]
) -> None:
    # TorchServe's own worker does so.
    assert values(read(post("hé".encode(), "text/plain; charset=utf-8"))) == ["hé"]
    assert values(read(post(b"h\xe9", "text/plain"))) == [b"h\xe9"]
    assert values(read(post(parts={"a": (b"h", "text/csv")}))) == ["h"]


def test_what_is_known_of_a_request_stays_with_it(
    read: Callable[..., Any], post: Callable[..., Any]
) -> None:
    body = {"id": "mine", "inputs": [TENSOR], "parameters": {"top": 3}}
    request = read(post(body, accept="image/png", number=7, explain=True))
    assert (request.id, request.client_id) == ("request-7", "mine")
    assert (request.accept, request.is_explanation) == ("image/png", True)
    assert request.parameters == {"top": 3}


REFUSED: dict[str, tuple[bytes, str, int, str]] = {
    "nothing": (b"", "", 400, "0 bytes"),
    "no JSON at all": (b"", JSON, 400, "expected JSON"),
    "JSON cut short": (b'{"instances": [', JSON, 400, "expected JSON"),
    "two values": (b"[1][2]", JSON, 400, "Extra data"),
    "NaN": (b"[NaN]", JSON, 400, "NaN is no JSON number"),
    "Infinity": (b'{"instances": [-Infinity]}', JSON, 400, "-Infinity is no JSON number"),
    "no UTF-8": (b'{"data": "\xff\xfe\xff"}', JSON, 400, "utf-8"),
    "deep brackets": (b"[" * 100_000, JSON, 400, "too many brackets"),
    "deep objects": (b'{"a":' * 100_000, JSON, 400, "too many brackets"),
    "a number of many digits": (b"9" * 5000, JSON, 400, "digits"),
    "instances that are no list": (b'{"instances": {"a": 1}}', JSON, 400, "keys ['a']"),
    "no instances": (b'{"instances": []}', JSON, 400, "something to predict"),
    "many instances": (b'{"instances": [%s1]}' % (b"1," * 64), JSON, 413, "64 items, found 65"),
    "many bytes": (b"x" * 6_000_001, "", 413, "6,000,000 bytes, found 6,000,001"),
    "many bytes of JSON": (b"[" * 6_000_001, JSON, 413, "6,000,001"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_reason(
    refuse: Callable[..., Any], post: Callable[..., Any], name: str
) -> None:
    body, kind, status, reason = REFUSED[name]
    rejected = refuse(post(body, kind))
    assert rejected.status == status
    assert reason in rejected.detail
    assert len(rejected.detail) < 500


def test_a_request_without_parts_is_told_how_curl_sends_a_file(
    refuse: Callable[..., Any], post: Callable[..., Any]
) -> None:
    rejected = refuse(post(parts={}))
    assert rejected.status == 400
    assert "-T FILE" in rejected.detail


def test_all_parts_count_towards_the_limit_of_bytes(
    read: Callable[..., Any], refuse: Callable[..., Any], post: Callable[..., Any]
) -> None:
    parts = {"a": b"1234", "b": b"5678"}
    assert len(read(post(parts=parts), max_bytes=8).parts) == 2
    assert refuse(post(parts=parts), max_bytes=7).status == 413
    assert refuse(post(parts={"a": b"1", "b": b"2", "c": b"3"}), max_items=2).status == 413


def test_bytes_are_counted_before_json_is_parsed(
    refuse: Callable[..., Any], post: Callable[..., Any]
) -> None:
    assert refuse(post(b"no JSON", JSON), max_bytes=3).status == 413


def test_a_schema_sees_json_and_nothing_else(
    handlers: Import,
    read: Callable[..., Any],
    refuse: Callable[..., Any],
    post: Callable[..., Any],
) -> None:
    seen: list[Any] = []
    read(post([1]), seen.append)
    read(post(b"bytes"), seen.append)
    read(handlers("inference_request").Incoming("r", {"body": {"a": 1}}, JSON), seen.append)
    read(handlers("inference_request").Incoming("r", {"body": "text"}, "text/plain"), seen.append)
    assert seen == [[1], {"a": 1}]
    seen.clear()
    read(post(parts={"a": (b"[2]", JSON), "b": b"bytes", "c": (b"[3]", JSON)}), seen.append)
    assert seen == [[2], [3]]

    def check(_: Any) -> None:
        raise handlers("problem").RejectedInput(422, "not so")

    assert refuse(post([1]), check).status == 422


@pytest.mark.parametrize(
    "value",
    [
        b"hello",
        bytearray(b"hello"),
        HELLO,
        {"b64": HELLO},
        {"data": HELLO},
        {"data": {"b64": HELLO}},
        {"image": {"b64": HELLO}},
        {"image": HELLO},
    ],
)
def test_a_parts_bytes_are_read_however_they_are_written(handlers: Import, value: Any) -> None:
    assert bytes(handlers("inference_request").Part(value).read_bytes()) == b"hello"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("%%%", "expected base64"),
        ("aGVsbG8", "expected base64"),  # without its padding
        ("aGVs bG8=", "expected base64"),
        ("é", "expected base64"),
        ({"a": 1, "b": 2}, "an object with keys ['a', 'b']"),
        ({}, "an object with keys []"),
        (5, "a JSON int"),
        (None, "a JSON NoneType"),
        ([HELLO], "a JSON list"),
        ({"a": {"b": {"c": {"d": HELLO}}}}, "an object"),
    ],
)
def test_what_holds_no_bytes_is_refused(handlers: Import, value: Any, reason: str) -> None:
    with pytest.raises(handlers("problem").RejectedInput, match="expected") as caught:
        handlers("inference_request").Part(value).read_bytes()
    assert caught.value.status == 400
    assert reason in caught.value.detail


def test_what_a_request_brings_is_not_echoed_at_any_length(handlers: Import) -> None:
    module = handlers("inference_request")
    for value in ({f"{number}" * 1000: 1 for number in range(100)}, "%" * 10_000):
        with pytest.raises(handlers("problem").RejectedInput) as caught:
            module.Part(value).read_bytes()
        assert len(caught.value.detail) < 600


@pytest.mark.parametrize("value", ["hé", "hé".encode(), bytearray("hé".encode()), {"data": "hé"}])
def test_a_parts_text_is_read_however_it_is_written(handlers: Import, value: Any) -> None:
    assert handlers("inference_request").Part(value).read_text() == "hé"


@pytest.mark.parametrize("value", [b"h\xe9", 5, None, ["a"], {"text": "a"}])
def test_what_is_no_text_is_refused(handlers: Import, value: Any) -> None:
    with pytest.raises(handlers("problem").RejectedInput) as caught:
        handlers("inference_request").Part(value).read_text()
    assert caught.value.status == 400


KINDS = st.sampled_from(["", JSON, "application/json;x=\xff", "image/png", "text/plain"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["instances", "inputs", "name", "shape", "datatype", "data", "id", ""]),
            inner,
            max_size=6,
        )
    ),
)
BYTES = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())


@settings(max_examples=200, deadline=None)
@given(fields=st.lists(st.tuples(st.text(max_size=4) | st.just("body"), BYTES, KINDS), max_size=3))
def test_whatever_comes_is_read_or_refused_as_the_clients_fault(
    handlers: Import, fields: list[tuple[str, bytes, str]]
) -> None:
    module, status = handlers("inference_request"), 400
    try:
        request = module.read_request(module.Incoming("r", fields), module.RequestLimits())
        assert request.parts
        for part in request.parts:
            part.read_bytes()
    except handlers("problem").RejectedInput as exc:
        status = exc.status
    assert 400 <= status < 500
