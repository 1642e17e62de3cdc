"""From an image's bytes to its pixels: a tensor of RGB, upright, of the size a model wants.

Bytes are hostile until checked: formats are few, and sizes, scans and chunks are read from the
headers before a decoder sees them. docs/pixels.md has the rules and what they cost.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from problem import RejectedInput

__all__ = ["ImageLimits", "read_image", "resize_image", "resize_images", "scale_pixels"]

# Opened by class: Image.open takes a third longer for a small image, and counts pixels by a limit
# of its own.
_PLUGINS: dict[str, Any] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
_NAMES = "PNG, JPEG, WebP, GIF or BMP"

# What costs a decoder much more time than its bytes suggest, far above what any encoder writes.
_MAX_SCANS = 100  # each passes over the whole image: 300 scans in 109 kB took 5 seconds
_MAX_SEGMENTS = 4_096
_MAX_CHUNKS = 10_000

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC lie between them
_FRAME = struct.Struct(">BHHB")
_SCAN = 0xDA
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112


def _find_simplejpeg() -> Any:
    """Return simplejpeg, or None: it is an extra, and Pillow decodes to the same pixels."""
    try:
        return importlib.import_module("simplejpeg")
    except Exception:  # built for another numpy it raises other errors than ImportError
        return None


_simplejpeg = _find_simplejpeg()


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be, checked before its pixels are decoded."""

    max_bytes: int = 6_000_000
    """Encoded size; TorchServe itself refuses bodies above max_request_size (6,553,500)."""
    max_pixels: int = 25_000_000
    """Width times height, as the image's own header states them."""
    max_side: int = 16_384
    """Width, and height."""


def read_image(
    payload: bytes | bytearray | memoryview,
    limits: ImageLimits,
    *,
    at_least: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Decode an image to (H, W, 3) uint8: RGB, upright by its EXIF, contiguous.

    With `at_least` (height, width) a JPEG may come smaller, by the largest of 8, 4 and 2 that
    leaves it no smaller than that: faster, with other pixels once resized (docs/pixels.md).

    Raises:
        RejectedInput: 400 for nothing or a damaged image, 413 for too large, 415 for no image.
    """
    if not len(payload):
        raise RejectedInput(400, "expected the bytes of an image, found 0 bytes")
    if len(payload) > limits.max_bytes:
        raise RejectedInput(
            413, f"expected at most {limits.max_bytes:,} bytes, found {len(payload):,}"
        )
    data = payload.tobytes() if isinstance(payload, memoryview) else payload
    kind = _name_format(data)
    if kind == "JPEG":
        return _read_jpeg(data, limits, at_least)
    try:
        width, height = _read_size(kind, data)
    except (struct.error, IndexError) as exc:
        raise _damaged(kind, "its header is cut short") from exc
    _check_size(width, height, limits)
    image = _decode(kind, data, limits)
    return _turn(_to_tensor(image), _read_orientation(image.info.get("exif", b"")))


def resize_image(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (H, W, 3) uint8 to (3, h, w) uint8, contiguous, `size` being (h, w).

    Bilinear and antialiased: torchvision's values for the same bytes, to the last bit (but for a
    width of 1), and within 1 of Pillow's.
    """
    return _resize(pixels[None], size)[0]


def resize_images(images: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
    """Resize as resize_image does, all of one shape in one go: 64x64 takes 20 us instead of 40.

    The images are copied: not for large ones.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for index, pixels in enumerate(images):
        shapes.setdefault(pixels.shape, []).append(index)
    resized = list(images)
    for indices in shapes.values():
        batch = _resize(torch.stack([images[index] for index in indices]), size)
        for index, planes in zip(indices, batch, strict=True):
            resized[index] = planes
    return resized


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Return bytes as numbers from 0 to 1.

    Times 1/255, as torchvision scales: dividing by 255 differs in the last bit.
    """
    return pixels.float() * (1 / 255)


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (N, H, W, 3) uint8 to (N, 3, h, w) uint8, contiguous."""
    height, width = size
    planes = images.permute(0, 3, 1, 2)
    if planes.shape[2:] == size:
        return planes.contiguous()
    if width == 1:  # without AVX2 torch reads beside the image here, and values are off by 200
        columns = [
            Image.fromarray(pixels.numpy()).resize((1, height), Image.Resampling.BILINEAR)
            for pixels in images
        ]
        return (
            torch.stack([_to_tensor(column) for column in columns]).permute(0, 3, 1, 2).contiguous()
        )
    # What torch.nn.functional.interpolate(mode="bilinear", antialias=True) comes to; its checks
    # would take a fifth as long again for a small image.
    return torch._C._nn._upsample_bilinear2d_aa(planes, (height, width), False, None).contiguous()


def _name_format(data: bytes | bytearray) -> str:
    """Tell the format by the first bytes, whatever the client calls it."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    raise RejectedInput(
        415,
        f"expected a {_NAMES} image, found {len(data):,} bytes beginning with {bytes(data[:12])!r}",
    )


def _read_size(kind: str, data: bytes | bytearray) -> tuple[int, int]:
    """Return width and height, read before Pillow sees anything; check what else costs time."""
    if kind == "PNG":
        _count_chunks(data)
        width, height = struct.unpack_from(">II", data, 16)
    elif kind == "GIF":
        width, height = struct.unpack_from("<HH", data, 6)
    elif kind == "BMP":
        (header,) = struct.unpack_from("<I", data, 14)
        if header == 12:
            return struct.unpack_from("<HH", data, 18)
        width, height, _, compression = struct.unpack_from("<iiII", data, 18)
        if compression in (1, 2):  # Pillow unpacks runs in Python: 5.6 seconds for 6 MB
            raise RejectedInput(415, "expected a BMP image without compression, found run lengths")
    elif data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return width, abs(height)  # a BMP that begins with its top row states a negative height


def _count_chunks(data: bytes | bytearray) -> None:
    """Refuse a PNG of very many chunks, which Pillow reads one by one: 7 seconds for 6 MB."""
    position = 8
    for _ in range(_MAX_CHUNKS):
        if position + 12 > len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise RejectedInput(413, f"expected at most {_MAX_CHUNKS:,} chunks in a PNG, found more")


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise RejectedInput(400, f"expected an image with pixels, found {width} x {height}")
    if width * height > limits.max_pixels:
        raise RejectedInput(
            413, f"expected at most {limits.max_pixels:,} pixels, found {width:,} x {height:,}"
        )
    if max(width, height) > limits.max_side:
        raise RejectedInput(
            413,
            f"expected at most {limits.max_side:,} pixels a side, found {width:,} x {height:,}",
        )


def _damaged(kind: str, reason: object) -> RejectedInput:
    return RejectedInput(
        400, f"expected a whole {kind} image, found a damaged one: {str(reason)[:200]}"
    )


def _decode(
    kind: str, data: bytes | bytearray, limits: ImageLimits, draft: tuple[int, int] | None = None
) -> Image.Image:
    """Decode by Pillow; `draft` (width, height) makes it scale a JPEG."""
    try:
        image: Image.Image = _PLUGINS[kind](io.BytesIO(data))
        _check_size(*image.size, limits)  # a second header, or a GIF's frame, may state another
        if draft is not None:
            image.draft(None, draft)
        image.load()
    except (RejectedInput, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise RejectedInput(413, f"expected at most {limits.max_pixels:,} pixels: {exc}") from exc
    except Exception as exc:  # Pillow's parsers raise many types for damaged data
        raise _damaged(kind, exc) from exc
    return image


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Copy Pillow's pixels to (H, W, 3) uint8."""
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255, not scale
        grey = torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8))
        return grey[:, :, None].repeat(1, 1, 3)
    image.info.pop("transparency", None)  # convert() would look for a colour to stand for it
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # drops alpha, as training does
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3)


class _Frame(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    width: int
    height: int
    components: int
    process: int
    """The marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive; others are rare."""
    orientation: int
    end: int
    """Where the frame's header ends, and tables and scans begin."""


def _read_jpeg(
    data: bytes | bytearray, limits: ImageLimits, at_least: tuple[int, int] | None
) -> torch.Tensor:
    frame = _read_frame(data)
    _check_size(frame.width, frame.height, limits)
    # Both decoders would make up what is missing at the end, and one of them without a word.
    if not data.endswith(b"\xff\xd9") and data.rfind(b"\xff\xd9", frame.end) < 0:
        raise _damaged("JPEG", "its end is missing")
    if frame.process > 0xC1 and data.count(b"\xff\xda", frame.end) > _MAX_SCANS:
        raise RejectedInput(413, f"expected at most {_MAX_SCANS} scans in a JPEG, found more")
    scale = _choose_scale(frame, at_least)
    pixels = _decode_fast(data, frame, scale)
    if pixels is None:
        draft = None if scale == 1 else (frame.width // scale, frame.height // scale)
        pixels = _to_tensor(_decode("JPEG", _drop_metadata(data), limits, draft))
    return _turn(pixels, frame.orientation)


def _walk(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Give marker, start and end of a JPEG's segments; what stands between them is skipped."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        try:
            position = data.index(0xFF, position)
            marker = data[position + 1]
            if marker == 0xFF or 0xD0 <= marker <= 0xD7 or marker < 0x02:
                position += 1 if marker == 0xFF else 2  # filling, or a marker without a length
                continue
            end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        except (ValueError, IndexError) as exc:
            raise _damaged("JPEG", "its header is cut short") from exc
        yield marker, position, end
        position = end
    raise _damaged("JPEG", f"more than {_MAX_SEGMENTS:,} segments before its pixels")


def _read_frame(data: bytes | bytearray) -> _Frame:
    orientation = 0
    for marker, start, end in _walk(data):
        if marker == 0xE1 and not orientation and data.startswith(_EXIF, start + 4):
            orientation = _read_orientation(data[start + 4 : end])
        elif marker in _FRAMES:
            try:
                bits, height, width, components = _FRAME.unpack_from(data, start + 4)
            except struct.error as exc:
                raise _damaged("JPEG", "its header is cut short") from exc
            if bits != 8:
                raise RejectedInput(415, f"expected a JPEG of 8 bits a sample, found {bits}")
            return _Frame(width, height, components, marker, orientation or 1, end)
        elif marker == _SCAN:
            break
    raise _damaged("JPEG", "it has no header")


def _choose_scale(frame: _Frame, at_least: tuple[int, int] | None) -> int:
    if at_least is None or min(frame.height, frame.width) < 16:
        return 1  # of so few pixels simplejpeg would take another scale that gives the same size
    height, width = at_least if frame.orientation < 5 else at_least[::-1]
    for scale in (8, 4, 2):
        if frame.height >= scale * height and frame.width >= scale * width:
            return scale
    return 1


def _decode_fast(data: bytes | bytearray, frame: _Frame, scale: int) -> torch.Tensor | None:
    """Decode by simplejpeg where it is there and gives the pixels that Pillow gives.

    It raises where libjpeg would only warn; then Pillow decides, so that an image's fate does not
    hang on what is installed.
    """
    if _simplejpeg is None or frame.components not in (1, 3) or frame.process > 0xC2:
        return None
    try:
        pixels = _simplejpeg.decode_jpeg(
            data, min_height=-(-frame.height // scale), min_width=-(-frame.width // scale)
        )
    except Exception:  # mostly ValueError; whatever it is, Pillow may still know better
        return None
    return torch.from_numpy(pixels)


def _drop_metadata(data: bytes | bytearray) -> bytes:
    """Leave out what makes no pixels: Pillow keeps it all, and reads EXIF though nobody asked.

    APP0 and APP14 stay: they tell the colours.
    """
    kept = [data[:2]]
    for marker, start, end in _walk(data):
        if marker == _SCAN:
            kept.append(data[start:])
            break
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start:end])
    return b"".join(kept)


def _read_orientation(exif: bytes | bytearray) -> int:
    """Return the orientation that an EXIF block names, 1 to 8; 1 where it names none.

    Pillow would read every tag, each with a copy of what it points at, and warn of every fault.
    """
    block = bytes(exif).removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, entry)
            if tag == _ORIENTATION:
                form = {3: "H", 4: "I"}.get(kind, "H")
                (value,) = struct.unpack_from(order + form, block, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _turn(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn (H, W, 3) pixels upright; 2 to 8 are EXIF's words for how they lie."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    axes = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation)
    return (pixels.flip(axes) if axes else pixels).contiguous()
