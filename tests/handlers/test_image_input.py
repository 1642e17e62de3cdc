from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def image_input(root: Path) -> Iterator[ModuleType]:
    """The module as a worker imports it: its folder on the path, by base name."""
    sys.path.insert(0, str(root / "handlers"))
    import image_input

    yield image_input
    sys.path.remove(str(root / "handlers"))
    for name in ("image_input", "problem"):
        sys.modules.pop(name, None)


@pytest.fixture
def read(image_input: ModuleType) -> Callable[..., Array]:
    """Return a function that reads with the default limits, or the given ones."""

    def read_payload(payload: Any, at_least: tuple[int, int] | None = None, **limits: int) -> Array:
        pixels = image_input.read_image(
            payload, image_input.ImageLimits(**limits), at_least=at_least
        )
        assert (pixels.dtype, pixels.shape[2:]) == (torch.uint8, (3,))
        assert pixels.is_contiguous()
        return np.asarray(pixels)

    return read_payload


@pytest.fixture
def refuse(image_input: ModuleType, read: Callable[..., Array]) -> Callable[..., Any]:
    """Return a function that gives the rejection of a payload."""

    def refuse_payload(payload: Any, **limits: int) -> Any:
        with pytest.raises(image_input.RejectedInput) as caught:
            read(payload, **limits)
        return caught.value

    return refuse_payload


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(
    request: pytest.FixtureRequest, image_input: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Each decoder of JPEGs in turn."""
    if request.param == "simplejpeg":
        assert image_input._simplejpeg is not None, "install the extra `jpeg`"
    else:
        monkeypatch.setattr(image_input, "_simplejpeg", None)
    return str(request.param)


@contextlib.contextmanager
def without_simplejpeg(image_input: ModuleType) -> Iterator[None]:
    """For hypothesis, which wants no fixtures of one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_input, "_simplejpeg", None)
        yield


def make_noise(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Return an image (width, height) that no codec makes small."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def make_photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Return an image (width, height) with shapes of every size, as a photograph has."""
    generator = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for level in range(7):
        grid = generator.integers(0, 256, (2**level + 1, 2**level + 1, 3), np.uint8)
        layer = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        total += np.asarray(layer) / 2**level
    return Image.fromarray((total / 2).clip(0, 255).astype(np.uint8))


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "MAXBLOCK", 1 << 20)  # else libjpeg cannot optimise noise
        image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def to_rgb(payload: bytes) -> Array:
    """Decode as Pillow's convert("RGB") does, and as training does."""
    image = Image.open(io.BytesIO(payload))
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def make_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_png(
    width: int, height: int, rows: bytes, *, bits: int = 8, colours: int = 2, before: bytes = b""
) -> bytes:
    """Return a PNG of rows as they stand in the file, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + before
        + make_chunk(b"IDAT", zlib.compress(rows))
        + make_chunk(b"IEND", b"")
    )


def make_exif(orientation: int, order: str = "<", form: str = "H") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    kind = {"H": 3, "I": 4}[form]
    software = struct.pack(order + "HHI4s", 0x0131, 2, 4, b"abc\0")  # the first tag is another
    value = struct.pack(order + form, orientation).ljust(4, b"\0")
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return head + struct.pack(order + "IH", 8, 2) + software + entry + bytes(4)


def make_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def put_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


# What is read.

MODES = [
    *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("GIF", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
]


@pytest.mark.parametrize(("kind", "mode"), MODES)
@pytest.mark.parametrize("size", [(24, 20), (1, 1), (7, 3)])
def test_every_format_and_mode_has_the_pixels_that_training_sees(
    read: Callable[..., Array], kind: str, mode: str, size: tuple[int, int]
) -> None:
    image = make_noise(size=size)
    if mode.endswith("A"):
        image.putalpha(make_noise(1, size).convert("L"))
    payload = encode_image(image.convert(mode), kind)
    assert np.array_equal(read(payload), to_rgb(payload))


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bytes_may_come_in_any_form(
    read: Callable[..., Array], form: Callable[[bytes], Any], kind: str
) -> None:
    payload = encode_image(make_noise(), kind)
    assert np.array_equal(read(form(payload)), to_rgb(payload))


def test_transparency_is_dropped_and_the_colours_beneath_it_stay(
    read: Callable[..., Array],
) -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (40, 50, 60, 255))
    for kind in ("PNG", "BMP"):
        assert read(encode_image(image, kind)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("transparency", [b"\x00\x80", 1, bytes(256)])
def test_a_palette_with_transparency_gives_its_colours(
    read: Callable[..., Array], transparency: bytes | int
) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    payload = encode_image(image, transparency=transparency)
    assert read(payload).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_one_transparent_colour_stays_a_colour(read: Callable[..., Array]) -> None:
    payload = encode_image(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert read(payload).tolist() == [[[1, 2, 3]]]


LEVELS = [0, 255, 256, 32_768, 65_535]


def test_sixteen_bit_grey_keeps_its_shades(read: Callable[..., Array]) -> None:
    payload = encode_image(Image.fromarray(np.array([LEVELS], np.uint16)))
    assert read(payload).tolist() == [[[level >> 8] * 3 for level in LEVELS]]


@pytest.mark.parametrize(("colours", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colours_keep_their_shades(
    read: Callable[..., Array], colours: int, channels: int
) -> None:
    row = b"\0" + b"".join(struct.pack(">H", level) * channels for level in LEVELS)
    payload = make_png(len(LEVELS), 1, row, bits=16, colours=colours)
    assert read(payload).tolist() == [[[level >> 8] * 3 for level in LEVELS]]


def test_a_jpeg_of_printing_colours_is_as_pillow_reads_it(
    read: Callable[..., Array], image_input: ModuleType
) -> None:
    cmyk = np.asarray(make_photo((40, 32)).convert("CMYK"))
    # libjpeg-turbo stores CMYK as YCCK, and says so in Adobe's segment.
    payload = image_input._simplejpeg.encode_jpeg(np.ascontiguousarray(cmyk), 95, "CMYK", "444")
    assert b"Adobe" in payload
    assert np.array_equal(read(payload), to_rgb(payload))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(read: Callable[..., Array], kind: str) -> None:
    colours = [(200, 30, 40), (0, 0, 0), (250, 250, 250)]
    first, *rest = [Image.new("RGB", (8, 6), colour) for colour in colours]
    payload = encode_image(first, kind, save_all=True, append_images=rest, lossless=True)
    assert np.array_equal(read(payload), np.asarray(first))


# EXIF.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_orientation_is_turned_upright(
    read: Callable[..., Array], decoder: str, orientation: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encode_image(make_noise(), kind, exif=exif, lossless=True)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))
    assert upright.size == ((24, 20) if orientation < 5 else (20, 24))
    assert np.array_equal(read(payload), np.asarray(upright))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("form", ["H", "I"])
def test_an_orientation_is_read_in_either_byte_order_and_width(
    read: Callable[..., Array], decoder: str, order: str, form: str
) -> None:
    jpeg = encode_image(make_noise(), "JPEG")
    payload = put_segments(jpeg, make_segment(0xE1, b"Exif\0\0" + make_exif(6, order, form)))
    assert np.array_equal(read(payload), np.rot90(to_rgb(jpeg), -1))


ODD_EXIF = {
    "no orientation": make_exif(6)[:10] + b"\0\0",
    "orientation 0": make_exif(0),
    "orientation 9": make_exif(9),
    "cut": make_exif(6)[:24],
    "empty": b"",
    "another byte order": b"XX*\0" + make_exif(6)[4:],
    "a directory beyond the end": b"II*\0" + struct.pack("<I", 2**32 - 1),
    "a directory that says it is longer": b"II*\0\x08\0\0\0\xff\xff" + bytes(40),
}


@pytest.mark.parametrize("name", ODD_EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_that_names_no_orientation_leaves_an_image_as_it_is(
    read: Callable[..., Array], decoder: str, name: str, kind: str
) -> None:
    if kind == "JPEG":
        jpeg = encode_image(make_noise(), "JPEG")
        payload = put_segments(jpeg, make_segment(0xE1, b"Exif\0\0" + ODD_EXIF[name]))
        assert np.array_equal(read(payload), to_rgb(jpeg))
    else:
        payload = make_png(2, 1, bytes(range(7)), before=make_chunk(b"eXIf", ODD_EXIF[name]))
        assert read(payload).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_exif_is_only_looked_for_where_the_header_is(
    read: Callable[..., Array], decoder: str
) -> None:
    jpeg = encode_image(make_noise(), "JPEG")
    exif = b"Exif\0\0" + make_exif(6)
    for payload in (put_segments(jpeg, make_segment(0xFE, exif)), jpeg + exif):
        assert np.array_equal(read(payload), to_rgb(jpeg))


# What is refused.

NO_IMAGE = {
    "text named .png": b"this is text, whatever the file is called",
    "HTML": b"<html></html>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "one byte": b"\x89",
    "TIFF": encode_image(make_noise(), "TIFF"),
    "ICO": encode_image(make_noise(), "ICO"),
    "PPM": encode_image(make_noise(), "PPM"),
    "JPEG 2000": encode_image(make_noise(), "JPEG2000"),
    "a sound": b"RIFF\x24\0\0\0WAVEfmt ",
    "GIF of no known year": b"GIF00a" + encode_image(make_noise(), "GIF")[6:],
}


@pytest.mark.parametrize("name", NO_IMAGE)
def test_bytes_that_are_no_image_of_ours_are_415(refuse: Callable[..., Any], name: str) -> None:
    rejected = refuse(NO_IMAGE[name])
    assert rejected.status == 415
    assert rejected.detail.startswith("expected a PNG, JPEG, WebP, GIF or BMP image, found ")


@pytest.mark.parametrize("payload", [b"", bytearray(), memoryview(b"")])
def test_nothing_is_400(refuse: Callable[..., Any], payload: Any) -> None:
    rejected = refuse(payload)
    assert rejected.status == 400
    assert "found 0 bytes" in rejected.detail


def test_a_jpeg_of_twelve_bits_is_415(refuse: Callable[..., Any], decoder: str) -> None:
    payload = bytearray(encode_image(make_noise(), "JPEG"))
    payload[payload.index(b"\xff\xc0") + 4] = 12
    rejected = refuse(payload)
    assert (rejected.status, "found 12" in rejected.detail) == (415, True)


def test_what_is_quoted_of_an_image_is_short(
    image_input: ModuleType, refuse: Callable[..., Any]
) -> None:
    assert len(image_input._damaged("PNG", "a library's " * 1_000).detail) < 300
    assert len(refuse(b"x" * 1_000_000).detail) < 300
    assert len(refuse(b"\x89PNG\r\n\x1a\n" + b"\xff" * 1_000_000).detail) < 300


WHOLE = {
    "PNG": encode_image(make_noise()),
    "PNG in steps": encode_image(make_photo((30, 20)).convert("P")),
    "JPEG": encode_image(make_photo((48, 40)), "JPEG"),
    "progressive JPEG": encode_image(make_photo((48, 40)), "JPEG", progressive=True),
    "JPEG with restarts": encode_image(make_photo((48, 40)), "JPEG", restart_marker_blocks=2),
    "grey JPEG": encode_image(make_photo((48, 40)).convert("L"), "JPEG"),
    "CMYK JPEG": encode_image(make_photo((48, 40)).convert("CMYK"), "JPEG"),
    "WebP": encode_image(make_photo((48, 40)), "WEBP"),
    "lossless WebP": encode_image(make_noise(), "WEBP", lossless=True),
    "GIF": encode_image(make_noise(), "GIF"),
    "BMP": encode_image(make_noise(), "BMP"),
}


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_image_is_400_by_either_decoder(
    refuse: Callable[..., Any], decoder: str, name: str, tenths: int
) -> None:
    payload = WHOLE[name]
    rejected = refuse(payload[: len(payload) * tenths // 10])
    assert rejected.status == 400
    kind = next(kind for kind in ("PNG", "JPEG", "WebP", "GIF", "BMP") if kind in name)
    assert rejected.detail.startswith(f"expected a whole {kind} image, found a damaged one: ")


@pytest.mark.parametrize("name", WHOLE)
def test_every_truncation_is_refused_or_loses_nothing(
    image_input: ModuleType, read: Callable[..., Array], decoder: str, name: str
) -> None:
    payload = WHOLE[name]
    whole = read(payload)
    statuses = set()
    for length in range(len(payload)):
        try:
            pixels = read(payload[:length])
        except image_input.RejectedInput as rejected:
            statuses.add(rejected.status)
        else:
            assert np.array_equal(pixels, whole)
    assert statuses == {400, 415}


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "CMYK JPEG"])
@pytest.mark.parametrize("filling", [b"\0", b"\xaa", b"\xff"])
def test_a_jpeg_cut_and_filled_up_is_400(
    refuse: Callable[..., Any], decoder: str, name: str, filling: bytes
) -> None:
    # As a download leaves it whose file was made at full length before; Pillow takes it as whole.
    payload = WHOLE[name]
    assert refuse(payload[: len(payload) // 2] + 10 * len(payload) * filling).status == 400


@pytest.mark.parametrize("tail", [bytes(100), b"\r\n", WHOLE["JPEG"]])
def test_what_follows_a_whole_jpeg_does_no_harm(
    read: Callable[..., Array], decoder: str, tail: bytes
) -> None:
    payload = WHOLE["progressive JPEG"]
    assert np.array_equal(read(payload + tail), to_rgb(payload))


def test_what_stands_between_a_jpegs_segments_does_no_harm(
    read: Callable[..., Array], decoder: str
) -> None:
    payload = WHOLE["JPEG"]
    for junk in (b"\0", b"\xff\xff\xff", b"\xff\0", b"\xff\xd0", b"abc"):
        assert np.array_equal(
            read(put_segments(payload, make_segment(0xE5, b"x"), junk)), to_rgb(payload)
        )


# Sizes.


def claim(kind: str, width: int, height: int) -> bytes:
    """Return a few bytes whose header claims any size."""
    if kind == "PNG":
        return make_png(width, height, bytes(64))
    if kind == "GIF":
        return (
            b"GIF89a" + struct.pack("<HH", width, height) + encode_image(make_noise(), "GIF")[10:]
        )
    if kind == "JPEG":
        frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
        return b"\xff\xd8" + make_segment(0xC0, frame) + b"\xff\xd9"
    if kind.startswith("BMP"):
        core = struct.pack("<IHHHH", 12, width, height, 1, 24)
        info = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, 0, 0, 0, 0, 0)
        header = core if kind == "BMP of OS/2" else info
        return b"BM" + struct.pack("<IHHI", 100, 0, 0, 14 + len(header)) + header + bytes(64)
    if kind == "WebP VP8":
        body = b"VP8 " + struct.pack("<I", 30) + b"\x10\0\0\x9d\x01\x2a"
        body += struct.pack("<HH", width, height) + bytes(20)
    elif kind == "WebP VP8L":
        bits = (width - 1) | (height - 1) << 14
        body = b"VP8L" + struct.pack("<IBI", 30, 0x2F, bits) + bytes(25)
    else:
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + bytes(20)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


CLAIMS = ["PNG", "JPEG", "GIF", "BMP", "BMP of OS/2", "WebP VP8", "WebP VP8L", "WebP VP8X"]


@pytest.mark.parametrize("kind", CLAIMS)
def test_too_many_pixels_are_413_before_a_decoder_sees_them(
    image_input: ModuleType,
    refuse: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(image_input, "_PLUGINS", {})
    monkeypatch.setattr(image_input, "_simplejpeg", None)
    rejected = refuse(claim(kind, 5_001, 5_000))
    assert rejected.status == 413
    assert rejected.detail == "expected at most 25,000,000 pixels, found 5,001 x 5,000"
    rejected = refuse(claim(kind, 16_000, 2), max_side=15_999)
    assert rejected.status == 413
    assert rejected.detail == "expected at most 15,999 pixels a side, found 16,000 x 2"
    assert refuse(claim(kind, 2, 16_000), max_side=15_999).status == 413


@pytest.mark.parametrize("name", WHOLE)
def test_the_most_pixels_allowed_are_decoded_and_one_more_is_413(
    read: Callable[..., Array], refuse: Callable[..., Any], decoder: str, name: str
) -> None:
    height, width, _ = read(WHOLE[name]).shape
    assert read(WHOLE[name], max_pixels=width * height).shape == (height, width, 3)
    assert refuse(WHOLE[name], max_pixels=width * height - 1).status == 413
    side = max(width, height)
    assert read(WHOLE[name], max_side=side).shape == (height, width, 3)
    assert refuse(WHOLE[name], max_side=side - 1).status == 413


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG"])
def test_an_image_without_pixels_is_400(refuse: Callable[..., Any], kind: str) -> None:
    assert refuse(claim(kind, 0, 5)).status == 400
    assert refuse(claim(kind, 5, 0)).status == 400


def test_too_many_bytes_are_413(read: Callable[..., Array], refuse: Callable[..., Any]) -> None:
    payload = WHOLE["PNG"]
    assert read(payload, max_bytes=len(payload)).shape == (20, 24, 3)
    rejected = refuse(payload, max_bytes=len(payload) - 1)
    assert rejected.status == 413
    assert rejected.detail.endswith(f"found {len(payload):,}")


def test_limits_above_pillows_own_hold_too(
    read: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Image.open would refuse 20
    assert read(WHOLE["PNG"]).shape == (20, 24, 3)


def test_a_second_header_of_a_png_does_not_get_past_the_limits(
    refuse: Callable[..., Any],
) -> None:
    second = make_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    rejected = refuse(make_png(1, 1, bytes(4), before=second))
    assert rejected.status == 413


@pytest.mark.parametrize("side", [6_000, 11_000, 65_535])
def test_a_gifs_frame_beyond_its_screen_does_not_get_past_the_limits(
    refuse: Callable[..., Any], side: int
) -> None:
    payload = bytearray(encode_image(Image.new("L", (4, 4)), "GIF"))
    frame = payload.index(b"," + struct.pack("<HHHH", 0, 0, 4, 4))
    payload[frame + 5 : frame + 9] = struct.pack("<HH", side, side)
    assert refuse(payload).status == 413


# What costs a decoder much more than its bytes suggest.


def test_a_jpeg_of_very_many_scans_is_413(
    read: Callable[..., Array], refuse: Callable[..., Any], decoder: str
) -> None:
    jpeg = WHOLE["progressive JPEG"]
    assert jpeg.count(b"\xff\xda") < 20
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    rejected = refuse(jpeg[:-2] + 100 * last + jpeg[-2:])
    assert (rejected.status, "100 scans" in rejected.detail) == (413, True)


def test_a_png_of_very_many_chunks_is_413(
    read: Callable[..., Array], refuse: Callable[..., Any]
) -> None:
    chunk = make_chunk(b"prIv", b"")
    assert read(make_png(1, 1, bytes(4), before=900 * chunk)).shape == (1, 1, 3)
    rejected = refuse(make_png(1, 1, bytes(4), before=10_000 * chunk))
    assert (rejected.status, "10,000 chunks" in rejected.detail) == (413, True)


def test_a_jpeg_of_very_many_segments_is_400(refuse: Callable[..., Any], decoder: str) -> None:
    payload = put_segments(WHOLE["JPEG"], *[make_segment(0xFE, b"")] * 5_000)
    assert refuse(payload).status == 400
    assert refuse(put_segments(WHOLE["JPEG"], b"\xff\xd0" * 5_000)).status == 400


def test_a_bmp_of_run_lengths_is_415(refuse: Callable[..., Any]) -> None:
    payload = bytearray(encode_image(make_noise().convert("P"), "BMP"))
    payload[30:34] = struct.pack("<I", 1)
    rejected = refuse(payload)
    assert (rejected.status, "run lengths" in rejected.detail) == (415, True)


@pytest.mark.parametrize(
    "chunks",
    [
        make_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        make_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        80 * make_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)),
    ],
    ids=["profile", "text", "texts"],
)
def test_what_a_png_unpacks_beside_its_pixels_is_limited(
    refuse: Callable[..., Any], chunks: bytes
) -> None:
    assert refuse(make_png(1, 1, bytes(4), before=chunks)).status == 400


def make_overlapping_exif(tags: int, size: int) -> bytes:
    """Return EXIF whose tags all point at the same bytes: read as it stands it is much larger."""
    entries = b"".join(struct.pack("<HHII", 1_000 + tag, 7, size, 8) for tag in range(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(size)


def test_exif_that_would_unfold_is_not_read(read: Callable[..., Array], decoder: str) -> None:
    # Pillow 13 warns of each tag, and a warning is an error here; older ones copy them all.
    exif = b"Exif\0\0" + make_overlapping_exif(2_000, 30_000)
    payload = put_segments(WHOLE["JPEG"], make_segment(0xE1, exif))
    assert np.array_equal(read(payload), to_rgb(WHOLE["JPEG"]))
    payload = make_png(
        1, 1, bytes(4), before=make_chunk(b"eXIf", make_overlapping_exif(60_000, 1_000_000))
    )
    assert read(payload).shape == (1, 1, 3)


def test_pillow_is_given_a_jpeg_without_its_metadata(image_input: ModuleType) -> None:
    jpeg = encode_image(
        make_noise().convert("CMYK"), "JPEG", comment=b"a word", icc_profile=b"p" * 100_000
    )
    jpeg = put_segments(jpeg, make_segment(0xE1, b"Exif\0\0" + make_exif(6)))
    bare = Image.open(io.BytesIO(image_input._drop_metadata(jpeg)))
    assert set(bare.info) == {"adobe", "adobe_transform"}
    assert np.array_equal(np.asarray(bare), np.asarray(Image.open(io.BytesIO(jpeg))))


# Both decoders of JPEGs.


def make_jpegs(count: int) -> Iterator[bytes]:
    """Give JPEGs of every kind that an encoder may write."""
    generator = np.random.default_rng(11)
    for number in range(count):
        largest = 20 if number % 4 == 0 else 120
        size = (int(generator.integers(1, largest)), int(generator.integers(1, largest)))
        image = make_noise(number, size) if number % 3 == 0 else make_photo(size, number)
        options: dict[str, Any] = {"quality": int(generator.integers(5, 101))}
        if number % 7 == 0:
            image = image.convert("L")
        elif number % 11 == 0:
            options["keep_rgb"] = True
        else:
            options["subsampling"] = ("4:4:4", "4:2:2", "4:2:0", "4:1:1")[number % 4]
        if generator.random() < 0.4:
            options["progressive"] = True
        if generator.random() < 0.3:
            options["restart_marker_blocks"] = int(generator.integers(1, 9))
        yield encode_image(image, "JPEG", **options)


def test_simplejpeg_gives_the_pixels_that_pillow_gives(
    image_input: ModuleType, read: Callable[..., Array]
) -> None:
    for payload in make_jpegs(600):
        frame = image_input._read_frame(payload)
        fast = image_input._decode_fast(payload, frame, 1)
        assert fast is not None
        assert np.array_equal(np.asarray(fast), to_rgb(payload))
        assert np.array_equal(read(payload), to_rgb(payload))


def test_pillow_alone_gives_the_pixels_that_pillow_gives(
    image_input: ModuleType, read: Callable[..., Array]
) -> None:
    with without_simplejpeg(image_input):
        for payload in make_jpegs(100):
            assert np.array_equal(read(payload), to_rgb(payload))


@pytest.mark.parametrize("error", [ImportError, RuntimeError("built for another numpy")])
def test_a_simplejpeg_that_does_not_import_is_done_without(
    image_input: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(image_input.importlib, "import_module", fail)
    assert image_input._find_simplejpeg() is None


JPEGS = [payload for name, payload in WHOLE.items() if "JPEG" in name]


@given(
    payload=st.sampled_from(JPEGS),
    damage=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 4), st.binary(max_size=4)),
        max_size=4,
    ),
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_jpeg_fares_alike_with_either_decoder(
    image_input: ModuleType,
    payload: bytes,
    damage: list[tuple[float, int, bytes]],
) -> None:
    for position, length, replacement in damage:
        start = int(position * len(payload))
        payload = payload[:start] + replacement + payload[start + length :]
    fast = _read_or_reject(image_input, payload)
    with without_simplejpeg(image_input):
        slow = _read_or_reject(image_input, payload)
    if isinstance(fast, int) or isinstance(slow, int):
        assert fast == slow
    else:
        assert torch.equal(fast, slow)


# Decoding at a smaller scale.


@pytest.mark.parametrize("size", [(64, 64), (65, 63), (100, 300), (641, 479)])
@pytest.mark.parametrize("at_least", [(1, 1), (8, 8), (24, 24), (31, 32), (200, 20), (480, 640)])
def test_a_scaled_jpeg_is_no_smaller_than_asked_for_nor_twice_as_large(
    read: Callable[..., Array], decoder: str, size: tuple[int, int], at_least: tuple[int, int]
) -> None:
    width, height = size
    payload = encode_image(make_photo(size), "JPEG")
    scaled = read(payload, at_least=at_least)
    fits = [s for s in (8, 4, 2) if height >= s * at_least[0] and width >= s * at_least[1]]
    scale = max(fits, default=1)
    assert scaled.shape == (-(-height // scale), -(-width // scale), 3)


def test_both_decoders_scale_alike(image_input: ModuleType, read: Callable[..., Array]) -> None:
    for payload in make_jpegs(200):
        for at_least in ((1, 1), (9, 9), (30, 20)):
            fast = read(payload, at_least=at_least)
            with without_simplejpeg(image_input):
                assert np.array_equal(fast, read(payload, at_least=at_least))


def test_the_sides_asked_for_are_those_of_the_upright_image(
    read: Callable[..., Array], decoder: str
) -> None:
    jpeg = encode_image(make_photo((400, 100)), "JPEG")
    payload = put_segments(jpeg, make_segment(0xE1, b"Exif\0\0" + make_exif(6)))
    assert read(payload).shape == (400, 100, 3)
    assert read(payload, at_least=(200, 50)).shape == (200, 50, 3)
    assert read(payload, at_least=(50, 200)).shape == (400, 100, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_come_in_full(read: Callable[..., Array], kind: str) -> None:
    payload = encode_image(make_photo((64, 64)), kind)
    assert read(payload, at_least=(8, 8)).shape == (64, 64, 3)


def test_a_scaled_jpeg_resizes_to_nearly_the_same_pixels(
    image_input: ModuleType, read: Callable[..., Array]
) -> None:
    for seed in range(5):
        payload = encode_image(make_photo((640, 480), seed), "JPEG", quality=90)
        full, scaled = (
            image_input.resize_image(torch.from_numpy(pixels.copy()), (24, 24)).int()
            for pixels in (read(payload), read(payload, at_least=(24, 24)))
        )
        assert (full - scaled).abs().max() <= 3
        assert (full - scaled).abs().float().mean() < 0.5


def test_limits_hold_for_the_whole_image_however_small_it_is_decoded(
    image_input: ModuleType,
) -> None:
    payload = encode_image(make_photo((64, 64)), "JPEG")
    with pytest.raises(image_input.RejectedInput) as caught:
        image_input.read_image(payload, image_input.ImageLimits(max_pixels=4_000), at_least=(8, 8))
    assert caught.value.status == 413


# Resizing.


def make_sizes(count: int) -> Iterator[tuple[int, int, int, int]]:
    generator = np.random.default_rng(5)
    highest = [(6, 200, 6, 200), (200, 6, 200, 6), (6, 6, 200, 200), (200, 200, 6, 6), (300,) * 4]
    for number in range(count):
        height, width, to_height, to_width = generator.integers(1, highest[number % 5]).tolist()
        yield height, width, to_height, to_width


def resize_by_pillow(pixels: Array, size: tuple[int, int]) -> Array:
    image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def test_no_value_differs_from_pillows_by_more_than_one(image_input: ModuleType) -> None:
    for number, (height, width, *size) in enumerate(make_sizes(500)):
        pixels = np.array(make_noise(number, (width, height)))
        resized = image_input.resize_image(torch.from_numpy(pixels), tuple(size))
        expected = resize_by_pillow(pixels, (size[0], size[1]))
        assert np.abs(resized.numpy().astype(int) - expected).max() <= 1


def test_values_are_torchs_own(image_input: ModuleType) -> None:
    for number, (height, width, *size) in enumerate(make_sizes(200)):
        if size[1] == 1:
            continue
        pixels = torch.from_numpy(np.array(make_noise(number, (width, height))))
        expected = torch.nn.functional.interpolate(
            pixels.permute(2, 0, 1)[None], size=tuple(size), mode="bilinear", antialias=True
        )
        assert torch.equal(image_input.resize_image(pixels, tuple(size)), expected[0])


@pytest.mark.parametrize("size", [(24, 24), (20, 24), (1, 1), (300, 1), (1, 300), (480, 640)])
def test_a_resized_image_is_contiguous_and_of_the_size_asked_for(
    image_input: ModuleType, size: tuple[int, int]
) -> None:
    resized = image_input.resize_image(torch.from_numpy(np.array(make_noise())), size)
    assert (resized.shape, resized.dtype) == ((3, *size), torch.uint8)
    assert resized.is_contiguous()


def test_an_image_of_the_right_size_keeps_its_values(image_input: ModuleType) -> None:
    pixels = torch.from_numpy(np.array(make_noise()))
    resized = image_input.resize_image(pixels, (20, 24))
    assert torch.equal(resized, pixels.permute(2, 0, 1))


@pytest.mark.parametrize("size", [(24, 24), (30, 1)])
def test_images_resized_together_are_what_each_is_alone(
    image_input: ModuleType, size: tuple[int, int]
) -> None:
    sizes = [(40, 30), (24, 24), (40, 30), (30, 40), (200, 7), (24, 24), (40, 30)]
    images = [torch.from_numpy(np.array(make_noise(i, wanted))) for i, wanted in enumerate(sizes)]
    together = image_input.resize_images(images, size)
    assert len(together) == len(images)
    for resized, pixels in zip(together, images, strict=True):
        assert torch.equal(resized, image_input.resize_image(pixels, size))
    assert image_input.resize_images([], size) == []


def test_a_processor_without_avx2_gives_the_same_values(root: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'handlers')\n"
        "import image_input, numpy as np, torch, hashlib\n"
        "numbers = np.random.default_rng(0).integers(0, 256, (97, 5, 3), np.uint8)\n"
        "for size in ((96, 1), (24, 24), (40, 3)):\n"
        "    resized = image_input.resize_image(torch.from_numpy(numbers), size)\n"
        "    print(hashlib.sha256(resized.numpy().tobytes()).hexdigest())\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for variables in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    }
    assert len(answers) == 1


# Anything at all.

BEGINNINGS = [b"", *(payload[:length] for payload in WHOLE.values() for length in (12, 30, 60))]


@given(beginning=st.sampled_from(BEGINNINGS), rest=st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_an_image_or_a_rejected_input(
    image_input: ModuleType, beginning: bytes, rest: bytes
) -> None:
    _read_or_reject(image_input, beginning + rest)


@given(
    payload=st.sampled_from(list(WHOLE.values())),
    damage=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=8)), max_size=4
    ),
    at_least=st.none() | st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
@settings(max_examples=1_000, deadline=None)
def test_any_damage_to_an_image_gives_an_image_or_a_rejected_input(
    image_input: ModuleType,
    payload: bytes,
    damage: list[tuple[float, bytes]],
    at_least: tuple[int, int] | None,
) -> None:
    for position, replacement in damage:
        start = int(position * len(payload))
        payload = payload[:start] + replacement + payload[start + len(replacement) :]
    _read_or_reject(image_input, payload, at_least)


def _read_or_reject(
    image_input: ModuleType, payload: bytes, at_least: tuple[int, int] | None = None
) -> torch.Tensor | int:
    """Return the pixels, or the status of the rejection; nothing else is let through."""
    limits = image_input.ImageLimits(max_pixels=1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged metadata
        try:
            pixels: torch.Tensor = image_input.read_image(payload, limits, at_least=at_least)
        except image_input.RejectedInput as rejected:
            status = int(rejected.status)
        else:
            status = 200
    if status != 200:
        assert status in (400, 413, 415)
        return status
    assert pixels.dtype == torch.uint8
    assert pixels.shape[2:] == (3,)
    return pixels
