"""What a model answers to one request, and what went wrong where it has no answer of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from marwright.errors import ArchiveError

__all__ = ["Answer", "Failure", "FailureKind"]

FailureKind = Literal[
    "exception",  # the handler raised
    "refusal",  # it raised TorchServe's PredictionException, which brings its own status
    "out-of-memory",  # MemoryError, or an error that names CUDA
    "not-a-list",  # it returned something other than a list
    "wrong-count",  # it returned more or fewer answers than there were requests
    "not-serialisable",  # it returned something that TorchServe cannot turn into bytes
    "worker-died",  # what no worker survives: SystemExit, or an answer that breaks the protocol
]


@dataclass(frozen=True)
class Failure:
    """Why a batch has no answers of the handler's own; every request of the batch carries it."""

    kind: FailureKind
    message: str
    """Exception and message, or what was returned; one line."""
    place: str = ""
    """File and line of the handler's innermost frame, such as `handler.py:12`, where known."""
    traceback: str = ""
    """Without TorchServe's own frames; empty where nothing was raised."""


@dataclass(frozen=True)
class Answer:
    """The HTTP answer that TorchServe would send to one request."""

    status: int
    phrase: str
    """What follows the status; empty where a handler sets none, as TorchServe sends none then."""
    content_type: str
    """Empty where a handler sets none, as TorchServe sends none then."""
    headers: Mapping[str, str]
    """All but x-request-id, content-type included, with names in lower case."""
    body: bytes
    seconds: float = field(default=0.0, compare=False)
    """That the worker took for the whole batch; 0 where the request did not reach it."""
    failure: Failure | None = field(default=None, compare=False)
    """None where the handler answered; a 4xx of its own is an answer, not a failure."""

    def json(self) -> Any:
        """Decode the body as JSON.

        Raises:
            ArchiveError: it is something else; see `content_type`.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as exc:
            raise ArchiveError(
                "the model did not answer with JSON",
                found=repr(self.body[:80].decode("utf-8", "replace")),
            ) from exc
