"""The worker's own path, shortened: TorchServe 0.12.0's internals, all of them in this file.

TorchServe's worker reads a request in some thirty small pieces, two socket reads each, logs a line
for it, builds dictionaries nobody asks for and prints a metric that Java parses. Here a batch is
read through one buffer and answered in one write. It is installed only where the files it
replaces are those of 0.12.0, byte for byte; elsewhere, and with `fast_worker: false` under
`handler:`, the worker stays as it is.

The wire format: org.pytorch.serve.util.codec.ModelRequestEncoder and ModelResponseDecoder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from inference_request import Incoming, read_id
from inference_response import InferenceResponse

__all__ = ["BatchReader", "find_unknown", "install", "write_replies"]

_log = logging.getLogger(__name__)

KNOWN = {
    "service": "f18259269551299d25f4e9d2bdc916c8308c10233501df08196cc7cfa2d0d291",
    "protocol.otf_message_handler": (
        "83e82dc62b4a95a362efe4518786c6b389b895b85acaf37721aaff042ec9989a"
    ),
    "model_service_worker": "3640d5ae3d03e229cc1980f8bfbb3642865cb49f9ead1769bf41a30aa4e75343",
}
"""The modules of ts that are replaced in part, and the SHA-256 of 0.12.0's source."""

BUFFER_BYTES = 1 << 18
_INT = struct.Struct("!i")
_END = b"\xff\xff\xff\xff"
"""Where a list ends: a length of -1. No UTF-8 text holds such a byte."""
PREDICT = ord("I")
ID_NAME = b"\0\0\0\x0cx-request-id"
"""A header's name with its length, as the frontend writes it, in small letters."""
MAX_HEADERS = 1 << 17
"""Netty refuses headers above 8 KB long before."""


def install(handler: Any) -> bool:
    """Shorten this worker's path to a handler; return whether that will be done.

    It is left alone, with a line in the log, where TorchServe is another than is known here, and
    silently where there is no worker: in a test, or under `marwright run`.
    """
    worker: Any = sys.modules["__main__"]
    if not hasattr(worker, "TorchModelServiceWorker"):
        return False
    if unknown := find_unknown(*KNOWN):
        _log.warning("fast_worker is off: not TorchServe 0.12.0's own: %s", ", ".join(unknown))
        return False
    service = importlib.import_module("ts.service").Service
    set_socket = service.set_cl_socket

    def take_over(self: Any, connection: socket.socket) -> None:
        """Take the connection once the model is loaded, where requests go straight to us.

        With a service envelope between they do not.
        """
        set_socket(self, connection)
        if self._entry_point == handler.handle:
            reader = BatchReader(connection)
            worker.retrieve_msg = lambda _connection: (b"I", reader.read())
            self.predict = lambda batch: write_replies(batch, handler.answer(batch))

    service.set_cl_socket = take_over
    return True


class BatchReader:
    """Reads batches of requests from the frontend's connection, through one buffer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray(BUFFER_BYTES)
        self._position = 0
        self._end = 0

    def read(self) -> list[Incoming]:
        """Wait for a batch and return its requests, unread.

        Raises:
            SystemExit: the frontend has gone.
            ValueError: what comes is no batch.
        """
        self._position = self._end = 0  # the frontend sends nothing before it has our answer
        self._fill(1)
        command = self._buffer[0]
        self._position = 1
        if command != PREDICT:
            raise ValueError(f"expected a batch from the frontend, found command {command}")
        batch = []
        while (length := self._read_int()) >= 0:
            batch.append(self._read_request(length))
        return batch

    def _read_request(self, id_length: int) -> Incoming:
        identity = str(self._read_bytes(id_length), "utf-8")
        header_id, block = _take_id(self._read_until_end())
        accept, is_explanation = _read_headers(block)
        fields = []
        while (length := self._read_int()) >= 0:
            name = str(self._read_bytes(length), "utf-8")
            content_type = str(self._read_bytes(self._read_int()), "utf-8")
            fields.append((name, self._read_bytes(self._read_int()), content_type))
        return Incoming(identity, fields, "", accept, is_explanation, header_id)

    def _read_int(self) -> int:
        position = self._position
        if self._end - position < 4:
            self._fill(4)
            position = self._position
        self._position = position + 4
        value: int = _INT.unpack_from(self._buffer, position)[0]
        return value

    def _read_bytes(self, length: int) -> bytes | bytearray:
        if length > BUFFER_BYTES:
            return self._read_large(length)
        if self._end - self._position < length:
            self._fill(length)
        start = self._position
        self._position = start + length
        return self._buffer[start : start + length]

    def _read_large(self, length: int) -> bytearray:
        """Read a value that the buffer cannot hold straight into memory of its own."""
        value = bytearray(length)
        known = min(self._end - self._position, length)
        value[:known] = self._buffer[self._position : self._position + known]
        self._position += known
        with memoryview(value) as view:
            while known < length:
                known += self._receive(view[known:])
        return value

    def _read_until_end(self) -> bytes:
        """Read a list of headers whole: their lengths and texts hold no byte of its end."""
        searched = self._position
        while (found := self._buffer.find(_END, searched, self._end)) < 0:
            consumed = self._position
            available = self._end - consumed
            if available >= MAX_HEADERS:
                raise ValueError("expected headers to end, found no end")
            searched = max(consumed, self._end - 3) - consumed
            self._fill(available + 1)
            searched += self._position
        block = bytes(self._buffer[self._position : found])
        self._position = found + 4
        return block

    def _fill(self, needed: int) -> None:
        """Receive until `needed` bytes lie ahead; what was read already makes room."""
        if len(self._buffer) - self._position < needed:
            rest = self._buffer[self._position : self._end]
            self._buffer[: len(rest)] = rest
            self._position, self._end = 0, len(rest)
        with memoryview(self._buffer) as view:
            while self._end - self._position < needed:
                self._end += self._receive(view[self._end :])

    def _receive(self, into: memoryview) -> int:
        count = self._connection.recv_into(into)
        if count == 0:
            _log.info("Frontend disconnected.")
            sys.exit(0)
        return count


def _take_id(block: bytes) -> tuple[str, bytes]:
    """Return the header X-Request-ID, where there is one, and the other headers.

    It differs with every request behind a gateway; the others can then be found in the cache.
    """
    start = block.lower().rfind(ID_NAME)  # the last one, as TorchServe has it
    if start < 0 or not _is_whole(block[:start]):  # it may stand inside another header's value
        return "", block
    begin = start + len(ID_NAME) + 4
    end = begin + int(_INT.unpack_from(block, begin - 4)[0])
    return read_id(block[begin:end].decode("utf-8", "replace")), block[:start] + block[end:]


@lru_cache(maxsize=256)
def _is_whole(block: bytes) -> bool:
    """Tell whether a list of headers ends where a header does."""
    count = position = 0
    while position + 4 <= len(block):
        position += 4 + int(_INT.unpack_from(block, position)[0])
        count += 1
    return position == len(block) and count % 2 == 0


@lru_cache(maxsize=256)
def _read_headers(block: bytes) -> tuple[str, bool]:
    """Return the Accept header and whether an explanation is asked for.

    Cached: the requests of one client carry the same headers.
    """
    headers = dict(_list_headers(block))
    return headers.get("accept", ""), headers.get("explain") == "True"


def _list_headers(block: bytes) -> Iterator[tuple[str, str]]:
    texts = []
    position = 0
    while position < len(block):
        start = position + 4
        position = start + int(_INT.unpack_from(block, position)[0])
        texts.append(block[start:position].decode("utf-8", "replace"))
    for name, value in zip(texts[::2], texts[1::2], strict=False):
        yield name.lower(), value


def write_replies(batch: Sequence[Incoming], responses: Sequence[InferenceResponse]) -> bytes:
    """Return what the frontend reads as the answer to a batch."""
    chunks = [_STATUS]
    for incoming, response in zip(batch, responses, strict=True):
        headers = {"content-type": response.content_type, **response.headers}
        chunks += (
            _encode(incoming.id),
            _pack(response.content_type),
            _INT.pack(response.status),
            _pack(response.phrase),
            _INT.pack(len(headers)),
            *(_pack(text) for pair in headers.items() for text in pair),
            _INT.pack(len(response.body)),
            response.body,
        )
    chunks.append(_END)
    return b"".join(chunks)


def _encode(text: str) -> bytes:
    data = text.encode()
    return _INT.pack(len(data)) + data


_pack = lru_cache(maxsize=256)(_encode)
"""For texts that come again: header names, content types."""


def find_unknown(*names: str) -> list[str]:
    """Return those of the modules in KNOWN that are not TorchServe 0.12.0's own."""
    return sorted(name for name in names if _digest(name) != KNOWN[name])


def _digest(name: str) -> str:
    """Return the SHA-256 of a module's source; empty where there is none to read."""
    spec = importlib.util.find_spec(f"ts.{name}")
    if spec is None or spec.origin is None:
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


_STATUS = _INT.pack(200) + _pack("Prediction success")
