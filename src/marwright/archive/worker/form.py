"""A form body (application/x-www-form-urlencoded), read as TorchServe's netty 4.1.53 reads it.

`curl -d` and `curl --data-binary` send this content type unless told otherwise, so that a picture
or JSON often comes as a "form". Source: parseBodyAttributesStandard in netty's
HttpPostStandardRequestDecoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

__all__ = ["FormError", "read_form"]

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class FormError(Exception):
    """A form that cannot be read; TorchServe answers 500 with this text."""


def read_form(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield names with values.

    A last name without `=` is lost, and so is all that follows a value's end of line.

    Raises:
        FormError: a broken escape, an empty name, a lone carriage return.
    """
    *fields, last = body.split(b"&")
    for field in [*fields, last] if b"=" in last else fields:
        name, has_value, value = field.partition(b"=")
        end = re.search(rb"[\r\n]", value) if has_value else None
        yield _decode_name(name), _decode_value(value[: end.start()] if end else value)
        if end:
            rest = value[end.start() :]
            if rest[:1] == b"\r" and rest[1:2] not in (b"\n", b""):
                raise FormError("Bad end of line")
            return


def _decode_name(name: bytes) -> str:
    text = name.decode("utf-8", "replace")
    if _BAD_ESCAPE.search(name):
        raise FormError(f"Bad string: '{text}'")
    decoded = unquote_to_bytes(text.replace("+", " ")).decode("utf-8", "replace").strip()
    if not decoded:
        raise FormError("java.lang.IllegalArgumentException: empty name")
    return decoded


def _decode_value(value: bytes) -> bytes:
    if bad := _BAD_ESCAPE.search(value):
        text = value.decode("utf-8", "replace")
        raise FormError(f"Invalid hex byte at index '{bad.start()}' in string: '{text}'")
    return unquote_to_bytes(value.replace(b"+", b" "))
