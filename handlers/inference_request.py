"""One inference request, whichever way it was written: raw, multipart, JSON, KServe v1 and v2.

TorchServe hands over a row, name to value: a raw body is named "body", parts of a form keep their
names; JSON and text arrive parsed where the worker's protocol is TorchServe's own, as bytes where
it is fast_worker's (ts/service.py, ts/protocol/otf_message_handler.py).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from problem import RejectedInput

__all__ = [
    "Form",
    "Incoming",
    "InferenceRequest",
    "Part",
    "parse_json",
    "read_id",
    "read_request",
    "RequestLimits",
]

Form = Literal["one", "many", "v1", "columns", "v2"]
"""How a request lists what is to be predicted, and so how its answer does.

one: the answer is the prediction itself; many: a list of them; v1: KServe v1 and TensorFlow
Serving's rows, {"predictions": [...]}; columns: TensorFlow Serving's columns, {"outputs": ...};
v2: the Open Inference Protocol.
"""
JSON_TYPE = "application/json"
MOST_ID = 128


class Incoming(NamedTuple):
    """One request as it comes from the server, unread."""

    id: str
    row: Any
    """TorchServe's mapping, or (name, value, content type) of every part."""
    content_type: str = ""
    accept: str = ""
    is_explanation: bool = False
    """Whether it came to /explanations."""
    header_id: str = ""
    """The header X-Request-ID, where one came that can be kept: see read_id."""


@dataclass(frozen=True)
class RequestLimits:
    """What a request may bring, counted before anything is decoded."""

    max_bytes: int = 6_000_000
    """Of the whole body; TorchServe itself refuses bodies above max_request_size (6,553,500)."""
    max_items: int = 64
    """Things to predict in one request."""


@dataclass(frozen=True)
class Part:
    """One thing to be predicted."""

    value: Any
    """Bytes, or the value that stood in JSON."""
    content_type: str = ""
    name: str = ""

    def read_bytes(self) -> bytes | bytearray | memoryview:
        """Return the bytes: as they came, or from base64.

        JSON may say "<base64>", {"b64": "<base64>"} (TensorFlow Serving) or {"data": "<base64>"}
        (KServe), also as the one value of a named input.

        Raises:
            RejectedInput: 400 where it is none of these.
        """
        value = self.value
        for _ in range(3):
            if isinstance(value, (bytes, bytearray, memoryview)):
                return value
            if isinstance(value, str):
                return _decode_base64(value)
            if not isinstance(value, Mapping):
                break
            for key in ("b64", "data"):
                if key in value:
                    value = value[key]
                    break
            else:
                if len(value) != 1:
                    break
                value = next(iter(value.values()))
        raise RejectedInput(
            400, f'expected bytes or {{"data": "<base64>"}}, found {_describe(self.value)}'
        )

    def read_text(self) -> str:
        """Return the text: a body in UTF-8, or JSON's own.

        Raises:
            RejectedInput: 400 where it is no text.
        """
        value = self.value
        if isinstance(value, Mapping) and "data" in value:
            value = value["data"]
        if isinstance(value, str):
            return value
        if isinstance(value, (bytes, bytearray, memoryview)):
            try:
                return str(value, "utf-8")
            except UnicodeDecodeError as exc:
                raise RejectedInput(400, f"expected text in UTF-8, found {exc.reason}") from exc
        raise RejectedInput(400, f'expected text or {{"data": "..."}}, found {_describe(value)}')


@dataclass
class InferenceRequest:
    """What one client asks for."""

    id: str
    form: Form
    parts: list[Part]
    """What is to be predicted; of forms `columns` and `v2` the named inputs."""
    accept: str = ""
    """The Accept header."""
    is_explanation: bool = False
    """Whether it came to /explanations."""
    client_id: str = ""
    """The id inside a v2 request, returned with the answer."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What a body of form v1, columns or v2 says under "parameters"."""


def read_id(header: str) -> str:
    """Return a request's id as its header says it, or nothing: who sends it may send anything.

    At most 128 characters of printable ASCII stay.
    """
    is_plain = len(header) <= MOST_ID and header.isascii() and header.isprintable()
    return header.strip() if is_plain else ""


def read_request(
    incoming: Incoming,
    limits: RequestLimits,
    check_json: Callable[[Any], None] | None = None,
) -> InferenceRequest:
    """Read what a request wants predicted; `check_json` sees whatever was JSON.

    That is a body, or each part of a form.

    Raises:
        RejectedInput: 400 for what cannot be read, 413 for too much of it, and what `check_json`
            raises.
    """
    row = incoming.row
    if isinstance(row, Mapping):
        row = [(name, value, incoming.content_type) for name, value in row.items()]
    fields: list[tuple[str, Any, str]] = row
    size = sum(len(v) for _, v, _ in fields if isinstance(v, (bytes, bytearray, memoryview, str)))
    if size > limits.max_bytes:
        raise RejectedInput(413, f"expected at most {limits.max_bytes:,} bytes, found {size:,}")
    request = InferenceRequest(incoming.id, "one", [], incoming.accept, incoming.is_explanation)
    if len(fields) == 1 and fields[0][0] == "body":
        _read_body(request, fields[0][1], fields[0][2], check_json)
    else:
        request.parts = [Part(_parse(value, kind), kind, name) for name, value, kind in fields]
        for part in request.parts:
            _check(part.value, check_json)
        request.form = "one" if len(fields) == 1 else "many"
    if not request.parts:
        raise RejectedInput(
            400,
            "expected something to predict, found an empty request; "
            "with curl send a file by -T FILE: -d makes a form of it",
        )
    if len(request.parts) > limits.max_items:
        raise RejectedInput(
            413, f"expected at most {limits.max_items} items, found {len(request.parts):,}"
        )
    return request


def _read_body(
    request: InferenceRequest,
    body: Any,
    content_type: str,
    check_json: Callable[[Any], None] | None,
) -> None:
    body = _parse(body, content_type or _guess_type(body))
    is_bytes = isinstance(body, (bytes, bytearray, memoryview))
    _check(body, check_json)
    if is_bytes or not isinstance(body, Mapping):
        if is_bytes and not len(body):
            raise RejectedInput(400, "expected something to predict, found 0 bytes")
        request.parts = [Part(body, content_type)]
        return
    parameters = body.get("parameters")
    request.parameters = parameters if isinstance(parameters, Mapping) else {}
    if "instances" in body:
        request.form = "v1"
        instances = body["instances"]
        if not isinstance(instances, list):
            raise RejectedInput(400, f"expected a list of instances, found {_describe(instances)}")
        request.parts = [Part(instance, JSON_TYPE) for instance in instances]
    elif "inputs" in body:
        _read_inputs(request, body)
    else:
        request.parts = [Part(body, JSON_TYPE)]


def _check(body: Any, check_json: Callable[[Any], None] | None) -> None:
    """Check a body, or a form's part, that was JSON."""
    if check_json is not None and not isinstance(body, (bytes, bytearray, memoryview, str)):
        check_json(body)


def _read_inputs(request: InferenceRequest, body: Mapping[str, Any]) -> None:
    """Read {"inputs": ...}: the Open Inference Protocol's, or TensorFlow Serving's columns."""
    inputs = body["inputs"]
    if isinstance(inputs, list) and inputs and all(map(_is_v2_input, inputs)):
        request.form = "v2"
        request.parts = [part for item in inputs for part in _read_v2_input(item)]
        request.client_id = str(body.get("id") or "")[:200]
        return
    request.form = "columns"
    if isinstance(inputs, Mapping) and not {"b64", "data"} & set(inputs):
        columns = {str(name): value for name, value in inputs.items()}
    else:
        columns = {"": inputs}
    pairs = list(columns.items())
    if len(pairs) == 1 and _is_list_of_files(pairs[0][1]):
        pairs = [(pairs[0][0], value) for value in pairs[0][1]]
    request.parts = [Part(value, JSON_TYPE, name) for name, value in pairs]


def _is_list_of_files(column: Any) -> bool:
    """Tell texts and files, each a thing to predict, from numbers, which are one array."""
    return (
        isinstance(column, list)
        and len(column) > 0
        and all(isinstance(item, (str, Mapping)) for item in column)
    )


def _read_v2_input(item: Mapping[str, Any]) -> list[Part]:
    """Return a tensor as one part, but each text or file of BYTES as a part of its own."""
    name = str(item["name"])
    if item["datatype"] == "BYTES" and isinstance(item["data"], list):
        return [Part(value, JSON_TYPE, name) for value in item["data"]]
    return [Part(item, JSON_TYPE, name)]


def _parse(value: Any, content_type: str) -> Any:
    """Return what TorchServe's own worker makes of bytes: JSON parsed, text decoded."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        return value
    if content_type.partition(";")[0].strip().lower() == JSON_TYPE:
        return parse_json(value)
    if content_type.startswith("text"):
        with contextlib.suppress(UnicodeDecodeError):
            return str(value, "utf-8")
    return value


def _guess_type(body: Any) -> str:
    """Return JSON's type for what a protocol's client sends without one; some of them do."""
    if not isinstance(body, (bytes, bytearray)) or not body.startswith(b"{"):
        return ""
    return JSON_TYPE if b'"instances"' in body or b'"inputs"' in body else ""


def _is_v2_input(item: Any) -> bool:
    return isinstance(item, Mapping) and {"name", "shape", "datatype", "data"} <= set(item)


def parse_json(body: bytes | bytearray | memoryview) -> Any:
    """Parse a JSON body; NaN and Infinity, which RFC 8259 does not know, are refused.

    Raises:
        RejectedInput: 400.
    """
    try:
        value = json.loads(bytes(body), parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise RejectedInput(400, "expected JSON, found too many brackets in it") from exc
    except ValueError as exc:  # JSON's, and Unicode's
        raise RejectedInput(400, f"expected JSON, found a fault in it: {exc}") from exc
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RejectedInput(400, f"expected base64 text, found {text[:20]!r}: {exc}") from exc


def _describe(value: Any) -> str:
    """Name a value briefly: what a request brings is not echoed at any length."""
    if isinstance(value, Mapping):
        return f"an object with keys {sorted(str(name)[:40] for name in value)[:8]}"
    return f"a JSON {type(value).__name__}"
