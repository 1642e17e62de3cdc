from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from marwright.monitor.page import pictures
from marwright.monitor.page.pictures import Pictures, draw_anew


def encode(size: tuple[int, int], kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, kind, **options)
    return stream.getvalue()


def read(content: bytes | None) -> Image.Image:
    assert content is not None
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_picture_is_drawn_anew_as_a_small_png(kind: str) -> None:
    image = read(draw_anew(encode((400, 100), kind), side=96))
    assert image.size == (96, 24)
    pixel = image.convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 150 > 80 > pixel[1]


def test_a_small_picture_is_enlarged_by_whole_steps() -> None:
    assert read(draw_anew(encode((24, 20), "PNG"), side=96)).size == (96, 80)
    assert read(draw_anew(encode((60, 20), "PNG"), side=96)).size == (60, 20)


def test_nothing_that_was_sent_along_is_handed_on() -> None:
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "<script>alert(1)</script>")
    sent = encode((30, 30), "PNG", pnginfo=note) + b"<script>alert(2)</script>"
    assert b"script" in sent
    assert b"script" not in (draw_anew(sent, side=96) or b"script")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        encode((40, 40), "PNG")[:60],
        encode((40, 40), "JPEG")[:200],
        encode((40, 40), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
)
def test_what_is_no_whole_picture_is_none(content: bytes) -> None:
    assert draw_anew(content, side=96) is None


def test_a_bomb_is_not_unpacked() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    assert draw_anew(bomb, side=96) is None
    large = encode((5000, 4000), "PNG")
    assert draw_anew(large, side=96) is None


def test_thumbnails_are_bounded_and_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "KEPT", 3)
    kept = Pictures()
    names = [kept.add(encode((10 + n, 10), "PNG")) for n in range(5)]
    assert [kept.find(name) is not None for name in names] == [False, False, True, True, True]
    assert kept.add(b"no picture") == ""
    assert kept.find("no such name") is None
