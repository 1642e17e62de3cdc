from __future__ import annotations

import base64
import contextlib
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture(scope="module")
def image_input(root: Path) -> Iterator[ModuleType]:
    """The module as a worker imports it: its folder on the path, by base name."""
    sys.path.insert(0, str(root / "handlers"))
    import image_input

    yield image_input
    sys.path.remove(str(root / "handlers"))
    sys.modules.pop("image_input", None)


@pytest.fixture
def read(image_input: ModuleType) -> Callable[..., Image.Image]:
    """Return a function that reads one row with the default limits, or the given ones."""

    def read_row(row: dict[str, Any], **limits: int) -> Image.Image:
        return image_input.read_image(row, image_input.ImageLimits(**limits))

    return read_row


@pytest.fixture
def refuse(image_input: ModuleType, read: Callable[..., Image.Image]) -> Callable[..., Any]:
    """Return a function that gives the rejection of one row."""

    def refuse_row(row: dict[str, Any], **limits: int) -> Any:
        with pytest.raises(image_input.RejectedInput) as caught:
            read(row, **limits)
        return caught.value

    return refuse_row


def make_noise(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Return an image (width, height) that no codec makes small."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def claim_png(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def to_base64(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


WRAPPINGS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "body": lambda payload: {"body": bytearray(payload)},
    "field data": lambda payload: {"data": bytearray(payload)},
    "single field": lambda payload: {"picture": bytearray(payload)},
    "field data of two": lambda payload: {"other": b"", "data": bytearray(payload)},
    "body beside a query parameter": lambda payload: {"top": b"1", "body": bytearray(payload)},
    "JSON object": lambda payload: {"body": {"data": to_base64(payload)}},
    "JSON string": lambda payload: {"body": to_base64(payload)},
    "JSON object in a field": lambda payload: {"data": {"data": to_base64(payload)}},
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_image_is_read_however_it_arrives(
    read: Callable[..., Image.Image], kind: str, wrapping: str
) -> None:
    payload = encode_image(make_noise(), kind)
    image = read(WRAPPINGS[wrapping](payload))
    assert (image.mode, image.size) == ("RGB", (24, 20))
    assert image.tobytes() == Image.open(io.BytesIO(payload)).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_becomes_rgb(
    read: Callable[..., Image.Image], encode: Callable[..., bytes], mode: str
) -> None:
    assert read({"body": encode(mode=mode)}).mode == "RGB"


def test_a_cmyk_jpeg_becomes_rgb(
    read: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    assert read({"body": encode(kind="JPEG", mode="CMYK")}).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_shades(read: Callable[..., Image.Image]) -> None:
    levels = np.array([[0, 255, 256, 32_768, 65_535]], np.uint16)
    image = read({"body": encode_image(Image.fromarray(levels))})
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_an_image_on_its_side_is_turned_upright(read: Callable[..., Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    noise = make_noise()
    image = read({"body": encode_image(noise, exif=exif)})
    assert image.tobytes() == noise.transpose(Image.Transpose.ROTATE_270).tobytes()


NO_IMAGE = {
    "text named .png": b"this is text, whatever the file is called",
    "HTML": b"<html></html>",
    "one byte": b"\x89",
    "GIF": encode_image(make_noise(), "GIF"),
    "BMP": encode_image(make_noise(), "BMP"),
    "TIFF": encode_image(make_noise(), "TIFF"),
    "the head of a PNG": encode_image(make_noise())[:20],
}


@pytest.mark.parametrize("name", NO_IMAGE)
def test_bytes_that_are_no_image_of_ours_are_415(refuse: Callable[..., Any], name: str) -> None:
    rejected = refuse({"body": bytearray(NO_IMAGE[name])})
    assert (rejected.status, rejected.title) == (415, "Unsupported Media Type")
    assert "expected a PNG, JPEG or WebP image" in rejected.detail


@pytest.mark.parametrize("row", [{"body": b""}, {"data": bytearray()}, {"x": ""}, {"body": ""}])
def test_nothing_is_400(refuse: Callable[..., Any], row: dict[str, Any]) -> None:
    rejected = refuse(row)
    assert (rejected.status, rejected.title) == (400, "Bad Request")
    assert "found 0 bytes" in rejected.detail


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "broken base64": ({"body": {"data": "%%%"}}, "expected base64 text, found '%%%'"),
    "cut base64": ({"body": {"data": "abcde"}}, "expected base64 text"),
    "base64 that is not ASCII": ({"body": {"data": "äöü"}}, "expected base64 text"),
    "half a character": ({"body": {"data": "\ud800"}}, "expected base64 text"),
    "a JSON string": ({"body": "hello there!"}, "expected base64 text, found 'hello there!'"),
    "JSON without data": ({"body": {"image": "x"}}, "found keys ['image']"),
    "empty JSON": ({"body": {}}, "found keys []"),
    "JSON number": ({"body": 5}, "found JSON int"),
    "JSON number as data": ({"body": {"data": 5}}, "found JSON int"),
    "JSON list": ({"body": [1, 2]}, "found JSON list"),
    "JSON null": ({"body": None}, "found JSON NoneType"),
    "JSON true": ({"body": True}, "found JSON bool"),
    "JSON in JSON": ({"body": {"data": {"data": ""}}}, "found JSON dict"),
    "two fields": ({"a": b"1", "b": b"2"}, "found parts ['a', 'b']"),
    "no field": ({}, "found parts []"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_request_of_another_form_is_400_and_told_why(
    refuse: Callable[..., Any], name: str
) -> None:
    row, reason = BAD_ROWS[name]
    rejected = refuse(row)
    assert rejected.status == 400
    assert reason in rejected.detail


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused_or_loses_nothing(
    image_input: ModuleType, read: Callable[..., Image.Image], kind: str
) -> None:
    payload = encode_image(make_noise(), kind)
    whole = read({"body": payload}).tobytes()
    statuses = set()
    for length in range(len(payload)):
        try:
            image = read({"body": payload[:length]})
        except image_input.RejectedInput as rejected:
            image = None
            statuses.add(rejected.status)
        assert image is None or image.tobytes() == whole
    assert statuses == {400, 415}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_half_an_image_is_400_and_called_damaged(refuse: Callable[..., Any], kind: str) -> None:
    payload = encode_image(make_noise(), kind)
    rejected = refuse({"body": payload[: len(payload) * 3 // 4]})
    assert rejected.status == 400
    assert f"expected a whole {kind} image, found a damaged one" in rejected.detail


@pytest.mark.parametrize(
    ("width", "height"),
    [(20_000, 20_000), (10_000, 10_000), (5_001, 5_000), (25_000_001, 1), (2**31 - 1, 2**31 - 1)],
    ids=["above Pillow's error", "above Pillow's warning", "one row", "one line", "the largest"],
)
def test_too_many_pixels_are_413_before_any_is_decoded(
    refuse: Callable[..., Any], width: int, height: int
) -> None:
    rejected = refuse({"body": claim_png(width, height)})
    assert (rejected.status, rejected.title) == (413, "Content Too Large")
    assert "expected at most 25,000,000 pixels" in rejected.detail


def test_the_most_pixels_allowed_are_decoded(read: Callable[..., Image.Image]) -> None:
    payload = encode_image(make_noise(size=(30, 20)))
    assert read({"body": payload}, max_pixels=600).size == (30, 20)


def test_one_pixel_more_than_allowed_is_413(refuse: Callable[..., Any]) -> None:
    rejected = refuse({"body": encode_image(make_noise(size=(30, 20)))}, max_pixels=599)
    assert rejected.status == 413
    assert rejected.detail.endswith("expected at most 599 pixels, found 30 x 20")


@pytest.mark.parametrize("wrapping", ["body", "JSON object"])
def test_too_many_bytes_are_413_however_they_arrive(
    read: Callable[..., Image.Image], refuse: Callable[..., Any], wrapping: str
) -> None:
    payload = encode_image(make_noise())
    row = WRAPPINGS[wrapping](payload)
    assert read(row, max_bytes=len(payload)).size == (24, 20)
    assert refuse(row, max_bytes=len(payload) - 1).status == 413


def test_what_is_quoted_of_a_request_is_short(refuse: Callable[..., Any]) -> None:
    assert len(refuse({"body": {"data": "%" * 1_000_000}}).detail) < 300
    assert len(refuse({"body": {"k" * 1_000_000: 1}}).detail) < 300
    assert len(refuse({"body": dict.fromkeys(map(str, range(10_000)))}).detail) < 300
    assert len(refuse({"body": b"x" * 1_000_000}).detail) < 300
    assert len(refuse(dict.fromkeys(map(str, range(10_000)), b"x")).detail) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("data"), inner, max_size=3)
    ),
    max_leaves=5,
)
rows = st.dictionaries(
    st.sampled_from(["data", "body"]) | st.text(max_size=5), st.binary() | json_values, max_size=3
)


@given(row=rows)
@settings(max_examples=200, deadline=None)
def test_any_row_is_an_image_or_a_rejected_input(image_input: ModuleType, row: Any) -> None:
    _read_or_reject(image_input, row)


PAYLOADS = [encode_image(make_noise(), kind) for kind in ("PNG", "JPEG", "WEBP")]


@given(
    payload=st.sampled_from(PAYLOADS),
    damage=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=8)), max_size=4
    ),
)
@settings(max_examples=500, deadline=None)
def test_any_damage_to_an_image_gives_an_image_or_a_rejected_input(
    image_input: ModuleType, payload: bytes, damage: list[tuple[float, bytes]]
) -> None:
    for position, replacement in damage:
        start = int(position * len(payload))
        payload = payload[:start] + replacement + payload[start + len(replacement) :]
    _read_or_reject(image_input, {"body": payload})


def _read_or_reject(image_input: ModuleType, row: Any) -> None:
    limits = image_input.ImageLimits(max_pixels=1_000_000)
    with warnings.catch_warnings(), contextlib.suppress(image_input.RejectedInput):
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
        assert image_input.read_image(row, limits).mode == "RGB"
