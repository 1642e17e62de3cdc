"""From one request's row, as TorchServe hands it over, to one RGB image.

Requests are hostile until checked: formats are few, bytes and pixels are counted before decoding.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

__all__ = ["ImageLimits", "RejectedInput", "read_image"]

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class ImageLimits:
    """What a request may bring, checked before its pixels are decoded."""

    max_bytes: int = 6_000_000
    """Encoded size; TorchServe itself refuses bodies above max_request_size (6,553,500)."""
    max_pixels: int = 25_000_000
    """Width times height, as the image's own header states them."""


class RejectedInput(Exception):
    """One request that cannot be answered, with the HTTP status and the reason it gets."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail


def read_image(row: Mapping[str, Any], limits: ImageLimits) -> Image.Image:
    """Decode the image of one request, upright and in RGB.

    Raises:
        RejectedInput: 400 for nothing or a damaged image, 413 for too large, 415 for no image.
    """
    payload = _read_payload(row)
    if not payload:
        raise RejectedInput(400, "Bad Request", "expected the bytes of an image, found 0 bytes")
    if len(payload) > limits.max_bytes:
        raise RejectedInput(
            413,
            "Content Too Large",
            f"expected at most {limits.max_bytes:,} bytes, found {len(payload):,}",
        )
    return _decode(payload, limits)


def _read_payload(row: Mapping[str, Any]) -> bytes:
    """Find the image's bytes: raw body, multipart field, or base64 inside JSON.

    TorchServe names a raw body "body" and parses it where the content type is JSON; multipart
    fields keep their names (ts/service.py, retrieve_data_for_inference).
    """
    if "data" in row:
        value = row["data"]
    elif "body" in row:
        value = row["body"]
    elif len(row) == 1:
        value = next(iter(row.values()))
    else:
        raise RejectedInput(
            400,
            "Bad Request",
            f"expected one part, or one named 'data', found parts {_list_names(row)}",
        )
    if isinstance(value, Mapping):
        if "data" not in value:
            raise RejectedInput(
                400,
                "Bad Request",
                f'expected JSON {{"data": "<base64>"}}, found keys {_list_names(value)}',
            )
        value = value["data"]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        return _decode_base64(value)
    raise RejectedInput(
        400,
        "Bad Request",
        f"expected the bytes of an image or base64 text, found JSON {type(value).__name__}",
    )


def _list_names(names: Iterable[Any]) -> list[str]:
    """Return the first few, cut short: what a request brings is not echoed at any length."""
    return sorted(str(name)[:40] for name in names)[:8]


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RejectedInput(
            400, "Bad Request", f"expected base64 text, found {text[:20]!r}: {exc}"
        ) from exc


def _decode(payload: bytes, limits: ImageLimits) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Between its warning and its error Pillow lets an image through; max_pixels decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(payload), formats=FORMATS)  # reads the header only
    except Image.DecompressionBombError as exc:
        raise RejectedInput(
            413, "Content Too Large", f"expected at most {limits.max_pixels:,} pixels: {exc}"
        ) from exc
    except Exception as exc:  # Pillow's parsers raise many types for bytes that are no image
        raise RejectedInput(
            415,
            "Unsupported Media Type",
            "expected a PNG, JPEG or WebP image, "
            f"found {len(payload):,} bytes beginning with {payload[:12]!r}",
        ) from exc
    width, height = image.size
    if width * height > limits.max_pixels:
        raise RejectedInput(
            413,
            "Content Too Large",
            f"expected at most {limits.max_pixels:,} pixels, found {width:,} x {height:,}",
        )
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255, not scale
            upright = upright.point(lambda value: value * (1 / 256)).convert("L")
        return upright.convert("RGB")
    except Exception as exc:  # likewise: truncated or damaged data
        raise RejectedInput(
            400,
            "Bad Request",
            f"expected a whole {image.format} image, found a damaged one: {exc}",
        ) from exc
