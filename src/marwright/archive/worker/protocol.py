"""The bytes between TorchServe's frontend and its worker.

Sources: ModelRequestEncoder, ModelResponseDecoder and CodecUtils in org.pytorch.serve.util.codec;
the worker's side is ts/protocol/otf_message_handler.py, which runs here as it is.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from marwright.archive.worker.request import Message

__all__ = [
    "Connection",
    "encode_batch",
    "merge_replies",
    "Prediction",
    "ProtocolError",
    "read_reply",
    "Reply",
]

_INT = struct.Struct("!i")
_END = _INT.pack(-1)


class ProtocolError(Exception):
    """A reply that TorchServe's frontend cannot read, whereupon it gives the worker up."""


class Prediction(NamedTuple):
    """What the worker replies to one request."""

    content_type: str
    status: int
    phrase: str
    headers: Mapping[str, str]
    body: bytes


class Reply(NamedTuple):
    """What the worker replies to a batch."""

    code: int
    message: str
    predictions: Mapping[str, Prediction]
    """By request id."""


class Connection:
    """The worker's end of the socket: reads one command, keeps what is sent."""

    def __init__(self, command: bytes) -> None:
        self._received = io.BytesIO(command)
        self.sent: list[bytes] = []

    def recv(self, length: int) -> bytes:
        """Return the next bytes of the command."""
        return self._received.read(length)

    def sendall(self, message: bytes) -> None:
        """Keep a message; handlers send parts of an answer here before they return."""
        self.sent.append(bytes(message))


def encode_batch(batch: Mapping[str, Message]) -> bytes:
    """Return the command to predict; keys are request ids."""
    return b"".join([b"I", *(_encode_request(key, item) for key, item in batch.items()), _END])


def _encode_request(request_id: str, message: Message) -> bytes:
    texts = [text for item in message.headers.items() for text in item]
    fields = [_encode(request_id.encode()), *(_encode(text.encode()) for text in texts), _END]
    for parameter in message.parameters:
        fields += [_encode(parameter.name.encode()), _encode(parameter.content_type.encode())]
        fields.append(_encode(parameter.value))
    return b"".join([*fields, _END])


def _encode(value: bytes) -> bytes:
    return _INT.pack(len(value)) + value


def read_reply(message: bytes, max_bytes: int) -> Reply:
    """Decode a worker's reply.

    Raises:
        ProtocolError: lengths that do not fit, or a field of more than `max_bytes`.
    """
    reader = _Reader(message, max_bytes)
    code, text = reader.read_int(), reader.read_text()
    predictions = {}
    while (length := reader.read_int()) != -1:
        request_id = reader.read(length).decode()
        predictions[request_id] = Prediction(
            content_type=reader.read_text(),
            status=reader.read_int(),
            phrase=reader.read_text(),
            headers=dict(reader.read_pairs()),
            body=reader.read(reader.read_int()),
        )
    if reader.left:
        raise ProtocolError(f"{reader.left} bytes follow the reply's end")
    return Reply(code, text, predictions)


class _Reader:
    def __init__(self, message: bytes, max_bytes: int) -> None:
        self._message = message
        self._max_bytes = max_bytes
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._message) - self._position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= self.left:  # ts counts letters where it writes bytes
            raise ProtocolError("a content type or phrase that is not plain ASCII")
        if length > self._max_bytes:
            raise ProtocolError(
                f"an answer of {length:,} bytes, where max_response_size is {self._max_bytes:,}"
            )
        start, self._position = self._position, self._position + length
        return self._message[start : self._position]

    def read_int(self) -> int:
        return int(_INT.unpack(self.read(4))[0])

    def read_text(self) -> str:
        return self.read(self.read_int()).decode("utf-8", "replace")

    def read_pairs(self) -> Iterator[tuple[str, str]]:
        for _ in range(self.read_int()):
            yield self.read_text(), self.read_text()


def merge_replies(replies: Sequence[Reply]) -> Reply:
    """Join what a streaming handler sent: the first part's status and headers, everyone's body."""
    failed = [reply for reply in replies if reply.code != 200]
    if failed:
        return failed[0]
    merged = {
        key: prediction._replace(body=b"".join(_bodies(replies, key)))
        for key, prediction in replies[0].predictions.items()
    }
    return replies[0]._replace(predictions=merged)


def _bodies(replies: Sequence[Reply], request_id: str) -> Iterator[bytes]:
    for reply in replies:
        if request_id in reply.predictions:
            yield reply.predictions[request_id].body
