"""What is asked of a server's models: predictions, explanations, health, metrics, descriptions.

Each function says what to send and how to read the answer; `Client` and `AsyncClient` do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from marwright.client.calls import Call, Response
from marwright.client.inputs import (
    Body,
    Input,
    encode_input,
    encode_instance,
    encode_json,
    encode_parts,
)
from marwright.client.metrics import Metrics
from marwright.client.models import model_path
from marwright.client.results import Answer, Health, parse_json
from marwright.client.tensors import Inference, Tensor

__all__ = [
    "ask_health",
    "explain",
    "explain_v1",
    "infer",
    "predict",
    "predict_parts",
    "predict_v1",
    "read_metrics",
    "read_metrics_text",
    "read_openapi",
]

Result = TypeVar("Result")
JSON = "application/json"


def predict(
    name: str,
    data: Input,
    *,
    version: str | None = None,
    accept: str | None = None,
    timeout: float | None = None,
) -> Call[Answer]:
    """Send one input: bytes or a file as the body, text, a dict or a list as JSON, an array as npy.

    `accept` asks for the answer in another form where the handler has several, such as
    application/x-npy.

    Raises:
        InputRejectedError: the handler refused the input; the error's text says why.
        ModelNotFoundError: no such model or version.
        OverloadedError: no room in the queue, or no worker, after all retries.
        WorkerLostError: the worker died, and others did when it was sent again.
    """
    path = model_path(name, version, root="/predictions")
    return _post(path, encode_input(data), Answer.from_response, accept, timeout)


def predict_parts(
    name: str,
    parts: Mapping[str, Input],
    *,
    version: str | None = None,
    accept: str | None = None,
    timeout: float | None = None,
) -> Call[Answer]:
    """Send several inputs in one request, as multipart/form-data, each part under its name.

    Our handlers answer one part as `predict` does, and several with a list in their order.
    """
    path = model_path(name, version, root="/predictions")
    return _post(path, encode_parts(parts), Answer.from_response, accept, timeout)


def explain(
    name: str,
    data: Input,
    *,
    version: str | None = None,
    accept: str = JSON,
    timeout: float | None = None,
) -> Call[Answer]:
    """Ask why the model answers so; `accept` image/png gets a heat map where there is one.

    A dict says what is asked: {"data": base64, "method": ..., "target": ...}. Raises what
    predict raises; an AnswerError of 501 where this model explains nothing in this way.
    """
    path = model_path(name, version, root="/explanations")
    return _post(path, encode_input(data), Answer.from_response, accept, timeout)


def predict_v1(
    name: str,
    instances: Sequence[Any],
    *,
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Call[list[Any]]:
    """Ask by KServe's v1 protocol, and return the list of predictions.

    Bytes, files and arrays within the instances are sent as JSON can. The protocol's own route
    knows no versions: a version is asked for at /predictions, in the same form.
    """
    path = _choose_path(f"{model_path(name, root='/v1/models')}:predict", name, version)
    read = _read_json(path, lambda answer: list(answer["predictions"]))
    return _post(path, _encode_v1(instances, parameters), read, None, timeout)


def explain_v1(
    name: str,
    instances: Sequence[Any],
    *,
    version: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Call[list[Any]]:
    """Ask for explanations by KServe's v1 protocol, and return the list of them."""
    path = f"{model_path(name, root='/v1/models')}:explain"
    path = _choose_path(path, name, version, root="/explanations")
    read = _read_json(path, lambda answer: list(answer["explanations"]))
    return _post(path, _encode_v1(instances, parameters), read, None, timeout)


def infer(
    name: str,
    inputs: Mapping[str, Any] | Sequence[Tensor],
    *,
    version: str | None = None,
    id: str = "",
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> Call[Inference]:
    """Ask by the Open Inference Protocol (KServe v2): arrays by name in, arrays by name out.

    A list of bytes, files or texts is a tensor of BYTES. The protocol's own route knows no
    versions on TorchServe: a version is asked for at /predictions, in the same form.
    """
    path = _choose_path(f"{model_path(name, root='/v2/models')}/infer", name, version)
    tensors = (
        [Tensor.create(key, values) for key, values in inputs.items()]
        if isinstance(inputs, Mapping)
        else inputs
    )
    body: dict[str, Any] = {"inputs": [tensor.to_json() for tensor in tensors]}
    body |= {"id": id} if id else {}
    body |= {"parameters": parameters} if parameters else {}
    read = _read_json(path, Inference.from_response)
    return _post(path, Body(JSON, encode_json(body)), read, None, timeout)


def ask_health(*, timeout: float | None = None) -> Call[Health]:
    """Ask the inference API whether the server is up."""
    # A status of 500 is TorchServe's way to say that workers are missing.
    return Call(
        "inference",
        "GET",
        "/ping",
        lambda response, _: Health.from_response(response),
        safe=False,  # not sent again: see Call.safe
        timeout=timeout,
        answers=frozenset({500}),
    )


def read_metrics(*, names: Sequence[str] = (), timeout: float | None = None) -> Call[Metrics]:
    """Read what server and models count, or only the metrics of these names."""
    query = "&".join(f"name%5B%5D={quote(name, safe='')}" for name in names)
    return Call(
        "metrics",
        "GET",
        "/metrics" + (f"?{query}" if query else ""),
        lambda response, _: Metrics.from_response(response.body.decode("utf-8", "replace")),
        safe=True,
        timeout=timeout,
    )


def read_metrics_text(*, timeout: float | None = None) -> Call[str]:
    """Read what server and models count as the text that it is, which takes a tenth of the time."""
    return Call(
        "metrics",
        "GET",
        "/metrics",
        lambda response, _: response.body.decode("utf-8", "replace"),
        safe=True,
        timeout=timeout,
    )


def read_openapi(
    api: Literal["inference", "management"] = "inference",
    *,
    model: str | None = None,
    version: str | None = None,
    timeout: float | None = None,
) -> Call[dict[str, Any]]:
    """Read how an API describes itself, or one model of it, in OpenAPI's form."""
    root = "/predictions" if api == "inference" else "/models"
    path = "/" if model is None else model_path(model, version, root=root)
    read = _read_json(path, dict)
    return Call(api, "OPTIONS", path, read, safe=True, timeout=timeout)


def _post(
    path: str,
    body: Body,
    read: Callable[[Response, float], Result],
    accept: str | None,
    timeout: float | None,
) -> Call[Result]:
    headers = {"Content-Type": body.content_type}
    if accept is not None:
        headers["Accept"] = accept
    # Positions instead of names: this is made for every prediction.
    return Call("inference", "POST", path, read, True, {}, headers, body.content, timeout)


def _encode_v1(instances: Sequence[Any], parameters: Mapping[str, Any] | None) -> Body:
    body = {"instances": list(instances)} | ({"parameters": parameters} if parameters else {})
    return Body(JSON, encode_json(body, other=encode_instance))


def _read_json(path: str, read: Callable[[Any], Result]) -> Callable[[Response, float], Result]:
    return lambda response, _: parse_json(response.body, path, read)


def _choose_path(path: str, name: str, version: str | None, *, root: str = "/predictions") -> str:
    return path if version is None else model_path(name, version, root=root)
