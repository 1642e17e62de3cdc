"""The capture socket: what is kept, and what is not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from marwright.errors import StorageError
from marwright.gateway.capture import Capture


def send(folder: Path, body: bytes, *, length: int | None = None, id: str = "id") -> bytes:
    size = len(body) if length is None else length
    head = (
        f"POST / HTTP/1.0\r\nX-Request-ID: {id}\r\nX-Original-URI: /predictions/cnn?a=1\r\n"
        f"Content-Type: image/png\r\nContent-Length: {size}\r\n\r\n"
    )
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(folder / "capture.sock"))
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


def test_the_latest_requests_are_kept_and_taken_once(tmp_path: Path) -> None:
    with Capture(tmp_path, most=3) as capture:
        assert (tmp_path / "capture.sock").stat().st_mode & 0o777 == 0o600
        for number in range(5):
            assert send(tmp_path, b"%d" % number, id=str(number)).startswith(b"HTTP/1.0 204")
        taken = capture.take()
        assert [(one.request, one.body) for one in taken] == [("2", b"2"), ("3", b"3"), ("4", b"4")]
        assert (taken[0].method, taken[0].path, taken[0].content_type) == (
            "POST",
            "/predictions/cnn?a=1",
            "image/png",
        )
        assert capture.take() == []
        assert capture.dropped == 2
    assert not (tmp_path / "capture.sock").exists()


def test_memory_is_bounded(tmp_path: Path) -> None:
    with Capture(tmp_path, body_bytes=100, all_bytes=250) as capture:
        for _ in range(4):
            send(tmp_path, b"x" * 100)
        assert send(tmp_path, b"x" * 101).startswith(b"HTTP/1.0 413")
        assert len(capture.take()) == 2
        assert capture.dropped == 3


@pytest.mark.parametrize("length", [10, -1])
def test_a_copy_that_broke_off_is_not_kept(tmp_path: Path, length: int) -> None:
    with Capture(tmp_path) as capture:
        send(tmp_path, b"half", length=length)
        send(tmp_path, b"whole")
        assert [one.body for one in capture.take()] == [b"whole"]
        assert capture.dropped == 1


def test_a_folder_has_one_capture(tmp_path: Path) -> None:
    with Capture(tmp_path), pytest.raises(StorageError, match="in use"), Capture(tmp_path):
        pass
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "capture.sock"))
    with Capture(tmp_path):
        assert send(tmp_path, b"x")
