from __future__ import annotations

import inspect
import io
import os
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from marwright.archive import container, limits, streams, zip_layout
from marwright.archive.container import Entry, open_container, printable
from marwright.errors import ArchiveError, StorageError

MEMBERS = {"MAR-INF/MANIFEST.json": b"{}", "h.py": b"def handle(): ...", "sub/model.pt": b"weights"}


def write_zip(folder: Path, *, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "m.mar", "w", method) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    return folder / "m.mar"


def write_deflated(folder: Path) -> Path:
    return write_zip(folder, method=zipfile.ZIP_DEFLATED)


def write_tar(folder: Path, *extra: tarfile.TarInfo, **options: Any) -> Path:
    with tarfile.open(folder / "m.tar.gz", "w:gz", **options) as tar:
        for name, content in MEMBERS.items():
            info = tarfile.TarInfo(f"m/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return folder / "m.tar.gz"


def write_folder(folder: Path) -> Path:
    for name, content in MEMBERS.items():
        (folder / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "m" / name).write_bytes(content)
    return folder / "m"


WRITERS = [write_zip, write_deflated, write_tar, write_folder]


def find(entries: tuple[Entry, ...], name: str) -> Entry:
    return next(entry for entry in entries if entry.name == name)


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_lists_the_same_members(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    with open_container(write(tmp_path)) as opened:
        found = {entry.name: opened.read(entry, limit=100) for entry in opened.entries}
        assert found == MEMBERS
        assert {entry.kind for entry in opened.entries} == {"file"}
        assert {entry.name: entry.size_bytes for entry in opened.entries} == {
            name: len(content) for name, content in MEMBERS.items()
        }


@pytest.mark.parametrize("write", WRITERS)
def test_a_stream_that_seeks_has_the_members_content(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    with open_container(write(tmp_path)) as opened:
        for entry in opened.entries:
            with opened.open_seekable(entry) as stream:
                assert stream.seek(-2, os.SEEK_END) == entry.size_bytes - 2
                assert stream.read() == MEMBERS[entry.name][-2:]
                stream.seek(0)
                assert stream.read() == MEMBERS[entry.name]


def test_a_stored_member_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # whoever wants one fails
    with open_container(write_zip(tmp_path)) as opened:
        entry = find(opened.entries, "h.py")
        assert opened.is_in_place(entry)
        with opened.open_seekable(entry) as stream:
            assert stream.read() == MEMBERS["h.py"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_member_longer_than_wanted_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    with open_container(write(tmp_path)) as opened:
        entry = find(opened.entries, "h.py")
        with pytest.raises(
            ArchiveError, match=r"h\.py of .* is too long: expected at most 5 bytes"
        ):
            opened.read(entry, limit=5)


def test_a_tar_files_first_folder_is_left_out_as_torchserve_does(tmp_path: Path) -> None:
    names = ["./a", "m/b", "c", "/etc/d", "../e", "m/f/g"]
    with open_container(write_tar(tmp_path, *map(tarfile.TarInfo, names))) as opened:
        found = [entry.name for entry in opened.entries][len(MEMBERS) :]
    assert found == ["a", "b", "c", "/etc/d", "../e", "f/g"]


def test_nothing_behind_the_first_gzip_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path, other = write_tar(tmp_path), write_tar(tmp_path / "other")
    length = len(other.read_bytes())
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with open_container(path) as opened:
        assert len(opened.entries) == len(MEMBERS)
        assert opened.trailing_bytes == length


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_torchserve_does_not_read_is_not_read(
    tmp_path: Path, method: int
) -> None:
    with (
        open_container(write_zip(tmp_path, method=method)) as opened,
        pytest.raises(ArchiveError, match=f"compression method {method}"),
    ):
        opened.read(opened.entries[0], limit=100)


@pytest.mark.parametrize("write", [write_zip, write_deflated, write_tar])
def test_any_truncated_archive_is_an_error_of_ours(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    content = write(tmp_path).read_bytes()
    path = tmp_path / "cut.mar"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArchiveError):
            open_container(path)


def test_an_archive_cut_in_its_comment_is_an_error_of_ours(tmp_path: Path) -> None:
    path = write_zip(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"marwright sha256:" + b"0" * 64
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="the last 9 bytes are missing"):
        open_container(path)


def test_a_damaged_member_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_zip(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"weights", b"Weights"))
    with (
        open_container(path) as opened,
        pytest.raises(ArchiveError, match=r"sub/model\.pt of .* cannot be read"),
    ):
        opened.read(find(opened.entries, "sub/model.pt"), limit=100)


def test_a_list_of_members_that_fills_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path)
    monkeypatch.setattr(zip_layout, "MAX_MEMBERS", 2)
    with pytest.raises(ArchiveError, match=r"at most 2 members, found 3 members"):
        open_container(path)
    monkeypatch.setattr(zip_layout, "MAX_MEMBERS", 3)
    open_container(path).close()
    monkeypatch.setattr(zip_layout, "MAX_DIRECTORY_BYTES", 100)
    with pytest.raises(ArchiveError, match="lists more than a model needs"):
        open_container(path)


def test_a_count_of_members_that_lies_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path)
    content = bytearray(path.read_bytes())
    content[-14:-10] = struct.pack("<HH", 1, 1)
    path.write_bytes(content)
    monkeypatch.setattr(zip_layout, "MAX_MEMBERS", 2)
    with pytest.raises(ArchiveError, match="found 3 members"):
        open_container(path)


def test_a_zip64_record_that_states_a_billion_members_is_refused(tmp_path: Path) -> None:
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 10**9, 10**9, 46, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 46, 0, 0)
    path = tmp_path / "m.mar"
    path.write_bytes(bytes(46) + record + locator + end)
    with pytest.raises(ArchiveError, match="found 1,000,000,000 members"):
        open_container(path)


def test_a_zip64_record_elsewhere_than_before_its_locator_is_refused(tmp_path: Path) -> None:
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0, 0, 0, 0, 0)
    path = tmp_path / "m.mar"
    path.write_bytes(bytes(100) + locator + end)
    with pytest.raises(ArchiveError, match="zip64 record"):
        open_container(path)


def test_more_members_of_a_tar_file_than_a_model_needs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "MAX_MEMBERS", 2)
    with pytest.raises(ArchiveError, match="lists more than a model needs"):
        open_container(write_tar(tmp_path))


def test_extended_headers_that_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tarfile.TarInfo("m/x")
    info.pax_headers = {"comment": "x" * 5_000}
    path = write_tar(tmp_path, info, format=tarfile.PAX_FORMAT)
    monkeypatch.setattr(container, "MAX_HEADERS_BYTES", 4_000)
    with pytest.raises(ArchiveError, match="bytes of extended headers"):
        open_container(path)
    monkeypatch.undo()
    monkeypatch.setattr(streams, "MAX_HEADER_BYTES", 4_000)
    with pytest.raises(ArchiveError, match="a header of 5,"):
        open_container(path)


def test_a_tar_file_that_unpacks_to_more_than_a_model_needs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FREE_BYTES", 0)
    monkeypatch.setattr(limits, "MAX_RATIO", 2)
    with pytest.raises(ArchiveError, match="unpacks to more than a model needs"):
        open_container(write_tar(tmp_path))


def test_a_sparse_member_is_no_plain_file(tmp_path: Path) -> None:
    info = tarfile.TarInfo("m/sparse")
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000000000"}
    with open_container(write_tar(tmp_path, info, format=tarfile.PAX_FORMAT)) as opened:
        assert opened.entries[-1].kind == "other"


def test_a_link_in_a_folder_is_listed_and_not_followed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "link").symlink_to(tmp_path)
    with open_container(folder) as opened:
        entry = find(opened.entries, "link")
        assert entry.kind == "link"
        assert not any(entry.name.startswith("link/") for entry in opened.entries)
        with pytest.raises(ArchiveError, match="expected a file, found a link"):
            opened.read(entry, limit=10)


def test_folders_deeper_than_python_recurses_are_listed(tmp_path: Path) -> None:
    name = "d/" * 300
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "h.py").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        opened = open_container(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    with opened:
        assert [entry.name for entry in opened.entries] == [f"{name}h.py"]


def test_a_folder_without_rights_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(StorageError, match="Permission denied"):
        open_container(folder)


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.mar")
    with pytest.raises(ArchiveError, match="there is no archive"):
        open_container(tmp_path / "m.mar")


def test_a_name_that_would_rule_a_terminal_is_shown_harmless() -> None:
    assert printable("sub/model.pt") == "sub/model.pt"
    assert printable("é ü 模型") == "é ü 模型"
    assert printable("a\x1b[2J\nb\ud800\u202e") == "a\\x1b[2J\\nb\\ud800\\u202e"


def test_a_temporary_file_that_cannot_be_written_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_full() -> IO[bytes]:
        return Path("/dev/full").open("r+b", 0)

    monkeypatch.setattr(tempfile, "TemporaryFile", open_full)
    with (
        open_container(write_deflated(tmp_path)) as opened,
        pytest.raises(StorageError, match="cannot write a temporary file"),
        opened.open_seekable(opened.entries[0]),
    ):
        pass


def test_a_member_behind_its_header_is_found_in_place(tmp_path: Path) -> None:
    with write_zip(tmp_path).open("rb") as stream:
        assert zip_layout.data_offset(stream, 0) == 30 + len("MAR-INF/MANIFEST.json")
        with pytest.raises(zipfile.BadZipFile, match="no header"):
            zip_layout.data_offset(stream, 1)


def test_sizes_of_a_zip64_header_are_read(tmp_path: Path) -> None:
    size, packed = 5 << 32, 6 << 32
    extra = struct.pack("<HHI", 7, 4, 0) + struct.pack("<HHQQ", 1, 16, size, packed)
    sizes = struct.pack("<III", zlib.crc32(b""), 0xFFFFFFFF, 0xFFFFFFFF)
    header = b"PK\x03\x04\x2d\x00" + bytes(8) + sizes + struct.pack("<HH", 1, len(extra))
    found = zip_layout.read_header(io.BytesIO(header + b"x" + extra), 0)
    assert (found.size_bytes, found.compressed_bytes) == (size, packed)
    assert found.data_offset == 31 + len(extra)
