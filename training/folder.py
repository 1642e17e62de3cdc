"""A folder of images, DIR/class/*: classes by name, whatever is below a class belongs to it.

The pictures come from anywhere: those that cannot be read are listed and left out. An image is
decoded to what handlers/image_input.py makes of the same bytes; tests/training/test_folder.py
holds the two together.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from marwright.errors import DataError
from marwright.storage import translate_os_errors

from .data import FEWEST_OF_A_CLASS, DataSet, make_transform

__all__ = ["load_folder", "read_picture"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what the handler reads too
_NAMES = "PNG, JPEG, WebP, GIF or BMP"
# What is called an image; other files, such as Thumbs.db, are no images that failed.
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".heic", ".ppm"),
)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_folder(
    name: str, folder: Path, *, image_size: tuple[int, int], most_unreadable: float
) -> DataSet:
    """Load DIR/class/* as (N, 3, H, W) uint8.

    Raises:
        DataError: no such folder, too few classes or images, or too many that cannot be read.
        StorageError: a folder in it may not be listed.
    """
    found = _list_images(folder)
    counts = {label: len(paths) for label, paths in found.items()}
    _check_counts(folder, counts, "images")  # before minutes of decoding
    classes = tuple(counts)
    items = [(path, label) for label, paths in enumerate(found.values()) for path in paths]
    transform = make_transform(image_size)
    inputs = torch.empty(len(items), 3, *image_size, dtype=torch.uint8)
    digest = hashlib.sha256()
    read: list[tuple[Path, int]] = []
    unreadable: list[str] = []
    for path, label in items:
        try:
            payload = _read_bytes(path)
            inputs[len(read)] = transform(read_picture(payload))
        except DataError as exc:
            unreadable.append(f"{path}: {exc}")
            continue
        digest.update(hashlib.sha256(payload).digest())
        read.append((path, label))
    _check_unreadable(folder, unreadable, len(items), most_unreadable)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    readable = torch.bincount(labels, minlength=len(classes)).tolist()
    _check_counts(folder, dict(zip(classes, readable, strict=True)), "readable images")
    digest.update(labels.numpy().tobytes())
    return DataSet(
        name=name,
        inputs=inputs[: len(read)],
        labels=labels,
        classes=classes,
        digest=digest.hexdigest(),
        open_sample=lambda index: read_picture(_read_bytes(read[index][0])),
        unreadable=tuple(unreadable),
    )


def read_picture(payload: bytes) -> Image.Image:
    """Decode an image to RGB, upright by its EXIF.

    Raises:
        DataError: it is damaged, cut short, of an unknown format, or of far too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about EXIF and palettes: nothing to be done
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
                image.load()
                return _turn(_convert(image), image.info.get("exif", b""))
        except MemoryError:
            raise
        except UnidentifiedImageError as exc:
            raise DataError(f"no {_NAMES} image, or one with a damaged header") from exc
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
            raise DataError(f"too many pixels: {exc}") from exc
        except Exception as exc:  # Pillow's parsers raise many types for damaged data
            raise DataError(f"damaged: {exc}") from exc


def _convert(image: Image.Image) -> Image.Image:
    """Return RGB as the handler has it: alpha and transparency dropped, 16 bits scaled to 8."""
    if image.mode.startswith("I"):  # convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _turn(image: Image.Image, block: bytes) -> Image.Image:
    """Turn an image as its EXIF block says; ImageOps.exif_transpose would heed XMP as well."""
    exif = Image.Exif()
    try:
        exif.load(block)
        turn = _TURNS.get(exif.get(_ORIENTATION, 1))
    except Exception:  # a damaged block raises many types, and says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise DataError("no regular file")
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"cannot be opened: {exc.strerror}") from exc


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Return each class's image files, both sorted by name."""
    if not folder.exists():
        raise DataError(f"there is no folder {folder}", expected="DIR/class/*.jpg")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file", expected="a folder: DIR/class/*.jpg")
    with translate_os_errors(f"read the images in {folder}"):
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        return {path.name: list(_walk(path, {folder.resolve()})) for path in classes}


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield image files at any depth; links are followed, but to no folder a second time."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # editors' and systems' own
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.suffix.lower() in _SUFFIXES:
            yield path


def _check_counts(folder: Path, counts: dict[str, int], what: str) -> None:
    layout = f"{folder}{os.sep}CLASS{os.sep}*.jpg"
    if not any(counts.values()):
        raise DataError(f"there are no {what} in {folder}", expected=layout)
    if len(counts) < 2:
        raise DataError(
            f"{folder} has one class", expected="two or more folders", found=", ".join(counts)
        )
    scarce = [f"{label} ({count})" for label, count in counts.items() if count < FEWEST_OF_A_CLASS]
    if scarce:
        raise DataError(
            f"classes in {folder} have too few {what}",
            expected=f"at least {FEWEST_OF_A_CLASS}: training, validation and test need one each",
            found=", ".join(scarce),
            remedy="add images, or take the folder out",
        )


def _check_unreadable(folder: Path, unreadable: list[str], count: int, most: float) -> None:
    if len(unreadable) > most * count:
        raise DataError(
            f"{len(unreadable):,} of {count:,} images in {folder} cannot be read",
            expected=f"at most {most:.0%}",
            found="; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else ""),
            remedy="mend them or take them out",
        )
