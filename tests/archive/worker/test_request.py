from __future__ import annotations

from pathlib import Path

import pytest

from marwright.archive.worker.request import Parameter, Part, Request
from marwright.errors import StorageError, UsageError


def test_a_path_is_read_and_text_encoded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert Request.of(tmp_path / "file").to_message().parameters == (Parameter("body", "", b"abc"),)
    assert Request("é").to_message().parameters == (Parameter("body", "", b"\xc3\xa9"),)
    assert Request.of(b"x") == Request(b"x")


@pytest.mark.parametrize(
    ("content_type", "seen"),
    [
        ("application/json", "application/json"),
        ("application/json; charset=utf-8", "application/json"),
        ("application/json ;x", "application/json "),
        ("multipart/form-data", "multipart/form-data"),
        ("", ""),
    ],
)
def test_a_content_type_ends_at_its_semicolon(content_type: str, seen: str) -> None:
    message = Request(b"", content_type=content_type).to_message()
    assert message.parameters[0].content_type == seen


def test_a_content_type_may_stand_among_the_headers() -> None:
    message = Request(b"", headers={"content-TYPE": "text/plain"}).to_message()
    assert message.parameters[0].content_type == "text/plain"
    assert message.headers["content-TYPE"] == "text/plain"


def test_the_handler_sees_the_frontends_own_headers() -> None:
    message = Request(b"abc", headers={"X-Own": "1"}).to_message()
    assert message.headers == {
        "X-Own": "1",
        "Content-Length": "3",
        "url_path": "",
        "explain": "False",
    }


def test_only_files_among_the_parts_keep_their_content_type() -> None:
    parts = (
        Part("field", "text"),
        Part(" file ", b"x", "image/png"),
        Part("json", b"{}", "application/json; charset=utf-8"),
        Part("odd", b"", "a/b; c=d"),
    )
    message = Request(parts=parts).to_message()
    assert [(item.name, item.content_type) for item in message.parameters] == [
        ("field", ""),
        ("file", "image/png"),
        ("json", "application/json"),
        ("odd", "c=d"),
    ]
    assert message.headers["Content-Type"] == "multipart/form-data"
    assert message.body_bytes == len(b"text" + b"x" + b"{}")


def test_an_encoded_multipart_body_is_refused() -> None:
    with pytest.raises(UsageError, match="pass its parts"):
        Request(b"--x", content_type="multipart/form-data; boundary=x").to_message()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        Request(tmp_path / "absent").to_message()
