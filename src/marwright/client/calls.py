"""What is said between a client and a server, before any library sends it.

An operation is a function that returns steps: one call, or a script that yields several. `Client`
and `AsyncClient` take the same steps, so that each operation is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

__all__ = ["AnySteps", "Api", "Call", "Pause", "Request", "Response", "Script", "Steps"]

Api = Literal["inference", "management", "metrics"]
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)  # tokens are among them
    body: bytes = field(repr=False)
    timeout: float
    """Seconds that are left for it."""
    limit: float
    """Seconds that the whole call may take; an error names them."""


@dataclass(frozen=True)
class Response:
    """One answer as it came, whatever its status."""

    status: int
    reason: str
    headers: Mapping[str, str]
    """Any case will do for the names."""
    body: bytes


@dataclass(frozen=True)
class Pause:
    """A wait before the next step."""

    seconds: float


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One thing to ask of one API of a server, and how to read the answer."""

    api: Api
    method: str
    path: str
    read: Callable[[Response, float], Result]
    """Makes the result of a successful answer and of the seconds that it took."""
    safe: bool
    """Whether it may be sent twice: reading, and predictions, which handlers do not remember.

    Health is read, and yet asked for once: whoever asks wants to know how it is now, and that
    nobody answers is what was asked for.
    """
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    timeout: float | None = None
    """Seconds for the whole call; None takes the client's."""
    starts_workers: bool = False
    """Whether it waits until models are loaded, and so takes `start_timeout` for its limit."""
    answers: frozenset[int] = frozenset()
    """Error statuses that are answers all the same."""

    def __iter__(self) -> Generator[Call[Any], Any, Result]:
        """Ask this alone: a call is the shortest script, and `yield from` it gives its result."""
        result: Result = yield self
        return result


class AnySteps(Protocol[Result_co]):
    """Steps whose calls are REST's or gRPC's."""

    def __iter__(self) -> Generator[Any, Any, Result_co]:
        """Yield what to do; take the result of each."""
        ...


class Steps(Protocol[Result_co]):
    """One call, or a script of several."""

    def __iter__(self) -> Generator[Call[Any] | Pause, Any, Result_co]:
        """Yield what to do; take the result of each."""
        ...


Script = Generator[Call[Any] | Pause, Any, Result]
