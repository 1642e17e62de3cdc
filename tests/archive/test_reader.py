from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.archive import Archive, Packed, limits
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
    assert set(archive.names) >= {
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
    with pytest.raises(ArchiveError, match=r"a member MAR-INF/MANIFEST\.json, found 0 members"):
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
    with pytest.raises(ArchiveError, match="too long: expected at most 1,048,576 bytes"):
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
    with pytest.raises(ArchiveError, match=r"MANIFEST\.json of .* cannot be read"):
        Archive.open(path)


@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_byte_never_raises_a_foreign_error(
    tmp_path: Path, position: float, value: int
) -> None:
    path = write_archive(tmp_path / "m.mar")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(content)
    with contextlib.suppress(ArchiveError):
        Archive.open(path)


def list_tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_an_archive_is_unpacked_into_a_new_or_empty_folder(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Archive.open(packed.path) as archive:
        for folder in (tmp_path / "new/folder", tmp_path / "empty"):
            assert archive.extract(folder) == folder
            found = list_tree(folder)
            assert set(found) == set(archive.names)
            assert found["model.pt"] == archive.read("model.pt")


def test_a_folder_is_replaced_only_when_forced_and_only_an_unpacked_archive(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with Archive.open(write_archive(tmp_path / "m.mar")) as archive:
        archive.extract(tmp_path / "out")
        (tmp_path / "out/h.py").write_text("changed", encoding="utf-8")
        with pytest.raises(StorageError, match=r"exists; .* --force"):
            archive.extract(tmp_path / "out")
        archive.extract(tmp_path / "out", force=True)
        with pytest.raises(StorageError, match="something else than an unpacked archive"):
            archive.extract(mine, force=True)
    assert list_tree(tmp_path / "out")["h.py"] == b"h.py"
    assert list_tree(mine) == {"thesis.txt": b""}


def test_some_members_join_what_is_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.pt").write_text("mine", encoding="utf-8")
    with Archive.open(write_archive(tmp_path / "m.mar")) as archive:
        archive.extract(tmp_path / "out", members=("h.py",))
        with pytest.raises(StorageError, match=r"model\.pt exists"):
            archive.extract(tmp_path / "out", members=(MANIFEST_NAME, "model.pt"))
        assert list_tree(tmp_path / "out") == {"h.py": b"h.py", "model.pt": b"mine"}
        archive.extract(tmp_path / "out", members=(MANIFEST_NAME, "model.pt"), force=True)
        with pytest.raises(ArchiveError, match=r"no member absent; marwright inspect"):
            archive.extract(tmp_path / "out", members=("absent",))
    assert list_tree(tmp_path / "out")["model.pt"] == b"model.pt"


def test_a_link_in_the_folder_leads_no_member_outside(tmp_path: Path) -> None:
    for name in ("out", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    members = ("h.py", "model.pt", "sub/x")
    with (
        Archive.open(write_archive(tmp_path / "m.mar", members=members)) as archive,
        pytest.raises(StorageError, match=r"sub/x lies outside"),
    ):
        archive.extract(tmp_path / "out", members=("h.py", "sub/x"), force=True)
    assert not list_tree(tmp_path / "elsewhere")
    assert not list_tree(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "..", "C:/x", "a\\b", "a\x1b[2J", "h.py", "h.py/x"]
)
def test_a_name_that_leads_astray_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    with (
        pytest.warns(UserWarning, match="Duplicate") if name == "h.py" else contextlib.nullcontext()
    ):
        path = write_archive(tmp_path / "m.mar", members=("h.py", "model.pt", name))
    with Archive.open(path) as archive, pytest.raises((ArchiveError, StorageError)):
        archive.extract(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.mar"]


def test_links_and_damaged_members_leave_nothing_behind(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.mar")
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with Archive.open(path) as opened, pytest.raises(ArchiveError, match="'link': a link"):
        opened.extract(tmp_path / "out")
    path = write_zip(
        tmp_path / "m.mar",
        **{MANIFEST_NAME: json.dumps({"model": MODEL}).encode()},
        **{"h.py": b"h", "model.pt": b"weights"},
    )
    path.write_bytes(path.read_bytes().replace(b"weights", b"Weights", 1))
    with Archive.open(path) as opened, pytest.raises(ArchiveError, match=r"model\.pt of .* cannot"):
        opened.extract(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.mar"]


def test_an_archive_with_two_manifests_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.mar")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(MANIFEST_NAME, json.dumps({"model": {**MODEL, "handler": "other.py"}}))
    with pytest.raises(ArchiveError, match="found 2 of this name"):
        Archive.open(path)


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_archive(tmp_path / "m.mar")
    monkeypatch.setattr(limits, "FREE_BYTES", 0)
    monkeypatch.setattr(limits, "MAX_RATIO", 0.1)
    with Archive.open(path) as archive, pytest.raises(ArchiveError, match="more than a model"):
        archive.extract(tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["m.mar"]


def test_a_full_disk_is_no_damaged_archive(tmp_path: Path) -> None:
    with (
        Archive.open(write_archive(tmp_path / "m.mar")) as archive,
        Path("/dev/full").open("wb", 0) as stream,
        pytest.raises(StorageError, match=r"cannot write a copy of h\.py: found No space"),
    ):
        archive.copy(archive.find("h.py"), stream)


def test_a_file_that_grew_is_copied_only_as_far_as_it_was_listed(tmp_path: Path) -> None:
    with Archive.open(write_archive(tmp_path / "m.mar")) as archive:
        archive.extract(tmp_path / "m")
    with Archive.open(tmp_path / "m") as folder:
        (tmp_path / "m/h.py").write_bytes(b"h.py and more")
        target = io.BytesIO()
        folder.copy(folder.find("h.py"), target)
    assert target.getvalue() == b"h.py"
