"""A request as a client sends it over HTTP, and what TorchServe's frontend hands to the worker.

Source: parseRequest in org.pytorch.serve.http.api.rest.InferenceRequestHandler, getFormData in
org.pytorch.serve.util.NettyUtils. Query parameters are not here: /predictions drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from marwright.archive.worker.form import read_form
from marwright.errors import UsageError
from marwright.storage import translate_os_errors

__all__ = ["Message", "Parameter", "Part", "Request"]


class Parameter(NamedTuple):
    """One value that the handler finds in its row, under `name`."""

    name: str
    content_type: str
    """`application/json` and `text...` are decoded by the worker; empty where unknown."""
    value: bytes


class Message(NamedTuple):
    """What the frontend sends to the worker for one request."""

    headers: Mapping[str, str]
    parameters: tuple[Parameter, ...]
    body_bytes: int
    """Of the HTTP body, as far as it is known: without the separators of a multipart one."""


@dataclass(frozen=True)
class Part:
    """One part of a multipart body."""

    name: str
    value: Path | bytes | str
    content_type: str | None = None
    """None: a plain field. Otherwise a file, of which TorchServe passes the content type on."""


@dataclass(frozen=True)
class Request:
    """A POST to /predictions/NAME, or /explanations: a body, or the parts of a multipart one."""

    body: Path | bytes | str = b""
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Others, such as Accept; the handler also sees Content-Length and TorchServe's own two."""
    parts: tuple[Part, ...] = ()
    is_explanation: bool = False

    @classmethod
    def of(cls, value: Path | bytes | Request) -> Request:
        """Return a request; a path or bytes become its body, without a content type."""
        return value if isinstance(value, Request) else cls(value)

    def to_message(self) -> Message:
        """Return what reaches the worker.

        Raises:
            StorageError: a file cannot be read.
            UsageError: the body is an encoded multipart one.
            FormError: a form that TorchServe answers with status 500.
        """
        if self.parts:
            whole = replace(self, content_type=self.content_type or "multipart/form-data")
            parameters = tuple(_to_parameter(part) for part in self.parts)
            size = sum(len(parameter.value) for parameter in parameters)
            return Message(whole._headers(), parameters, size)
        body = _read(self.body)
        kind = self._content_type()
        mime = kind.split(";")[0]
        if mime.lower() == "multipart/form-data" and "boundary=" in kind:
            raise UsageError(
                "an encoded multipart body is not taken apart here",
                remedy="pass its parts: Request(parts=(Part(name, value, content_type), ...))",
            )
        if mime.lower() == "application/x-www-form-urlencoded":
            parameters = tuple(Parameter(name, "", value) for name, value in read_form(body))
        else:
            parameters = (Parameter("body", mime, body),)
        return Message({**self._headers(), "Content-Length": str(len(body))}, parameters, len(body))

    def _content_type(self) -> str:
        found = [value for name, value in self.headers.items() if name.lower() == "content-type"]
        return self.content_type or (found[-1] if found else "")

    def _headers(self) -> dict[str, str]:
        kind = {"Content-Type": self.content_type} if self.content_type else {}
        return {**self.headers, **kind, "url_path": "", "explain": str(self.is_explanation)}


def _to_parameter(part: Part) -> Parameter:
    # Of a content type with parameters netty 4.1.53 keeps the last that is no charset
    # (HttpPostMultipartRequestDecoder, setupFieldAttributes).
    kinds = [item.strip() for item in (part.content_type or "").split(";")]
    kept = [item for item in kinds if not item.lower().startswith("charset")]
    return Parameter(part.name.strip(), kept[-1] if kept else "", _read(part.value))


def _read(value: Path | bytes | str) -> bytes:
    if isinstance(value, Path):
        with translate_os_errors(f"read {value}"):
            return value.read_bytes()
    return value.encode() if isinstance(value, str) else value
