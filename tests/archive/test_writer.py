from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from marwright.archive.checks.structure import scan_structure
from marwright.archive.container import open_container
from marwright.archive.digests import root_digest
from marwright.archive.member import Member, Stretch
from marwright.archive.writer import Format, Written, write_archive
from marwright.errors import ArchiveError, StorageError

CONTENT = {"a.txt": b"a" * 3, "deep/er/b.bin": os.urandom(3 << 20), "ümläut.txt": b"", "z.py": b"z"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def write(folder: Path, *, format: Format = "zip", name: str = "m.mar") -> Written:
    members = [Member(name, content) for name, content in sorted(CONTENT.items())]
    return write_archive(folder / name, members, format=format, top="m")


@pytest.mark.parametrize("format", ["zip", "tgz", "folder"])
def test_what_is_written_is_read_again(tmp_path: Path, format: Format) -> None:
    written = write(tmp_path, format=format, name="m.tar.gz" if format == "tgz" else "m")
    with open_container(written.path) as container:
        assert container.format == format
        assert {
            entry.name: container.read(entry, limit=1 << 30) for entry in container.entries
        } == CONTENT


@pytest.mark.parametrize("format", ["zip", "tgz"])
def test_every_member_states_its_digest_and_the_archive_one_over_all(
    tmp_path: Path, format: Format
) -> None:
    written = write(tmp_path, format=format)
    with open_container(written.path) as container:
        assert {entry.name: entry.sha256 for entry in container.entries} == DIGESTS
        assert container.root_digest == written.root_digest == root_digest(DIGESTS)


def test_other_readers_agree(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path).path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
    tgz = write(tmp_path, format="tgz", name="m.tar.gz").path
    listed = subprocess.run(["tar", "-tzf", tgz], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines()[0] == "m/a.txt"


def test_a_gzip_of_stored_blocks_is_whole(tmp_path: Path) -> None:
    tgz = write(tmp_path, format="tgz", name="m.tar.gz").path
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(tgz.read_bytes()))) as tar:
        assert {info.name for info in tar} == {f"m/{name}" for name in CONTENT}
        assert {(info.mtime, info.mode, info.uid, info.uname) for info in tar} == {
            (315_532_800, 0o644, 0, "")
        }


@pytest.mark.parametrize("format", ["zip", "tgz"])
def test_two_writes_are_identical(tmp_path: Path, format: Format) -> None:
    first, second = (write(tmp_path / name, format=format).path for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_a_stretch_of_another_archive_is_copied_as_it_stands(tmp_path: Path) -> None:
    source = tmp_path / "deflated.zip"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.txt", b"x" * 100_000)
        info = archive.infolist()[0]
    stretch = Stretch(
        path=source,
        offset=info.header_offset + 30 + len("x.txt"),
        compressed_bytes=info.compress_size,
        size_bytes=info.file_size,
        crc32=info.CRC,
        method=8,
        sha256=None,
    )
    members = [Member("a.txt", b"a"), Member("y.txt", stretch), Member("z.txt", b"z")]
    target = write_archive(tmp_path / "new.mar", members).path
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert archive.read("y.txt") == b"x" * 100_000
        assert archive.getinfo("y.txt").compress_size == info.compress_size
    with open_container(target) as container:
        assert container.entries[1].sha256 == hashlib.sha256(b"x" * 100_000).hexdigest()


def test_a_stretch_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    stretch = Stretch(tmp_path / "short", 0, 10, 10, 0, 0, "0" * 64)
    with pytest.raises(ArchiveError, match="is not whole: expected 10 bytes"):
        write_archive(tmp_path / "m.mar", [Member("x", stretch)])
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_a_file_that_grows_while_it_is_packed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size) + (b"more" if self.tell() == 3 else b"")

    monkeypatch.setattr(Member, "open", lambda member: Growing(b"abc"))
    with pytest.raises(ArchiveError, match="changed while it was packed: expected 3 bytes"):
        write_archive(tmp_path / "m.mar", [Member("x", tmp_path / "x")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_than_four_gibibytes_are_written_as_zip64(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as stream:
        stream.truncate((1 << 32) + 5)
    program = (
        "import sys, zipfile\n"
        "with zipfile.ZipFile(sys.argv[1]) as archive:\n"
        "    print([info.file_size for info in archive.infolist()], archive.testzip())\n"
    )
    members = [Member("big", sparse), Member("small", b"s")]
    target = write_archive(tmp_path / "m.mar", members).path
    told = subprocess.run(
        [sys.executable, "-c", program, target], capture_output=True, text=True, check=True
    )
    assert told.stdout == "[4294967301, 1] None\n"
    target.unlink()


def test_many_members_are_listed_as_zip64(tmp_path: Path) -> None:
    members = [Member(f"{number:05}", b"") for number in range(65_536)]
    with zipfile.ZipFile(write_archive(tmp_path / "m.mar", members).path) as archive:
        assert len(archive.namelist()) == 65_536


def test_a_folder_with_an_archive_is_replaced_and_another_stays(tmp_path: Path) -> None:
    target = tmp_path / "m"
    (target / "MAR-INF").mkdir(parents=True)
    (target / "MAR-INF/MANIFEST.json").write_text("{}")
    write(tmp_path, format="folder", name="m")
    assert not (target / "MAR-INF").exists()
    with pytest.raises(StorageError, match="something else than an archive"):
        write(tmp_path, format="folder", name="m")
    assert (target / "a.txt").exists()


def test_a_target_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file")


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../up", "a/../../b", "a//b", "./a", "C:\\x", "C:/x", "a\x00b", "a\nb"],
)
def test_a_name_that_could_leave_the_folder_is_no_member(name: str) -> None:
    with pytest.raises(ArchiveError, match="cannot be a name inside an archive"):
        Member(name, b"")


def test_large_members_begin_aligned(tmp_path: Path) -> None:
    members = [Member("a", b"a"), Member("big", bytes(16 << 20)), Member("c", b"c")]
    target = write_archive(tmp_path / "m.mar", members).path
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        info = archive.getinfo("big")
    header = target.read_bytes()[info.header_offset : info.header_offset + 30]
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
    assert (info.header_offset + 30 + name_bytes + extra_bytes) % (1 << 15) == 0
    assert not scan_structure(target)
