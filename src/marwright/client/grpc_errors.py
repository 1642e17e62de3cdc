"""What a failed gRPC call means: status codes and TorchServe's texts, as our errors.

The code alone says little: TorchServe 0.12 has INTERNAL for a missing model, a full queue and a
dead worker alike (org.pytorch.serve.grpcimpl), so that the text decides where it is known. The
text's last line is the name of a Java exception.
"""

from __future__ import annotations

import json
import re

from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    WorkerLostError,
)

__all__ = ["raise_problem", "translate_status", "UNEXPLAINED"]

UNEXPLAINED = "the server gave no reason"
"""What stands in the error where TorchServe let an exception fall: UNKNOWN and no text."""

_Kind = tuple[type[AnswerError], int, str]
"""The error, the HTTP status that the REST API would answer, and what to do."""

_TOKEN: _Kind = (TokenRejectedError, 400, "pass the server's key file, and look at its clock")
_NOT_FOUND: _Kind = (ModelNotFoundError, 404, "see what is there: models.list()")
_CONFLICT: _Kind = (ConflictError, 409, "")
_REJECTED: _Kind = (InputRejectedError, 400, "")
_LOST: _Kind = (WorkerLostError, 500, "the server's log has the worker's traceback")

_TEXTS: tuple[tuple[str, _Kind], ...] = (
    ("Token Authorization failed", _TOKEN),
    ("x-marwright-key", (ConflictError, 405, "use the endpoint that marwright serve wrote")),
    ("Model API disabled", (ConflictError, 405, "start the server with enable_model_api=true")),
    ("has no worker to serve", (OverloadedError, 503, "wait for a READY worker, or add workers")),
    # StreamPredictions2 sends these without the exception's name.
    ("Model not found", _NOT_FOUND),
    ("does not exist for model", _NOT_FOUND),
    ("Worker died", _LOST),
    ("Worker scaled down", _LOST),
    (
        "RST_STREAM",  # grpc-java's way to refuse a message above the limit
        (InputRejectedError, 413, "the server breaks off what is above its max_request_size"),
    ),
    (
        "Received message larger than max",
        (AnswerError, 200, "make the client with a larger max_message_bytes"),
    ),
)
_JAVA: dict[str, _Kind] = {
    "ModelNotFoundException": _NOT_FOUND,
    "ModelVersionNotFoundException": _NOT_FOUND,
    "BadRequestException": _REJECTED,
    "ModelException": (AnswerError, 400, ""),
    "InvalidModelException": (AnswerError, 400, ""),
}
_CODES: dict[str, _Kind] = {
    "INVALID_ARGUMENT": _REJECTED,
    "FAILED_PRECONDITION": _REJECTED,
    "OUT_OF_RANGE": _REJECTED,
    "UNAUTHENTICATED": _TOKEN,
    "PERMISSION_DENIED": _TOKEN,
    "NOT_FOUND": _NOT_FOUND,
    "ABORTED": _CONFLICT,
    "ALREADY_EXISTS": _CONFLICT,
    "RESOURCE_EXHAUSTED": (OverloadedError, 429, ""),
    "UNIMPLEMENTED": (AnswerError, 501, ""),
    "UNAVAILABLE": (AnswerError, 503, "the server's log has the handler's traceback"),
}


def translate_status(code: str, details: str, *, method: str, address: str) -> ClientError:
    """Return the error that fits a gRPC status: its name, such as NOT_FOUND, and its text."""
    text, java = _split(details)
    if code == "DEADLINE_EXCEEDED":  # its text may be of the stream that the server reset
        return RequestTimeoutError(
            f"no answer to {method} from {address} in time",
            remedy="give it a longer timeout, or look at the server's log",
        )
    for phrase, kind in _TEXTS:
        if phrase in details:
            return _make(kind, f"{text} ({code})")
    if method == "StreamPredictions2" and (not text or "HALF_CLOSED" in text):
        # TorchServe 0.12 stumbles over a model without sequences, and at times over the connection.
        kind = (AnswerError, 500, "look whether the model is configured for sequences")
        return _make(kind, f"{method}: {UNEXPLAINED} ({code})")
    if code in {"UNAVAILABLE", "CANCELLED"} and not java:  # gRPC's own word, not TorchServe's
        return ConnectionFailedError(
            f"no gRPC server answers at {address}",
            found=text,
            remedy="start one with marwright serve, or check the address and whether it has TLS",
        )
    kind = _JAVA.get(java) or _CODES.get(code, (AnswerError, 500, ""))
    return _make(kind, f"{text} ({code})" if text else f"{method}: {UNEXPLAINED} ({code})")


def _make(kind: _Kind, message: str) -> AnswerError:
    error, status, remedy = kind
    return error(message, status=status, remedy=remedy)


def _split(details: str) -> tuple[str, str]:
    """Return the text's first sentence, and the short name of the Java exception below it."""
    text, _, last = details.strip().rpartition("\n")
    # InferenceImpl writes "InternalServerException.()", the others a full name.
    name = re.fullmatch(r"(?:[\w$]+\.)*(\w+Exception)(?:\.\(\))?", last.strip())
    if name is None:
        text = details
    # Some go on about features that were not asked for.
    return " ".join(text.split()).split(". ")[0], name[1] if name else ""


def raise_problem(body: bytes) -> None:
    """Raise the error that one of marwright's handlers wrote as its answer.

    TorchServe drops over gRPC the status that a handler sets, so that the body has to tell: RFC
    9457 problem details, as handlers/problem.py writes them.

    Raises:
        AnswerError: the member of the family that the same answer gets over REST.
    """
    if not body.startswith(b'{"title":') or len(body) > 1 << 16:
        return
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return
    if not {"title", "status", "detail"} <= set(problem) <= {*_PROBLEM, "instance"}:
        return
    status = problem["status"]
    if not isinstance(status, int) or not 400 <= status < 600:
        return
    kind: type[AnswerError] = InputRejectedError if status < 500 else AnswerError
    if status in {429, 503}:
        kind = OverloadedError
    raise kind(f"the handler answered {status}: {problem['detail']}", status=status, body=body)


_PROBLEM = ("title", "status", "detail")
