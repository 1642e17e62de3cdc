from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marwright.archive import Archive, Packed, Run, pack_run
from marwright.archive.run import REFERENCE_NAME
from marwright.errors import ArchiveError, MarwrightError, StorageError
from marwright.monitor.reference import MOST_BYTES, Reference

ROWS = 60


def make_arrays(**changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arrays = {
        "format": np.array(1),
        "features": random.normal(size=(ROWS, 2)).astype(np.float32),
        "feature_names": np.array(["brightness", "red"]),
        "confidence": random.random(ROWS).astype(np.float32),
        "prediction": random.choice(["3", "seven"], ROWS),
        "embedding": random.normal(size=(ROWS - 10, 4)).astype(np.float32),
        "accuracy": np.array(0.97),
    }
    return {key: value for key, value in {**arrays, **changes}.items() if value is not None}


def pack(arrays: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def write_members(**members: bytes) -> bytes:
    """Return a zip of a good reference's arrays, some of them replaced by bytes of any kind."""
    good = {}
    with zipfile.ZipFile(io.BytesIO(pack(make_arrays()))) as file:
        good = {name: file.read(name) for name in file.namelist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**good, **{f"{key}.npy": members[key] for key in members}}.items():
            file.writestr(name, content)
    return stream.getvalue()


def write_header(kind: str, shape: str, values: bytes = b"") -> bytes:
    """Return an array of numpy's format 1.0 that says of itself what it is told to."""
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


def test_a_reference_is_read_as_it_was_written() -> None:
    arrays = make_arrays()
    found = Reference.parse(pack(arrays), source="it")
    assert np.array_equal(found.features, arrays["features"])
    assert found.feature_names == ("brightness", "red")
    assert np.array_equal(found.confidence, arrays["confidence"])
    assert found.prediction.tolist() == arrays["prediction"].tolist()
    assert np.array_equal(found.embedding, arrays["embedding"])
    assert found.accuracy == 0.97
    assert found.rows == ROWS


def test_arrays_in_another_order_and_precision_are_the_same_numbers() -> None:
    features = np.asfortranarray(np.arange(2.0 * ROWS).reshape(ROWS, 2)).astype(">f8", order="K")
    names = np.array(["ä", "雪"]).astype(">U5")
    found = Reference.parse(pack(make_arrays(features=features, feature_names=names)), source="it")
    assert np.array_equal(found.features, features)
    assert found.feature_names == ("ä", "雪")


@pytest.mark.parametrize(
    "left", ["features", "confidence", "prediction", "embedding", "accuracy"], ids=str
)
def test_a_model_without_something_has_none_of_it(left: str) -> None:
    also = "feature_names" if left == "features" else left
    found = Reference.parse(pack(make_arrays(**{left: None, also: None})), source="it")
    value = getattr(found, left)
    assert value is None or value.size == 0


BAD = {
    "no format": pack(make_arrays(format=None)),
    "another format": pack(make_arrays(format=np.array(2))),
    "a format of many": pack(make_arrays(format=np.array([1, 1]))),
    "another array": pack(make_arrays(surprise=np.zeros(3))),
    "no zip": b"\x93NUMPY" + bytes(100),
    "nothing": b"",
    "half a zip": pack(make_arrays())[:-200],
    "features of one dimension": pack(make_arrays(features=np.zeros(ROWS, np.float32))),
    "features as text": pack(make_arrays(features=np.full((ROWS, 2), "1"))),
    "complex features": pack(make_arrays(features=np.zeros((ROWS, 2), complex))),
    "a name too few": pack(make_arrays(feature_names=np.array(["red"]))),
    "two names alike": pack(make_arrays(feature_names=np.array(["red", "red"]))),
    "a name with a line in it": pack(make_arrays(feature_names=np.array(["red", "a\nb"]))),
    "a name of nothing": pack(make_arrays(feature_names=np.array(["red", ""]))),
    "names as numbers": pack(make_arrays(feature_names=np.array([1.0, 2.0]))),
    "names as bytes": pack(make_arrays(feature_names=np.array([b"a", b"b"]))),
    "rows too few": pack(make_arrays(confidence=np.zeros(ROWS - 1, np.float32))),
    "labels too few": pack(make_arrays(prediction=np.array(["a"]))),
    "a confidence of 2": pack(make_arrays(confidence=np.full(ROWS, 2, np.float32))),
    "an accuracy of nan": pack(make_arrays(accuracy=np.array(np.nan))),
    "an accuracy of 7": pack(make_arrays(accuracy=np.array(7.0))),
    "an endless label": pack(make_arrays(prediction=np.array(["a" * 5000] * ROWS))),
    "2,000 features": pack(
        make_arrays(
            features=np.zeros((ROWS, 2000), np.float32),
            feature_names=np.array([str(number) for number in range(2000)]),
        )
    ),
    "too many points": pack(make_arrays(embedding=np.zeros((1001, 2), np.float32))),
    "too wide points": pack(make_arrays(embedding=np.zeros((2, 20_000), np.float32))),
    "too many rows": pack(
        {"format": np.array(1), "confidence": np.zeros(10_001, np.float32)},
    ),
    "pickled objects": write_members(features=write_header("'|O'", "(60, 2)", b"\x80\x04N.")),
    "a header of code": write_members(features=write_header("__import__('os')", "(60, 2)")),
    "a header that is cut": write_members(features=b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f4'"),
    "a header of brackets": write_members(features=write_header("[" * 5000, "(60, 2)")),
    "a record": write_members(features=write_header("[('a', '<f4')]", "(60, 2)")),
    "bytes missing": write_members(features=write_header("'<f4'", "(60, 2)", bytes(12))),
    "bytes too many": write_members(features=write_header("'<f4'", "(60, 2)", bytes(960))),
    "a negative shape": write_members(features=write_header("'<f4'", "(-1, -2)", bytes(8))),
    "a shape beyond memory": write_members(features=write_header("'<f4'", "(2**62, 2)", b"")),
    "a shape of 10**18": write_members(features=write_header("'<f4'", f"({10**18}, 2)", b"")),
    "texts without letters": write_members(prediction=write_header("'<U0'", f"({10**15},)", b"")),
    "numbers for letters": write_members(prediction=write_header("'<U1'", "(60,)", b"\xff" * 240)),
    "half a letter": write_members(
        prediction=write_header("'<U1'", "(60,)", b"\x00\xd8\x00\x00" * 60)
    ),
    "a later format of numpy": write_members(features=b"\x93NUMPY\x09\x00" + bytes(100)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_reference_is_refused_and_named(name: str) -> None:
    with pytest.raises(ArchiveError, match="it is no reference") as caught:
        Reference.parse(BAD[name], source="it")
    assert caught.value.expected
    assert caught.value.found


@pytest.mark.parametrize("packing", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_packings_that_numpy_has_not_are_refused_whole_or_damaged(packing: int) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as file:
        file.writestr("features.npy", np.random.default_rng(0).bytes(1000))
    whole = stream.getvalue()
    damaged = bytearray(whole)
    start = 30 + len("features.npy") + 9  # behind what says how it is packed
    damaged[start : start + 20] = b"\xff" * 20
    for data in (whole, bytes(damaged)):
        with pytest.raises(ArchiveError, match="it is no reference"):
            Reference.parse(data, source="it")


def test_a_damaged_byte_is_refused_or_harmless() -> None:
    good = pack(make_arrays())
    random = np.random.default_rng(1)
    refused = 0
    for place in random.choice(len(good), 300, replace=False):
        data = bytearray(good)
        data[place] ^= 1 << int(random.integers(8))
        try:
            Reference.parse(bytes(data), source="it")
        except MarwrightError:
            refused += 1
    assert refused > 200


def test_a_bomb_of_zeros_takes_no_memory(tmp_path: Path) -> None:
    """A small file whose arrays would be 400 MiB is refused in less than 250."""
    path = tmp_path / "reference.npz"
    content = write_header("'<f4'", f"({50 << 20}, 2)") + bytes(400 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("features.npy", content)
    del content
    assert path.stat().st_size < MOST_BYTES
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from marwright.monitor.reference import Reference\n"
        "from marwright.errors import ArchiveError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: Reference.read(Path(sys.argv[1]))\n"
        "except ArchiveError as exc: print(exc)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    said, kib = done.stdout.strip().splitlines()
    assert "unpacked" in said
    assert int(kib) < 250 << 10


def test_a_file_beside_the_archive_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(pack(make_arrays()))
    found = Reference.read(path)
    assert found is not None
    assert found.rows == ROWS
    with pytest.raises(StorageError):
        Reference.read(tmp_path / "absent.npz")
    path.write_bytes(bytes(MOST_BYTES + 1))
    with pytest.raises(ArchiveError, match="at most"):
        Reference.read(path)


def test_an_archive_without_one_has_none(packed: Packed, tmp_path: Path) -> None:
    with Archive.open(packed.path) as archive:
        others = tuple(name for name in archive.names if name != REFERENCE_NAME)
        folder = archive.extract(tmp_path / "unpacked")
    (folder / REFERENCE_NAME).unlink(missing_ok=True)
    assert others
    assert Reference.read(folder) is None


def test_an_archive_that_has_one_gives_it(packed: Packed, tmp_path: Path) -> None:
    with Archive.open(packed.path) as archive:
        folder = archive.extract(tmp_path / "unpacked")
    (folder / REFERENCE_NAME).write_bytes(pack(make_arrays()))
    found = Reference.read(folder)
    assert found is not None
    assert found.feature_names == ("brightness", "red")


def test_a_run_is_packed_with_the_reference_of_its_test_part(run: Run, tmp_path: Path) -> None:
    packed = pack_run(run, out=tmp_path / "store", preflight=None)
    found = Reference.read(packed.path)
    assert found is not None
    assert found.rows == len(found.features) >= 300
    assert "brightness" in found.feature_names
    assert set(found.prediction.tolist()) <= set(run.classes)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
