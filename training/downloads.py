"""Published data sets, read by torchvision: MNIST, Fashion-MNIST and CIFAR-10.

Their training and test parts are joined: marwright splits by itself. Files that a user placed are
as good as downloaded ones, packed or unpacked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marwright.errors import DataError

from .vision import datasets

__all__ = ["default_data_root", "PUBLISHED", "read_published"]

PUBLISHED: dict[str, Any] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
}
"""torchvision's classes, by the names that load_data takes."""

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]


def default_data_root() -> Path:
    """Return the folder that published data sets lie in: $XDG_DATA_HOME/marwright/data."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(home) / "marwright/data"


def read_published(source: str, *, data_root: Path | None, download: bool) -> Arrays:
    """Return (N, H, W) or (N, H, W, 3) uint8 pixels, (N,) labels, and the classes' names.

    Raises:
        DataError: files are missing or broken, or could not be downloaded.
    """
    root = data_root or default_data_root()
    packed, unpacked = _list_files(source, root)
    unpack = not all(path.is_file() for path in unpacked)
    if unpack and not download:
        _check_packed(source, packed)
    try:
        parts = _open_parts(PUBLISHED[source], root, download=unpack)
        return _join_parts(source, parts)
    # Sockets, archives, and torchvision's readers, which also assert.
    except Exception as exc:
        if unpack and not all(path.is_file() for path in packed):
            raise _explain_missing(source, packed, f"the download failed: {_flatten(exc)}") from exc
        raise _explain_broken(source, [path.parent for path in unpacked][:1], exc) from exc


def _list_files(source: str, root: Path) -> tuple[dict[Path, str], list[Path]]:
    """Return the published files with their md5, and what they unpack to."""
    kind = PUBLISHED[source]
    if source == "cifar10":
        names = [name for name, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
        folder = root / kind.base_folder
        return {root / kind.filename: kind.tgz_md5}, [folder / name for name in names]
    folder = root / kind.__name__ / "raw"
    packed = {folder / name: md5 for name, md5 in kind.resources}
    return packed, [path.with_suffix("") for path in packed]


def _check_packed(source: str, packed: dict[Path, str]) -> None:
    missing = [path for path in packed if not path.is_file()]
    if missing:
        raise _explain_missing(source, packed, ", ".join(path.name for path in missing) + " absent")
    check_integrity: Callable[[Path, str], bool] = datasets.utils.check_integrity
    broken = [path for path, md5 in packed.items() if not check_integrity(path, md5)]
    if broken:
        raise _explain_broken(source, broken, "other bytes than were published (md5)")


def _open_parts(kind: Any, root: Path, *, download: bool) -> list[Any]:
    """Return torchvision's training and test part.

    `download` also unpacks, and takes nothing from the network while the packed files are there.
    CIFAR-10's batches are pickles, which could run any code: torchvision compares their md5 with
    the published ones before it unpickles.
    """
    with warnings.catch_warnings():
        # Of numpy, for how old pickles name their types; of tarfile, for a default that changes.
        warnings.simplefilter("ignore")
        return [kind(root, train=train, download=download) for train in (True, False)]


def _join_parts(source: str, parts: list[Any]) -> Arrays:
    pixels = np.concatenate([np.asarray(part.data, np.uint8) for part in parts])
    labels = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    names = list(map(str, range(10))) if source == "mnist" else parts[0].classes
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels):,} images, but {len(labels):,} labels")
    if not len(labels) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels are not all among 0 to {len(names) - 1}")
    return np.ascontiguousarray(pixels), labels, tuple(names)


def _explain_missing(source: str, packed: dict[Path, str], found: str) -> DataError:
    folder = next(iter(packed)).parent
    return DataError(
        f"the files of {source} are not in {folder}",
        expected=", ".join(path.name for path in packed),
        found=found,
        remedy="place them there, or pass --download",
    )


def _explain_broken(source: str, paths: list[Path], found: object) -> DataError:
    names = ", ".join(map(str, paths))
    return DataError(
        f"the files of {source} are broken: {names}",
        found=_flatten(found),
        remedy="remove them, and place them again or pass --download",
    )


def _flatten(reason: object) -> str:
    """Return an error's text as one line, or its type where it has none."""
    return " ".join(str(reason).split()) or type(reason).__name__
