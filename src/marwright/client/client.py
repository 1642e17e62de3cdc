"""One object for one server: predict, ask for health, and manage its models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from marwright.client.endpoint import Endpoint
from marwright.client.models import Models, model_path
from marwright.client.results import Answer, Health, parse_json
from marwright.client.tokens import TokenFile
from marwright.client.transport import Transport
from marwright.errors import AnswerError, UsageError
from marwright.storage import translate_os_errors

__all__ = ["Client"]


class Client:
    """Talks to one server; use it in a `with` block, or call `close`.

    Example:
        with Client(Endpoint("http://127.0.0.1:8080", "http://127.0.0.1:8081")) as client:
            print(client.predict("cnn", Path("seven.png")).json())

    `timeout` is in seconds and holds for each try; `start_timeout` for calls that wait for workers.
    An injected session is used as it is and stays open.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 30.0,
        start_timeout: float = 300.0,
        session: requests.Session | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._session = session or requests.Session()
        self._owns_session = session is None
        if session is None:
            self._session.trust_env = False  # no proxy and no .netrc between us and loopback
        tokens = TokenFile(endpoint.key_file) if endpoint.key_file else None
        self._inference = Transport(
            self._session,
            endpoint.inference_url,
            purpose="inference",
            tokens=tokens,
            timeout=timeout,
            renew_url=endpoint.management_url,
        )
        management = Transport(
            self._session,
            endpoint.management_url,
            purpose="management",
            tokens=tokens,
            timeout=timeout,
        )
        self.models = Models(management, start_timeout=start_timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless the session was injected."""
        if self._owns_session:
            self._session.close()

    def predict(
        self,
        name: str,
        data: bytes | Path | Mapping[str, object],
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Send one input: bytes or a file as the body, a dict as JSON.

        Raises:
            InputRejectedError: the handler refused the input; the error's text says why.
            ModelNotFoundError: no such model or version.
            OverloadedError: no room in the queue, or no worker, after three retries.
        """
        path = model_path(name, version, root="/predictions")
        return self._answer(path, timeout, **_make_body(data))

    def explain(
        self,
        name: str,
        data: bytes | Path | Mapping[str, object],
        *,
        version: str | None = None,
        accept: str = "application/json",
        timeout: float | None = None,
    ) -> Answer:
        """Ask why the model answers so; `accept` image/png gets a heat map where there is one.

        A dict says what is asked: {"data": base64, "method": ..., "target": ...}. Raises what
        predict raises; an AnswerError of 501 where this model explains nothing in this way.
        """
        path = model_path(name, version, root="/explanations")
        body = _make_body(data)
        body["headers"]["Accept"] = accept
        return self._answer(path, timeout, **body)

    def predict_parts(
        self,
        name: str,
        parts: dict[str, bytes],
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Send one input as multipart/form-data, each part under its name."""
        path = model_path(name, version, root="/predictions")
        return self._answer(path, timeout, files=dict(parts))

    def health(self) -> Health:
        """Ask the inference API whether the server is up."""
        try:
            response = self._inference.send("GET", "/ping", retry=False)
        except AnswerError as exc:
            if exc.status == 500:  # TorchServe's way to say that workers are missing
                return Health(status="Unhealthy")
            raise
        return parse_json(
            response.content, "GET /ping", lambda answer: Health(status=str(answer["status"]))
        )

    def _answer(self, path: str, timeout: float | None, **body: Any) -> Answer:
        started = time.perf_counter()
        response = self._inference.send("POST", path, retry=True, timeout=timeout, **body)
        return Answer(
            status=response.status_code,
            content_type=response.headers.get("Content-Type", ""),
            body=response.content,
            request_id=response.headers.get("x-request-id", ""),
            seconds=time.perf_counter() - started,
        )


def _make_body(data: bytes | Path | Mapping[str, object]) -> dict[str, Any]:
    """Return one input as what is posted: bytes or a file as they are, a dict as JSON."""
    if isinstance(data, Mapping):
        return {"data": _encode(data), "headers": {"Content-Type": "application/json"}}
    if isinstance(data, Path):
        with translate_os_errors(f"read {data}"):
            data = data.read_bytes()
    return {"data": data, "headers": {"Content-Type": "application/octet-stream"}}


def _encode(data: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(dict(data), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise UsageError("the input cannot be sent as JSON", found=str(exc)) from exc
