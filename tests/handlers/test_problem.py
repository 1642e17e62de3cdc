from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Import = Callable[[str], Any]

STATUSES = {
    400: "Bad Request",
    406: "Not Acceptable",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    500: "Internal Server Error",
    501: "Not Implemented",
    507: "Insufficient Storage",
}


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_has_the_name_that_the_rfc_gives_it(handlers: Import, status: int) -> None:
    problem = handlers("problem")
    body = json.loads(problem.make_problem(status, "why"))
    assert body == {"title": STATUSES[status], "status": status, "detail": "why"}
    assert problem.title_of(status) == STATUSES[status]


def test_a_problem_is_compact_json_without_what_it_does_not_say(handlers: Import) -> None:
    body = handlers("problem").make_problem(415, "expected npy")
    assert body == b'{"title":"Unsupported Media Type","status":415,"detail":"expected npy"}'


def test_an_instance_is_a_urn(handlers: Import) -> None:
    body = json.loads(handlers("problem").make_problem(500, "why", instance="1-2"))
    assert body["instance"] == "urn:uuid:1-2"


@pytest.mark.parametrize("detail", ['a "quoted" \\ word', "two\nlines", "ü \ud800 \x00"])
def test_a_problem_is_json_whatever_its_detail(handlers: Import, detail: str) -> None:
    body = handlers("problem").make_problem(400, detail)
    assert json.loads(body)["detail"] == detail
    assert body.isascii()
    assert b"\n" not in body


def test_a_rejection_reads_as_its_reason(handlers: Import) -> None:
    rejected = handlers("problem").RejectedInput(422, "expected another shape")
    assert (rejected.status, rejected.detail) == (422, "expected another shape")
    assert str(rejected) == "expected another shape"
