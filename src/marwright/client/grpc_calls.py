"""The way of a gRPC call to its answer: metadata, tokens, deadlines and retries.

What can be asked stands in grpc_inference and grpc_models, as functions that return steps. A driver
sends what a Caller makes of them, by threads that wait or by tasks that await.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from marwright.client.calls import AnySteps, Pause, Request
from marwright.client.endpoint import Endpoint
from marwright.client.exchange import Deadline, Exchanges
from marwright.client.grpc_protocol import INSTALL, Method, Protocol, read_protocol
from marwright.client.retries import Attempts, Retries
from marwright.client.tokens import Purpose
from marwright.errors import ClientError, TokenRejectedError, UsageError
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from google.protobuf.message import Message

__all__ = ["Attempt", "Call", "Caller", "MESSAGE_BYTES", "Script", "Step"]

Result = TypeVar("Result")

MESSAGE_BYTES = 64 * 1024 * 1024
"""What a message may have at most; gRPC's own 4 MB are less than TorchServe's max_response_size."""
CHANGES = frozenset({"RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel"})
"""What asks for the supervisor's key, where the server has one."""
LONGEST_SECONDS = 1e8
"""gRPC knows no endless deadline: three years."""


@dataclass(frozen=True)
class Attempt:
    """One message to send once; what it brings is the answer, or the stream that was opened."""

    method: Method
    message: Message = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)  # the token is in it
    timeout: float
    """Seconds that are left."""


Step = Attempt | Request | Pause
"""What a driver takes; a request asks for a fresh token, which only REST can."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One thing to ask, and how to read the answer."""

    method: str
    fields: Mapping[str, Any] = field(repr=False)
    read: Callable[[Any, float], Result]
    """Makes the result of an answer and of the seconds that it took."""
    safe: bool
    """Whether it may be sent twice; as in calls.Call."""
    timeout: float | None = None
    """Seconds for the whole call; None takes the client's."""
    starts_workers: bool = False
    """Whether it waits until models are loaded, and so takes `start_timeout` for its limit."""

    def __iter__(self) -> Generator[Call[Any], Any, Result]:
        """Ask this alone: a call is the shortest script, and `yield from` it gives its result."""
        result: Result = yield self
        return result


Script = Generator[Call[Any], Any, Result]


class Caller:
    """What both clients know: the server, its protocol and tokens, and how long to be patient."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        start_timeout: float,
        retries: Retries | None,
        random: Callable[[], float],
        jar: Path | None,
        max_message_bytes: int,
    ) -> None:
        try:
            import grpc  # noqa: F401  # now, not at the first call
        except ImportError as exc:
            raise UsageError("gRPC needs the package grpcio", remedy=INSTALL) from exc
        self.endpoint = endpoint
        self.protocol: Protocol = read_protocol(jar)
        self.options = _make_options(max_message_bytes)
        self._exchanges = Exchanges(endpoint, timeout, start_timeout, retries or Retries(), random)

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

    def run(self, steps: AnySteps[Result]) -> Generator[Step, Any, Result]:
        """Take steps to their result; all of them have the time of the first."""
        return self._exchanges.expand(steps, self._ask)

    def _ask(self, call: Call[Result], deadline: Deadline) -> Generator[Any, Any, Result]:
        """Send a call until it is answered, may not be sent again, or its time is over."""
        method = self.protocol.find(call.method)
        message = method.request(**call.fields)
        exchanges = self._exchanges
        attempts = Attempts()
        while True:
            started = time.perf_counter()
            token = ""
            try:
                token = yield from exchanges.find_token(method.purpose, deadline)
                metadata = self._make_metadata(method, token)
                # Without any time left gRPC would send it all the same.
                left = min(deadline.need(f"for {call.method}"), LONGEST_SECONDS)
                answer = yield Attempt(method, message, metadata, left)
                return call.read(answer, time.perf_counter() - started)
            except ClientError as exc:
                error = exc
            if isinstance(error, TokenRejectedError) and error.status:
                # A rejected call had no effect, so sending it again is safe for all of them.
                if (yield from exchanges.replace_token(method.purpose, token, attempts, deadline)):
                    continue
                raise error
            yield exchanges.wait(
                call.method, error, attempts, deadline, method.purpose, safe=call.safe
            )

    def _make_metadata(self, method: Method, token: str) -> tuple[tuple[str, str], ...]:
        """Return the token as GRPCInterceptor reads it, and for changes the supervisor's key.

        Nothing where the endpoint names neither file.

        Raises:
            TokenRejectedError: the key cannot be read.
        """
        metadata = []
        if token:
            metadata.append(("authorization", f"Bearer {token}"))
        key = self._exchanges.supervisor_key
        if key is not None and method.path.rpartition("/")[2] in CHANGES:
            metadata.append(("x-marwright-key", key.read()))
        return tuple(metadata)


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
