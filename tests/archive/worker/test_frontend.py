from __future__ import annotations

import pytest

from marwright.archive.worker.answer import Answer
from marwright.archive.worker.frontend import make_answer, make_error
from marwright.archive.worker.protocol import Prediction, ProtocolError, Reply


def answer(
    status: int = 200,
    phrase: str = "",
    headers: dict[str, str] | None = None,
    body: bytes = b"body",
) -> Answer:
    headers = headers or {}
    prediction = Prediction(headers.get("content-type", ""), status, phrase, headers, body)
    return make_answer(Reply(200, "words", {"id": prediction}), "id")


@pytest.mark.parametrize(
    ("status", "phrase"),
    [
        (500, "Internal Server Error"),
        (503, "Service Unavailable"),
        (507, "Insufficient Storage"),
        (414, "Request-URI Too Long"),
        (422, "Unprocessable Entity"),
        (418, "Client Error (418)"),
        (299, "Success (299)"),
        (508, "Server Error (508)"),
        (600, "Unknown Status (600)"),
    ],
)
def test_an_errors_phrase_is_nettys(status: int, phrase: str) -> None:
    assert make_error(status, "").phrase == phrase


def test_an_error_is_written_as_gson_writes_it() -> None:
    assert make_error(503, '<ü> & "x"\n\u2028').body == (
        b'{\n  "code": 503,\n  "type": "InternalServerException",\n'
        b'  "message": "<\xc3\xbc> & \\"x\\"\\n\\u2028"\n}\n'
    )


def test_a_workers_413_becomes_507() -> None:
    assert make_answer(Reply(413, "too much", {}), "id").status == 507


@pytest.mark.parametrize(
    ("status", "body", "length"),
    [
        (200, b"body", "4"),
        (404, b"body", "4"),
        (199, b"", None),
        (204, b"", None),
        (205, b"", "0"),
        (304, b"", "4"),
    ],
)
def test_some_statuses_have_no_body(status: int, body: bytes, length: str | None) -> None:
    found = answer(status)
    assert (found.body, found.headers.get("content-length")) == (body, length)


@pytest.mark.parametrize(("status", "connection"), [(399, "keep-alive"), (400, "close")])
def test_an_error_closes_the_connection(status: int, connection: str) -> None:
    assert answer(status).headers["connection"] == connection


def test_the_frontends_headers_replace_a_handlers() -> None:
    headers = answer(
        headers={"Cache-Control": "max-age=5", "Content-Length": "9", "X": "y"}
    ).headers
    assert headers["cache-control"].startswith("no-cache")
    assert headers["content-length"] == "4"
    assert headers["x"] == "y"


def test_the_later_spelling_of_a_content_type_wins() -> None:
    found = answer(headers={"Content-Type": "a/b", "content-type": "c/d"})
    assert found.content_type == found.headers["content-type"] == "a/b"


@pytest.mark.parametrize(("value", "seen"), [("ü", "ü"), ("ł", "?"), ("\ta\r\n b ", "a b ")])
def test_a_header_has_one_byte_for_a_letter(value: str, seen: str) -> None:
    assert answer(headers={"X": value}).headers["x"] == seen


@pytest.mark.parametrize(
    "broken",
    [
        {"headers": {"X y": "1"}},
        {"headers": {"X:": "1"}},
        {"headers": {"": "1"}},
        {"headers": {"Xü": "1"}},
        {"headers": {"X": "a\nb"}},
        {"headers": {"X": "a\x00b"}},
        {"headers": {"content-type": "a\r"}},
        {"phrase": "a\nb"},
        {"status": -1},
    ],
)
def test_what_http_cannot_carry_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        answer(**broken)  # type: ignore[arg-type]  # named by the case


def test_a_negative_status_is_no_error_either() -> None:
    with pytest.raises(ProtocolError, match="-5"):
        make_answer(Reply(-5, "", {}), "id")
