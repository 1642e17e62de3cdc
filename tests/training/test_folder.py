from __future__ import annotations

import importlib
import io
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from marwright.errors import DataError
from marwright.training.data import make_transform
from marwright.training.sources import load_data


@pytest.fixture(scope="module")
def handler(root: Path) -> Iterator[Any]:
    """The handler's decoding, imported as a worker imports it."""
    sys.path.insert(0, str(root / "handlers"))
    yield importlib.import_module("image_input")
    sys.path.remove(str(root / "handlers"))
    for path in (root / "handlers").glob("*.py"):
        sys.modules.pop(path.stem, None)


def make_image(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return a coarse pattern, which JPEG keeps."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    for label in ("dog", "cat"):
        folder = tmp_path / "pets" / label
        folder.mkdir(parents=True)
        for index in range(10):
            (folder / f"{index}.png").write_bytes(encode(make_image(index + 10 * len(folder.name))))
    return tmp_path / "pets"


def test_a_folder_is_read_by_class_and_by_name(pets: Path) -> None:
    data = load_data(f"folder:{pets}", image_size=(12, 16))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0] * 10 + [1] * 10
    assert (data.inputs.shape, data.inputs.dtype) == ((20, 3, 12, 16), torch.uint8)
    assert data.open_sample is not None
    assert data.open_sample(13).size == (40, 30)
    for index in (0, 13):
        picture = data.open_sample(index)
        assert torch.equal(data.inputs[index], make_transform((12, 16))(picture))
    assert load_data(f"folder:{pets}").inputs.shape == (20, 3, 64, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_training_reads_the_pixels_that_the_handler_reads(
    handler: Any, pets: Path, kind: str, mode: str
) -> None:
    image = make_image(1, "RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    try:
        payload = encode(image, kind)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"no {kind} of mode {mode}")
    (pets / "cat/0.png").write_bytes(payload)
    trained = load_data(f"folder:{pets}", image_size=(21, 17)).inputs[0]
    pixels = handler.read_image(payload, handler.ImageLimits())
    assert torch.equal(trained, handler.resize_image(pixels, (21, 17)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_training_turns_images_as_the_handler_does(
    handler: Any, pets: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encode(make_image(1), kind, exif=exif)
    (pets / "cat/0.png").write_bytes(payload)
    data = load_data(f"folder:{pets}")
    pixels = handler.read_image(payload, handler.ImageLimits())
    assert data.open_sample is not None
    assert np.array_equal(np.asarray(data.open_sample(0)), pixels.numpy())
    assert torch.equal(data.inputs[0], handler.resize_image(pixels, (64, 64)))


def test_an_orientation_in_xmp_alone_turns_nothing(handler: Any, pets: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    payload = encode(make_image(1), "JPEG", xmp=xmp)
    (pets / "cat/0.png").write_bytes(payload)
    data = load_data(f"folder:{pets}")
    assert data.open_sample is not None
    assert data.open_sample(0).size == (40, 30)
    assert handler.read_image(payload, handler.ImageLimits()).shape == (30, 40, 3)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0rubbish"]
)
def test_a_damaged_exif_block_says_nothing(pets: Path, block: bytes) -> None:
    (pets / "cat/0.png").write_bytes(encode(make_image(1), "JPEG", exif=b"Exif\0\0" + block))
    assert not load_data(f"folder:{pets}").unreadable


def make_bomb() -> bytes:
    """A PNG that says it has 400 million pixels."""
    payload = bytearray(encode(make_image(1)))
    payload[16:24] = struct.pack(">II", 20_000, 20_000)
    payload[29:33] = struct.pack(">I", zlib.crc32(payload[12:29]))
    return bytes(payload)


def test_what_cannot_be_read_is_listed_and_left_out(pets: Path) -> None:
    whole = load_data(f"folder:{pets}")
    jpeg = encode(make_image(1, size=(400, 300)), "JPEG")
    bad = {
        "a.jpg": jpeg[: len(jpeg) // 2],
        "b.png": encode(make_image(1))[:-30],
        "c.png": b"",
        "d.jpg": b"<html>",
        "e.png": make_bomb(),
        "f.tif": encode(make_image(1), "TIFF"),
        "g.jpg": jpeg[:-2],
    }
    for name, payload in bad.items():
        (pets / "dog" / name).write_bytes(payload)
    (pets / "dog/h.png").symlink_to("nowhere")
    os.mkfifo(pets / "dog/i.png")
    (pets / "dog/notes.txt").write_text("no image")
    (pets / "dog/.j.png").write_text("nor this")
    data = load_data(f"folder:{pets}", most_unreadable=0.5)
    names = [line.split(":")[0] for line in data.unreadable]
    assert names == [str(pets / "dog" / name) for name in [*bad, "h.png", "i.png"]]
    assert "too many pixels" in data.unreadable[4]
    assert torch.equal(data.inputs, whole.inputs)
    assert torch.equal(data.labels, whole.labels)
    assert data.digest == whole.digest


def test_pixels_above_pillows_warning_are_too_many(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pets / "cat/0.png").write_bytes(encode(make_image(1, size=(60, 50))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000)  # a warning up to 4,000
    (line,) = load_data(f"folder:{pets}").unreadable
    assert "too many pixels" in line


def test_too_many_unreadable_images_are_an_error(pets: Path) -> None:
    for index in range(3):
        (pets / f"dog/{index}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"3 of 20 images .* cannot be read: expected at most 10%"):
        load_data(f"folder:{pets}")
    (pets / "dog/0.png").write_bytes(encode(make_image(1)))
    assert len(load_data(f"folder:{pets}").unreadable) == 2


def test_folders_below_a_class_and_links_are_followed_but_no_circles(pets: Path) -> None:
    (pets / "cat/more").mkdir()
    (pets / "cat/more/x.JPG").write_bytes(encode(make_image(1), "JPEG"))
    (pets / "cat/more/circle").symlink_to(pets / "cat")
    (pets / "cat/all").symlink_to(pets)
    elsewhere = pets.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y.png").write_bytes(encode(make_image(2)))
    (pets / "cat/there").symlink_to(elsewhere)
    (pets / "dog/z.png").symlink_to(elsewhere / "y.png")
    assert load_data(f"folder:{pets}").labels.bincount().tolist() == [12, 11]


def test_a_digest_follows_bytes_and_labels(pets: Path) -> None:
    digest = load_data(f"folder:{pets}", image_size=(8, 8)).digest
    assert load_data(f"folder:{pets}").digest == digest
    (pets / "cat/9.png").rename(pets / "dog/0-first.png")
    moved = load_data(f"folder:{pets}").digest
    (pets / "dog/1.png").write_bytes(encode(make_image(77)))
    assert len({digest, moved, load_data(f"folder:{pets}").digest}) == 3


def test_a_missing_folder_and_a_file_are_refused(pets: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*none"):
        load_data(f"folder:{pets}/none")
    with pytest.raises(DataError, match=r"0\.png is a file"):
        load_data(f"folder:{pets}/cat/0.png")


def test_a_folder_without_images_or_with_one_class_is_refused(tmp_path: Path, pets: Path) -> None:
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"there are no images in .*expected .*CLASS"):
        load_data(f"folder:{tmp_path}/empty")
    with pytest.raises(DataError, match="there are no images in"):
        load_data(f"folder:{pets}/cat")  # a class, not the folder of classes
    (tmp_path / "one").mkdir()
    (pets / "cat").rename(tmp_path / "one/cat")
    with pytest.raises(DataError, match=r"has one class: .*found cat"):
        load_data(f"folder:{tmp_path}/one")


@pytest.mark.parametrize("count", [0, 2])
def test_a_class_with_too_few_images_is_refused_by_name(pets: Path, count: int) -> None:
    (pets / "eel").mkdir()
    for index in range(count):
        (pets / f"eel/{index}.png").write_bytes(encode(make_image(index)))
    with pytest.raises(DataError, match=rf"too few images: .*at least 3.*found eel \({count}\)"):
        load_data(f"folder:{pets}")


def test_a_class_without_a_readable_image_is_refused_by_name(pets: Path) -> None:
    (pets / "eel").mkdir()
    for index in range(3):
        (pets / f"eel/{index}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"too few readable images: .*found eel \(0\)"):
        load_data(f"folder:{pets}", most_unreadable=0.5)
