"""The gRPC calls, each said once: what is sent, whether twice, and what is read of the answer.

An operation is a script: a generator that yields steps and is given what they bring. GrpcClient and
AsyncGrpcClient differ only in how they take a step.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import requests

from marwright.client.calls import Pause
from marwright.client.endpoint import Endpoint
from marwright.client.grpc_errors import raise_problem, translate_status
from marwright.client.grpc_protocol import INSTALL, Method, Protocol, read_protocol
from marwright.client.inputs import Input, encode_input
from marwright.client.results import Answer, Health, parse_json
from marwright.client.retries import Retries
from marwright.client.tokens import KeyText, Purpose, TokenFile
from marwright.errors import (
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["Attempt", "Call", "Caller", "MESSAGE_BYTES", "Renewal", "Script"]

Result = TypeVar("Result")

MESSAGE_BYTES = 64 * 1024 * 1024
"""What a message may have at most; gRPC's own 4 MB are less than TorchServe's max_response_size."""
BODY = "body"
"""The input's name, as the REST API names a body that is no form."""
CHANGES = frozenset({"RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel"})
"""What asks for the supervisor's key, where the server has one."""
LONGEST_SECONDS = 1e8
"""gRPC knows no endless deadline: three years."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One message to send once; what it brings is the answer, or the stream that was opened."""

    method: Method
    message: Message = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)  # the token is in it
    timeout: float
    """Seconds that are left."""


@dataclass(frozen=True)
class Renewal:
    """A token to renew over REST, the only way there is; what it brings is whether it worked."""

    purpose: Purpose


Script = Generator[Attempt | Renewal | Pause, Any, Result]


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One thing to ask, and how to read the answer."""

    method: str
    fields: Mapping[str, Any]
    read: Callable[[Any], Result]
    safe: bool
    """Whether it may be sent twice: reading, and predictions, which handlers do not remember."""


class Caller:
    """What both clients know: the server, its protocol and tokens, and how long to be patient."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        start_timeout: float,
        retries: Retries | None,
        jar: Path | None,
        max_message_bytes: int,
    ) -> None:
        try:
            import grpc  # noqa: F401  # now, not at the first call
        except ImportError as exc:
            raise UsageError("gRPC needs the package grpcio", remedy=INSTALL) from exc
        self.endpoint = endpoint
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.retries = retries or Retries()
        self.protocol: Protocol = read_protocol(jar)
        self.options = _make_options(max_message_bytes)
        self._tokens = TokenFile(endpoint.key_file) if endpoint.key_file else None
        self._key = KeyText(endpoint.supervisor_key) if endpoint.supervisor_key else None

    def find_address(self, purpose: Purpose) -> str:
        """Return HOST:PORT of one service.

        Raises:
            UsageError: the endpoint does not name it.
        """
        endpoint = self.endpoint
        address = endpoint.grpc_inference if purpose == "inference" else endpoint.grpc_management
        if not address:
            raise UsageError(
                f"the server's gRPC {purpose} address is not known",
                expected='HOST:PORT, such as "127.0.0.1:7070"',
                remedy=f"make the Endpoint with grpc_{purpose}=",
            )
        return address

    def read_certificate(self) -> bytes | None:
        """Return the PEM to trust; None where the system's own is what counts, or there is no TLS.

        Raises:
            StorageError: it cannot be read.
        """
        path = self.endpoint.certificate
        if path is None:
            return None
        with translate_os_errors(f"read the certificate {path}"):
            return path.read_bytes()

    @property
    def uses_tls(self) -> bool:
        """Whether the server wants TLS: it has a certificate, or its REST address says https."""
        endpoint = self.endpoint
        return endpoint.certificate is not None or endpoint.inference_url.startswith("https://")

    def make_metadata(self, method: Method) -> tuple[tuple[str, str], ...]:
        """Return the token as GRPCInterceptor reads it, and for changes the supervisor's key.

        Nothing where the endpoint names neither file.

        Raises:
            TokenRejectedError: one of them cannot be read.
        """
        metadata = []
        if self._tokens is not None:
            metadata.append(("authorization", f"Bearer {self._tokens.read(method.purpose)}"))
        if self._key is not None and method.path.rpartition("/")[2] in CHANGES:
            metadata.append(("x-marwright-key", self._key.read()))
        return tuple(metadata)

    def start(self, timeout: float | None = None, *, starts_workers: bool = False) -> float:
        """Return the deadline of an operation that begins now, by the monotonic clock."""
        if timeout is None:
            timeout = self.start_timeout if starts_workers else self.timeout
        return time.monotonic() + timeout

    def send(self, call: Call[Result], deadline: float) -> Script[Result]:
        """Send a call until it is answered, may not be sent again, or its time is over."""
        method = self.protocol.find(call.method)
        message = method.request(**call.fields)
        failures = losses = 0
        renewed = False
        if self._tokens is not None and self._tokens.is_due(method.purpose):
            yield Renewal(method.purpose)
        while True:
            left = min(deadline - time.monotonic(), LONGEST_SECONDS)
            if left <= 0:  # gRPC would send it all the same
                raise RequestTimeoutError(
                    f"no time is left for {call.method}", remedy="give it a longer timeout"
                )
            metadata = self.make_metadata(method)
            try:
                return call.read((yield Attempt(method, message, metadata, left)))
            except TokenRejectedError:
                # A rejected call had no effect, so sending it again is safe for all of them.
                if renewed or not (yield Renewal(method.purpose)):
                    raise
                renewed = True
            except (ConnectionFailedError, OverloadedError, WorkerLostError) as exc:
                failures += 1
                losses += isinstance(exc, WorkerLostError)
                spent = failures >= self.retries.tries or losses > self.retries.after_loss
                pause = self.retries.pause(failures, chance=random.random())
                # To wait beyond the deadline would only hide what went wrong.
                if spent or not call.safe or time.monotonic() + pause >= deadline:
                    raise
                _log.debug("%s: %s; trying again in %.2f s", call.method, exc, pause)
                yield Pause(pause)

    def renew(self, purpose: Purpose) -> bool:
        """Ask the management API for a fresh token; return whether it gave one."""
        tokens = self._tokens
        if tokens is None or not self.endpoint.management_url or not tokens.claim(purpose):
            return False
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy and no .netrc between us and loopback
                certificate = self.endpoint.certificate
                session.get(
                    f"{self.endpoint.management_url.rstrip('/')}/token",
                    params={"type": purpose},
                    headers={"Authorization": f"Bearer {tokens.read('API')}"},
                    timeout=self.timeout,
                    verify=str(certificate) if certificate else True,
                ).raise_for_status()
        except (MarwrightError, OSError, ValueError):  # requests' errors are OSErrors
            return False
        finally:
            tokens.release(purpose)
        return True

    def predict(
        self,
        name: str,
        parts: Mapping[str, Input],
        *,
        version: str | None,
        timeout: float | None,
    ) -> Script[Answer]:
        """Ask for one prediction."""
        started = time.monotonic()

        def read(response: Any) -> Answer:
            return read_prediction(response, started)

        call = Call("Predictions", _name_parts(name, parts, version), read, safe=True)
        return (yield from self.send(call, self.start(timeout)))

    def open_stream(
        self, name: str, data: Input, *, version: str | None, timeout: float | None
    ) -> Script[Any]:
        """Ask for a prediction that comes in parts; what comes back is the driver's own."""
        fields = _name_parts(name, {BODY: data}, version)
        call: Call[Any] = Call("StreamPredictions", fields, lambda opened: opened, safe=True)
        return (yield from self.send(call, self.start(timeout)))

    def health(self, timeout: float | None) -> Script[Health]:
        """Ask whether the server is up."""

        def read(response: Any) -> Health:
            text = response.health.encode()
            return parse_json(text, "Ping", lambda value: Health(status=str(value["status"])))

        return (yield from self.send(Call("Ping", {}, read, safe=False), self.start(timeout)))

    def open_sequence(self, timeout: float | None) -> Attempt:
        """Return what begins a sequence of inputs; its message is none of them."""
        method = self.protocol.find("StreamPredictions2")
        left = min(self.start(timeout) - time.monotonic(), LONGEST_SECONDS)
        return Attempt(method, method.request(), self.make_metadata(method), left)

    def make_sequence(self, name: str, *, version: str | None) -> Callable[[Input], Message]:
        """Return a function that makes the messages of a new sequence."""
        request = self.protocol.find("StreamPredictions2").request
        sequence = str(uuid.uuid4())

        def make_message(data: Input) -> Message:
            fields = _name_parts(name, {BODY: data}, version)
            return request(sequence_id=sequence, **fields)

        return make_message

    def read_sequence_answer(self, response: Any, started: float) -> Answer:
        """Return the answer to one input of a sequence.

        Raises:
            ClientError: the member of the family that fits; the stream goes on after it.
        """
        if response.HasField("status"):
            import grpc

            status = response.status
            codes = {code.value[0]: code.name for code in grpc.StatusCode}
            raise translate_status(
                codes.get(status.code, "UNKNOWN"),
                status.message,
                method="StreamPredictions2",
                address=self.endpoint.grpc_inference,
            )
        return read_prediction(response, started)


def read_prediction(response: Any, started: float) -> Answer:
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
        seconds=time.monotonic() - started,
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


def _make_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.enable_http_proxy", 0),  # no proxy between us and loopback
        ("grpc.enable_retries", 0),  # we know what is safe to send twice
        # Otherwise a try within a second of a lost connection would not even look for the server.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    )
