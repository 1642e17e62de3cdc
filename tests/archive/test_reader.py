from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.archive import Archive, Packed
from marwright.archive.manifest import MANIFEST_NAME
from marwright.errors import ArchiveError, StorageError

MODEL = {"modelName": "m", "modelVersion": "1.0", "handler": "h.py", "serializedFile": "model.pt"}


def write_archive(
    path: Path, *, members: tuple[str, ...] = ("h.py", "model.pt"), **model: Any
) -> Path:
    """Write a small deflated archive, as torch-model-archiver does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST_NAME, json.dumps({"model": {**MODEL, **model}}))
        for name in members:
            archive.writestr(name, name)
    return path


def write_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_packed_archive_says_what_was_packed(packed: Packed) -> None:
    archive = Archive.open(packed.path)
    assert (archive.manifest.name, archive.manifest.version) == ("cnn", "1.0")
    assert archive.manifest.handler == "image_classifier.py"
    assert set(archive.names) == {
        MANIFEST_NAME,
        "classes.json",
        "image_classifier.py",
        "image_input.py",
        "model-config.yaml",
        "model.pt",
    }


def test_a_handler_of_torchserve_itself_is_no_member(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.mar", handler="image_classifier")
    assert Archive.open(path).manifest.handler == "image_classifier"


def test_a_missing_archive_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no archive .*absent\.mar; pack one: marwright pack"):
        Archive.open(tmp_path / "absent.mar")
    with pytest.raises(ArchiveError, match="no archive"):
        Archive.open(tmp_path)


def test_a_name_too_long_for_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"):
        Archive.open(tmp_path / ("a" * 300))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.mar"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="expected a zip file"):
        Archive.open(path)


@pytest.mark.parametrize("cut", [1, 30, 1_000, 100_000])
def test_a_truncated_archive_is_refused(packed: Packed, cut: int) -> None:
    packed.path.write_bytes(packed.path.read_bytes()[:-cut])
    with pytest.raises(ArchiveError, match="is no model archive"):
        Archive.open(packed.path)


def test_a_zip_without_a_manifest_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.mar", readme=b"")
    with pytest.raises(ArchiveError, match=r"a member MAR-INF/MANIFEST\.json, found 1 members"):
        Archive.open(path)


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.mar", **{MANIFEST_NAME: b"no JSON"})
    with pytest.raises(ArchiveError, match=r"m\.mar has a broken manifest"):
        Archive.open(path)


def test_a_manifest_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST_NAME, b" " * (1 << 21))
    with pytest.raises(ArchiveError, match="more than 1,048,576 bytes"):
        Archive.open(path)


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ({"serializedFile": "other.pt"}, "other.pt"),
        ({"modelFile": "net.py"}, "net.py"),
        ({"configFile": "model-config.yaml"}, "model-config.yaml"),
        ({"requirementsFile": "requirements.txt"}, "requirements.txt"),
        ({"handler": "other.py"}, "other.py"),
        ({"handler": "other.py:run"}, "other.py"),
        ({"handler": "other.py", "modelFile": "net.py"}, "other.py, net.py"),
    ],
)
def test_a_manifest_that_names_absent_members_is_refused(
    tmp_path: Path, model: dict[str, Any], absent: str
) -> None:
    path = write_archive(tmp_path / "m.mar", **model)
    with pytest.raises(ArchiveError, match="is not whole") as caught:
        Archive.open(path)
    assert caught.value.found == f"no {absent}"


def test_a_name_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.mar", members=("h.py", "model.pt", "ä"))
    path.write_bytes(path.read_bytes().replace("ä".encode(), b"\xff\xff"))
    with pytest.raises(ArchiveError, match="is no model archive"):
        Archive.open(path)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.mar")
    content = bytearray(path.read_bytes())
    start = 30 + len(MANIFEST_NAME)  # after the local header; the manifest is the first member
    content[start : start + 4] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="is no model archive"):
        Archive.open(path)


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_byte_never_raises_a_foreign_error(
    tmp_path: Path, position: float, value: int
) -> None:
    path = write_archive(tmp_path / "m.mar")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(content)
    with contextlib.suppress(ArchiveError):
        Archive.open(path)
