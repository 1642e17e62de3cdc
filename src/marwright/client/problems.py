"""What TorchServe's and a handler's error answers mean, as members of the family of errors."""

from __future__ import annotations

import json
from typing import Any

from marwright.client.calls import Response
from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    TokenRejectedError,
    WorkerLostError,
)

__all__ = ["translate"]

# TorchServe's exception names (org.pytorch.serve.archive, .http, .util) in the body's "type".
_ERRORS: dict[str, tuple[type[AnswerError], str]] = {
    "InvalidKeyException": (TokenRejectedError, "pass the server's key file with --key-file"),
    "ModelNotFoundException": (ModelNotFoundError, "see what is there: marwright models list"),
    "ModelVersionNotFoundException": (
        ModelNotFoundError,
        "see which versions there are: marwright models show NAME",
    ),
    "ConflictStatusException": (ConflictError, "unregister it first, or register another version"),
    "ServiceUnavailableException": (
        OverloadedError,
        "wait until a worker is READY, or add workers: marwright models scale",
    ),
    "InvalidModelVersionException": (ConflictError, "make another version the default first"),
    "MethodNotAllowedException": (
        ConflictError,
        "use the endpoint that marwright serve wrote, or start the server with "
        "enable_model_api=true",
    ),
}
_WANTS_TLS = b"This TorchServe instance only accepts HTTPS requests"
"""What org.pytorch.serve.http.ExtendedSSLHandler answers to who speaks without TLS."""
# org.pytorch.serve.wlm.WorkerThread says so to whoever waits for a worker that ended. The status
# is 500, or 507 where the process was killed.
_LOSSES = ("Worker died.", "Worker scaled down.")


def translate(response: Response, request: str) -> ClientError:
    """Return the error that fits TorchServe's or a handler's answer; `request` names the call."""
    status, body = response.status, response.body
    if status == 403 and _WANTS_TLS in body:
        return ConnectionFailedError(
            f"{request} was sent without TLS",
            expected="an https address",
            remedy="write https:// in place of http://, and name the server's certificate",
        )
    problem = _read_problem(body)
    if "type" in problem and "message" in problem and "code" in problem:
        # The first sentence: some go on about features that were not asked for.
        message = " ".join(str(problem["message"]).split()).split(". ")[0]
        if message in _LOSSES:
            return WorkerLostError(
                f"{message} ({status})",
                status=status,
                body=body,
                remedy="send it again; where it happens each time, look at the server's log",
            )
        kind, remedy = _ERRORS.get(str(problem["type"]), (AnswerError, ""))
        return kind(f"{message} ({status})", status=status, body=body, remedy=remedy)
    text = str(problem.get("detail") or body[:200].decode("utf-8", "replace") or response.reason)
    if status in {429, 503}:
        return OverloadedError(f"{request} answered {status}: {text}", status=status, body=body)
    kind = InputRejectedError if 400 <= status < 500 else AnswerError
    remedy = "send less, or raise max_request_size or the handler's limits" if status == 413 else ""
    return kind(f"{request} answered {status}: {text}", status=status, body=body, remedy=remedy)


def _read_problem(body: bytes) -> dict[str, Any]:
    """Return the JSON object that an error's body is; {} for any other."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return problem if isinstance(problem, dict) else {}
