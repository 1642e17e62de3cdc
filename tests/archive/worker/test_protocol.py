from __future__ import annotations

import pytest
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response, retrieve_msg

from marwright.archive.worker.protocol import (
    Connection,
    ProtocolError,
    encode_batch,
    merge_replies,
    read_reply,
)
from marwright.archive.worker.request import Part, Request


def make_context(*headers: dict[str, str]) -> Context:
    context = Context("m", "", {}, 1, None, "0.12.0")
    context.request_processor = [RequestProcessor({}) for _ in headers]
    for index, pairs in enumerate(headers):
        for name, value in pairs.items():
            context.set_response_header(index, name, value)
    return context


def reply(values: list[object] | None, code: int = 200, context: Context = None) -> bytes:
    ids = {0: "a", 1: "b"}
    return bytes(create_predict_response(values, ids, "words", code, context))


def test_torchserve_reads_what_is_encoded() -> None:
    request = Request(
        headers={"X-Own": "ü"},
        parts=(Part("json", b"[1]", "application/json"), Part("ü", "x"), Part("t", b"t", "text/x")),
    )
    command, batch = retrieve_msg(
        Connection(encode_batch({"id": request.to_message(), "other": Request(b"").to_message()}))
    )
    assert command == b"I"
    assert [item["requestId"] for item in batch] == [b"id", b"other"]
    assert batch[0]["headers"][0] == {"name": b"X-Own", "value": "ü".encode()}
    values = {item["name"]: item["value"] for item in batch[0]["parameters"]}
    assert values == {"json": [1], "ü": bytearray(b"x"), "t": "t"}


@pytest.mark.parametrize("decode", ["false", "no"])
def test_torchserves_switch_for_decoding_holds(
    monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", decode)
    message = Request("[1]", content_type="application/json").to_message()
    _, batch = retrieve_msg(Connection(encode_batch({"id": message})))
    assert batch[0]["parameters"][0]["value"] == bytearray(b"[1]")


def test_what_torchserve_encodes_is_read() -> None:
    context = make_context({"content-type": "a/b", "X": "ü"}, {})
    context.set_response_status(404, "Gone", 1)
    read = read_reply(reply(["one", b"\xff"], context=context), 100)
    assert (read.code, read.message) == (200, "words")
    first, second = read.predictions["a"], read.predictions["b"]
    assert first == ("a/b", 200, "", {"content-type": "a/b", "X": "ü"}, b"one")
    assert second == ("", 404, "Gone", {}, b"\xff")


def test_an_error_is_read() -> None:
    read = read_reply(reply(None, 503), 100)
    assert (read.code, read.predictions["b"].body) == (503, b"error")


@pytest.mark.parametrize("cut", [0, 3, 10, -1])
def test_a_reply_that_breaks_off_is_refused(cut: int) -> None:
    with pytest.raises(ProtocolError):
        read_reply(reply(["x", "y"], context=make_context({}, {}))[:cut], 100)


def test_a_reply_that_goes_on_is_refused() -> None:
    with pytest.raises(ProtocolError, match="4 bytes follow"):
        read_reply(reply(["x", "y"], context=make_context({}, {})) + b"more", 100)


def test_a_content_type_that_is_not_ascii_breaks_the_reply() -> None:
    context = make_context({"content-type": "a/ü"}, {})
    with pytest.raises(ProtocolError, match="plain ASCII"):
        read_reply(reply(["x", "y"], context=context), 100)


def test_a_long_answer_is_refused() -> None:
    message = reply(["x" * 101, "y"], context=make_context({}, {}))
    with pytest.raises(ProtocolError, match="101 bytes, where max_response_size is 100"):
        read_reply(message, 100)


def test_a_failure_after_the_first_part_of_a_stream_counts() -> None:
    replies = [
        read_reply(reply(["x", "y"], context=make_context({}, {})), 100),
        read_reply(reply(None, 503), 100),
    ]
    assert merge_replies(replies).code == 503
