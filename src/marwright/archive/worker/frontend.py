"""The HTTP answers that TorchServe's frontend makes of a worker's reply.

Sources: org.pytorch.serve.wlm.BatchAggregator (sendResponse), org.pytorch.serve.job.RestJob
(response, sendError), org.pytorch.serve.util.NettyUtils (sendHttpResponse), netty 4.1.53.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus

from marwright.archive.worker.answer import Answer
from marwright.archive.worker.protocol import Prediction, ProtocolError, Reply

__all__ = ["DIED", "make_answer", "make_error", "TOO_LARGE"]

STREAM = "ts_stream_next"
"""The header by which a worker says that more of an answer follows."""
WITHOUT_BODY = (204, 205, 304)
UNCHANGEABLE = {
    "pragma": "no-cache",
    "cache-control": "no-cache; no-store, must-revalidate, private",
    "expires": "Thu, 01 Jan 1970 00:00:00 UTC",
}
"""Headers that every answer gets, whatever a handler sets."""

# Netty's words, where they differ from those of http.HTTPStatus, which change with Python.
_UNKNOWN = (103, 104, 208, 226, 418, 451, 508)
_PHRASES = {item.value: item.phrase for item in HTTPStatus if item.value not in _UNKNOWN} | {
    414: "Request-URI Too Long",
    416: "Requested Range Not Satisfiable",
    422: "Unprocessable Entity",
    425: "Unordered Collection",
}
_CLASSES = ("Informational", "Success", "Redirection", "Client Error", "Server Error")

_HEADER_NAME = re.compile(r"[^\x00\t\n\v\f\r ,:;=\x80-\U0010ffff]+")
_HEADER_VALUE = re.compile(r"(?:[^\x00\v\f\r\n]|\r?\n[ \t])*")


def make_answer(reply: Reply, request_id: str) -> Answer:
    """Return what the client of one request gets.

    Raises:
        ProtocolError: headers or a status that HTTP cannot carry.
    """
    if reply.code != 200:
        # RestJob.sendError: a worker's 413 would blame the client.
        status = 507 if reply.code == 413 else reply.code
        return make_error(status, reply.message)
    prediction = reply.predictions[request_id]
    _check(prediction)
    # In Java's HashMap "content-type" comes before "Content-Type", which then replaces it.
    pairs = sorted(prediction.headers.items(), key=lambda pair: pair[0] != "content-type")
    headers = {name.lower(): _as_received(value) for name, value in pairs}
    return _finish(prediction.status, prediction.phrase, headers, prediction.body)


def make_error(status: int, message: str, *, kind: str = "InternalServerException") -> Answer:
    """Return an error of the frontend's own; `kind` is the name of a Java exception."""
    if status < 0:
        raise ProtocolError(f"status {status}")
    text = json.dumps(
        {"code": status, "type": kind, "message": message}, indent=2, ensure_ascii=False
    )
    # Gson escapes these two as well, for JavaScript's sake.
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    headers = {"content-type": "application/json"}
    return _finish(status, _phrase(status), headers, f"{text}\n".encode())


def _finish(status: int, phrase: str, headers: Mapping[str, str], body: bytes) -> Answer:
    """Add what the frontend adds, as NettyUtils.sendHttpResponse and netty's encoder do."""
    content_type = headers.get("content-type", "")
    headers = {**headers, **UNCHANGEABLE}
    if STREAM in headers:
        headers["transfer-encoding"] = "chunked"
    else:
        headers["content-length"] = str(len(body))
    headers["connection"] = "keep-alive" if status < 400 else "close"
    if status in WITHOUT_BODY or 100 <= status < 200:
        body = b""
        if status == 205:
            headers["content-length"] = "0"
        elif status != 304:
            headers.pop("content-length", None)
    return Answer(status, phrase, content_type, headers, body)


def _check(prediction: Prediction) -> None:
    """Refuse what netty refuses (DefaultHttpHeaders, HttpResponseStatus)."""
    if prediction.status < 0 or re.search(r"[\r\n]", prediction.phrase):
        raise ProtocolError(f"status {prediction.status} {prediction.phrase!r}")
    for name, value in [("content-type", prediction.content_type), *prediction.headers.items()]:
        if not (_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
            raise ProtocolError(f"a header {name!r}: {value!r}")


def _as_received(value: str) -> str:
    """Return a header's value as a client reads it: a byte for a letter, folded lines joined."""
    value = re.sub(r"\r?\n[ \t]+", " ", value).lstrip(" \t")
    return value.encode("latin-1", "replace").decode("latin-1")


def _phrase(status: int) -> str:
    if status in _PHRASES:
        return _PHRASES[status]
    kind = _CLASSES[status // 100 - 1] if 100 <= status < 600 else "Unknown Status"
    return f"{kind} ({status})"


DIED = make_error(500, "Worker died.")
"""What every request of a batch gets during which the worker ended."""
TOO_LARGE = Answer(413, "Request Entity Too Large", "", {"content-length": "0"}, b"")
"""What a request above max_request_size gets, before any worker sees it."""
