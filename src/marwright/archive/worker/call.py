"""One call of a handler: how it ended, and what was wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from ts.utils.util import PredictionException

from marwright.archive.worker.answer import Failure, FailureKind
from marwright.archive.worker.protocol import ProtocolError
from marwright.archive.worker.trace import describe

__all__ = ["Call"]

_KINDS: dict[str, FailureKind] = {
    # What ts/service.py and ts/protocol/otf_message_handler.py reply.
    "Invalid model predict output": "not-a-list",
    "number of batch response mismatched": "wrong-count",
    "Unsupported model output data type.": "not-serialisable",
}


class Call:
    """What TorchServe does not pass on: the exception, or what was returned."""

    def __init__(self, roots: Sequence[str]) -> None:
        """`roots` are the handler's folders."""
        self._roots = roots
        self.requests = 0
        self.returned: Any = None
        self.raised: BaseException | None = None

    def explain(self, message: str) -> Failure | None:
        """Return why a worker replied with this message; None where it is an answer."""
        if self.raised is not None:
            return self._describe(self.raised, _tell_kind(self.raised))
        kind = _KINDS.get(message)
        return Failure(kind, self._describe_returned(kind)) if kind else None

    def explain_death(self, error: BaseException) -> Failure:
        """Return why there is no reply, or none that the frontend can read."""
        if isinstance(error, ProtocolError):
            return Failure("worker-died", str(error))
        return self._describe(error, "worker-died")

    def _describe(self, error: BaseException, kind: FailureKind) -> Failure:
        trace = describe(error, self._roots)
        # What TorchServe raises over an answer has no place in the handler.
        return Failure(kind, trace.reason, trace.place if self.raised else "", trace.text)

    def _describe_returned(self, kind: FailureKind) -> str:
        if kind == "not-a-list":
            return f"{type(self.returned).__name__} instead of a list with {self.requests} answers"
        if kind == "wrong-count":
            return f"{len(self.returned)} answers to {self.requests} requests"
        for number, value in enumerate(self.returned):
            try:
                if not isinstance(value, (bytes, bytearray, str, torch.Tensor)):
                    json.dumps(value)
            except TypeError as exc:
                return f"answer {number}: {exc}"
        return "an answer that is no JSON"


def _tell_kind(error: BaseException) -> FailureKind:
    """Tell errors apart as Service.predict does (ts/service.py)."""
    if isinstance(error, MemoryError):
        return "out-of-memory"
    if isinstance(error, PredictionException):
        return "refusal"
    return "out-of-memory" if "CUDA" in str(error) else "exception"
