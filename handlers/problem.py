"""What a client reads when its request is refused or fails: RFC 9457 problem details."""

from __future__ import annotations

import json
from http import HTTPStatus

__all__ = ["RejectedInput", "make_problem", "PROBLEM_TYPE", "title_of"]

PROBLEM_TYPE = "application/problem+json"

# Names of RFC 9110; http.HTTPStatus has them from Python 3.13 only.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}


class RejectedInput(Exception):
    """One request that cannot be answered: the HTTP status it gets, and why."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def title_of(status: int) -> str:
    """Return a status' short name."""
    return _TITLES.get(status) or HTTPStatus(status).phrase


def make_problem(status: int, detail: str, *, instance: str = "") -> bytes:
    """Return the body of a failed request's answer.

    `instance` is the id under which the worker's log tells more; it is given where the fault is
    not the client's.
    """
    problem = {"title": title_of(status), "status": status, "detail": detail}
    if instance:
        problem["instance"] = f"urn:uuid:{instance}"
    return json.dumps(problem, separators=(",", ":")).encode()
