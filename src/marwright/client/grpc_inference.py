"""What is asked of the inference service over gRPC; see grpc_calls.

Each function says what to send and how to read the answer; the two clients do it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from marwright.client.grpc_calls import Attempt, Call, Caller
from marwright.client.grpc_errors import raise_problem, translate_status
from marwright.client.inputs import Input, encode_input
from marwright.client.results import Answer, Health, parse_json
from marwright.errors import UsageError

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = [
    "ask_health",
    "check_names",
    "make_sequence",
    "open_sequence",
    "open_stream",
    "predict",
    "predict_parts",
    "read_prediction",
    "read_sequence_answer",
]

BODY = "body"
"""The input's name, as the REST API names a body that is no form."""
SEQUENCE = "StreamPredictions2"


def predict(
    name: str, data: Input, *, version: str | None = None, timeout: float | None = None
) -> Call[Answer]:
    """Send one input; bytes and files as they are, dicts and lists as JSON, arrays as npy.

    The handler must not answer in parts: TorchServe 0.12 loses the worker over it.

    Raises:
        InputRejectedError: one of marwright's handlers refused the input.
        ModelNotFoundError: no such model or version.
        OverloadedError: no room in the queue, or no worker, after all tries.
    """
    return predict_parts(name, {BODY: data}, version=version, timeout=timeout)


def predict_parts(
    name: str,
    parts: Mapping[str, Input],
    *,
    version: str | None = None,
    timeout: float | None = None,
) -> Call[Answer]:
    """Send one input of several parts, each under its name."""
    fields = _name_parts(name, parts, version)
    return Call("Predictions", fields, read_prediction, safe=True, timeout=timeout)


def open_stream(
    name: str, data: Input, *, version: str | None = None, timeout: float | None = None
) -> Call[Any]:
    """Ask for a prediction that comes in parts; what comes back is the driver's own."""
    fields = _name_parts(name, {BODY: data}, version)
    return Call("StreamPredictions", fields, _keep, safe=True, timeout=timeout)


def ask_health(*, timeout: float | None = None) -> Call[Health]:
    """Ask the inference service whether the server is up."""

    def read(response: Any, _: float) -> Health:
        text = response.health.encode()
        return parse_json(text, "Ping", lambda value: Health(status=str(value["status"])))

    return Call("Ping", {}, read, safe=False, timeout=timeout)


def open_sequence(*, timeout: float | None = None) -> Call[Attempt]:
    """Return what begins a sequence of inputs; nothing is sent by it, so that it is safe."""
    return Call(SEQUENCE, {}, _keep, safe=True, timeout=timeout)


def make_sequence(caller: Caller, name: str, *, version: str | None) -> Callable[[Input], Message]:
    """Return a function that makes the messages of a new sequence."""
    request = caller.protocol.find(SEQUENCE).request
    sequence = str(uuid.uuid4())

    def make_message(data: Input) -> Message:
        fields = _name_parts(name, {BODY: data}, version)
        return request(sequence_id=sequence, **fields)

    return make_message


def read_sequence_answer(response: Any, seconds: float, *, address: str) -> Answer:
    """Return the answer to one input of a sequence.

    Raises:
        ClientError: the member of the family that fits; the stream goes on after it.
    """
    if response.HasField("status"):
        import grpc

        status = response.status
        codes = {code.value[0]: code.name for code in grpc.StatusCode}
        code = codes.get(status.code, "UNKNOWN")
        raise translate_status(code, status.message, method=SEQUENCE, address=address)
    return read_prediction(response, seconds)


def read_prediction(response: Any, seconds: float) -> Answer:
    """Return one answer; gRPC carries neither its content type nor TorchServe's request id.

    Raises:
        AnswerError: it is the error that one of marwright's handlers wrote.
    """
    raise_problem(response.prediction)
    return Answer(
        status=200,
        content_type="",
        body=response.prediction,
        request_id="",
        seconds=seconds,
    )


def check_names(*names: str | None) -> None:
    """Refuse empty names: to TorchServe an empty version is none, and so the default one.

    Raises:
        UsageError: one of them is empty.
    """
    if "" in names:
        raise UsageError("no such model name or version is possible", found="''")


def _name_parts(name: str, parts: Mapping[str, Input], version: str | None) -> dict[str, Any]:
    check_names(name, version)
    encoded = {part: encode_input(value).content for part, value in parts.items()}
    return {"model_name": name, "model_version": version or "", "input": encoded}


def _keep(brought: Any, seconds: float) -> Any:
    """Leave what came as it is."""
    return brought
