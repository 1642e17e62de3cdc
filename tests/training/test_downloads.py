from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marwright.errors import DataError
from marwright.training.sources import load_data
from marwright.training.vision import datasets

MNIST_FILES = {
    "train-images-idx3-ubyte.gz": 8,
    "train-labels-idx1-ubyte.gz": 8,
    "t10k-images-idx3-ubyte.gz": 4,
    "t10k-labels-idx1-ubyte.gz": 4,
}


def pack_idx(values: Any) -> bytes:
    array = np.asarray(values, np.uint8)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def place_mnist(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write 12 images whose labels are 0 to 9, 0, 1; return their pixels."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    labels = np.arange(12) % 10
    parts = (pixels[:8], labels[:8], pixels[8:], labels[8:])
    resources = []
    for name, values in zip(MNIST_FILES, parts, strict=True):
        payload = pack_idx(values)
        (folder / name).write_bytes(payload)
        resources.append((name, hashlib.md5(payload).hexdigest()))
    monkeypatch.setattr(kind, "resources", resources)
    return pixels


class OldType:
    """A numpy type as the published pickles name it, of which newer numpy warns."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (np.dtype, ("u1", 0, 1))


class OldArray:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return (np.ndarray, (self.values.shape, OldType(), self.values.tobytes()))


def place_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write an archive of 12 images; return (12, 3072) pixels."""
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), np.uint8)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files: dict[str, Any] = {
        name: {"data": OldArray(pixels[2 * i : 2 * i + 2]), "labels": [i, 9 - i]}
        for i, name in enumerate(names)
    }
    files["batches.meta"] = {"label_names": list("abcdefghij")}
    payloads = {name: pickle.dumps(entry, protocol=2) for name, entry in files.items()}
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, payload in payloads.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    md5 = {name: hashlib.md5(payload).hexdigest() for name, payload in payloads.items()}
    whole = hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]}
    )
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", whole)
    return pixels


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; yield its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handle = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("source", "kind"), [("mnist", datasets.MNIST), ("fashion-mnist", datasets.FashionMNIST)]
)
def test_mnists_parts_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: Any
) -> None:
    pixels = place_mnist(tmp_path / kind.__name__ / "raw", kind, monkeypatch)
    data = load_data(source, data_root=tmp_path)
    assert torch.equal(data.inputs, torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1))
    assert data.labels.tolist() == [*range(10), 0, 1]
    assert len(data.classes) == 10
    assert data.classes[0] == ("0" if source == "mnist" else "T-shirt/top")
    assert data.open_sample is not None
    assert np.array_equal(np.asarray(data.open_sample(11)), pixels[11])
    for name in MNIST_FILES:  # what is unpacked is enough
        (tmp_path / kind.__name__ / "raw" / name).unlink()
    assert load_data(source, data_root=tmp_path).digest == data.digest


def test_cifars_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = place_cifar(tmp_path / "data", monkeypatch)
    data = load_data("cifar10", data_root=tmp_path / "data")
    assert torch.equal(data.inputs, torch.from_numpy(pixels).view(12, 3, 32, 32))
    assert data.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4]
    assert data.classes == tuple("abcdefghij")


def test_no_pickle_is_opened_that_was_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_cifar(tmp_path / "data", monkeypatch)
    load_data("cifar10", data_root=tmp_path / "data")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    batches = tmp_path / "data/cifar-10-batches-py"
    (batches / "test_batch").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="files of cifar10 are broken"):
        load_data("cifar10", data_root=tmp_path / "data")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("source", "folder", "names"),
    [
        ("mnist", "MNIST/raw", list(MNIST_FILES)),
        ("fashion-mnist", "FashionMNIST/raw", list(MNIST_FILES)),
        ("cifar10", "", ["cifar-10-python.tar.gz"]),
    ],
)
def test_missing_files_are_named_with_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, folder: str, names: list[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DataError, match="place them there, or pass --download") as caught:
        load_data(source)
    assert str(tmp_path / "marwright/data" / folder) in str(caught.value)
    assert all(name in caught.value.expected for name in names)


def test_one_missing_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_mnist(tmp_path / "MNIST/raw", datasets.MNIST, monkeypatch)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"found t10k-labels-idx1-ubyte\.gz absent"):
        load_data("mnist", data_root=tmp_path)


def test_a_download_fetches_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    pixels = place_mnist(tmp_path / "web", datasets.MNIST, monkeypatch)
    with serve(tmp_path / "web") as address:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        data = load_data("mnist", data_root=tmp_path / "data", download=True)
    assert np.array_equal(data.inputs[:, 0].numpy(), pixels)


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_a_failed_download_says_why_and_what_to_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        monkeypatch.setattr(datasets.CIFAR10, "url", address + "cifar.tar.gz")
        with pytest.raises(DataError, match=r"the download failed: .*refused") as caught:
            load_data(source, data_root=tmp_path, download=True)
    assert "place them there" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_with_other_bytes_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST/raw"
    place_mnist(raw, datasets.MNIST, monkeypatch)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(DataError, match=r"broken: .*t10k-images-idx3-ubyte\.gz: .*md5"):
        load_data("mnist", data_root=tmp_path)


@pytest.mark.parametrize("part", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 20, -5])
def test_unpacked_files_that_are_cut_short_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, keep: int
) -> None:
    place_mnist(tmp_path / "MNIST/raw", datasets.MNIST, monkeypatch)
    load_data("mnist", data_root=tmp_path)
    path = tmp_path / "MNIST/raw" / part
    path.write_bytes(path.read_bytes()[: min(keep, 10) if "labels" in part else keep])
    with pytest.raises(DataError, match="files of mnist are broken"):
        load_data("mnist", data_root=tmp_path)
