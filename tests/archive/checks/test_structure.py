from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Packed, limits
from marwright.archive.checks.findings import Finding, Severity
from marwright.archive.checks.structure import MOST_FINDINGS, scan_structure
from marwright.archive.limits import FREE_BYTES
from marwright.errors import ArchiveError

CONTENT = b"weights " * 100


@dataclass
class Raw:
    """A member of a zip file written byte by byte, so that it may lie.

    `local` and `listed` override what its own header and the list at the end say of it.
    """

    name: bytes = b"model.pt"
    content: bytes = CONTENT
    method: int = 0
    flags: int = 0
    mode: int = 0o100644
    local: dict[str, Any] = field(default_factory=dict)
    listed: dict[str, Any] | None = field(default_factory=dict)
    """None leaves it out of the list."""
    before: bytes = b""
    behind: bytes = b""

    def state(self, packed: bytes, overrides: dict[str, Any]) -> tuple[bytes, bytes]:
        """Return the bytes that both headers share, and the name."""
        facts: dict[str, Any] = {
            "name": self.name,
            "flags": self.flags,
            "method": self.method,
            "crc": zlib.crc32(self.content),
            "packed": len(packed),
            "size": len(self.content),
            **overrides,
        }
        fixed = ("flags", "method")
        sizes = (facts["crc"], facts["packed"], facts["size"], len(facts["name"]), 0)
        return struct.pack("<HHHHIIIHH", *(facts[key] for key in fixed), 0, 33, *sizes), facts[
            "name"
        ]


def deflate(content: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(content) + engine.flush()


def write_raw(path: Path, *members: Raw, comment: bytes = b"", behind: bytes = b"") -> Path:
    """Write a zip file of such members."""
    body, listing = b"", b""
    for member in members:
        body += member.before
        packed = deflate(member.content) if member.method == 8 else member.content
        header, name = member.state(packed, member.local)
        if member.listed is not None:
            offset = member.listed.pop("offset", len(body))
            shared, listed_name = member.state(packed, member.listed)
            tail = struct.pack("<HHHII", 0, 0, 0, member.mode << 16, offset)
            listing += b"PK\x01\x02\x14\x03\x14\x00" + shared + tail + listed_name
        body += b"PK\x03\x04\x14\x00" + header + name + packed + member.behind
    count = sum(member.listed is not None for member in members)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(listing), len(body), len(comment))
    path.write_bytes(body + listing + b"PK\x05\x06" + end + comment + behind)
    return path


def write_tar(
    path: Path, *members: tarfile.TarInfo | tuple[str, bytes], behind: bytes = b""
) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    with path.open("ab") as stream:
        stream.write(behind)
    return path


def make_special(name: str, type: bytes, **facts: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = type
    for key, value in facts.items():
        setattr(info, key, value)
    return info


def ids(findings: list[Finding]) -> set[str]:
    return {finding.rule.id for finding in findings}


def worst_of(findings: list[Finding]) -> Severity | None:
    return max((finding.severity for finding in findings), default=None)


def test_what_marwright_packs_has_no_finding(packed: Packed) -> None:
    assert scan_structure(packed.path) == []


@pytest.mark.parametrize("format", ["default", "zip-store", "tgz", "no-archive"])
def test_what_torch_model_archiver_packs_has_no_finding(tmp_path: Path, format: str) -> None:
    (tmp_path / "h.py").write_text("def handle(data, context): return data")
    (tmp_path / "ä.bin").write_bytes(os.urandom(3000))
    command = "--model-name m --version 1.0 --handler h.py --extra-files ä.bin --archive-format"
    archiver = [sys.executable, "-m", "model_archiver.model_packaging"]
    subprocess.run([*archiver, *command.split(), format], cwd=tmp_path, check=True)
    path = next(path for path in tmp_path.iterdir() if path.name in ("m", "m.mar", "m.tar.gz"))
    assert scan_structure(path) == []


@pytest.mark.parametrize("method", [0, 8])
def test_raw_members_that_do_not_lie_have_no_finding(tmp_path: Path, method: int) -> None:
    path = write_raw(tmp_path / "m.mar", Raw(b"h.py", method=method), Raw(method=method))
    assert scan_structure(path) == []
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(
    ("name", "id"),
    [
        (b"../x", "S101"),
        (b"a/../../x", "S101"),
        (b"/etc/passwd", "S101"),
        (b"C:/x", "S101"),
        (b"C:x", "S101"),
        (b"..\\x", "S101"),
        (b"\\\\host\\x", "S101"),
        (b"a\\b", "S102"),
        (b"a//b", "S102"),
        (b"./a", "S102"),
        (b"a\nb", "S102"),
        (b"a\x00b", "S102"),
        (b"a\x1b[2J", "S102"),
        (b"", "S102"),
        (b"a" * 256, "S102"),
    ],
)
def test_a_name_that_leads_elsewhere_is_found(tmp_path: Path, name: bytes, id: str) -> None:
    findings = scan_structure(write_raw(tmp_path / "m.mar", Raw(name)))
    assert ids(findings) == {id}
    assert all(finding.member.isprintable() for finding in findings)


@pytest.mark.parametrize(
    ("mode", "id"),
    [
        (0o120777, "S103"),
        (0o020666, "S104"),
        (0o010644, "S104"),
        (0o140755, "S104"),
        (0o040755, "S120"),
    ],
)
def test_a_member_of_a_special_kind_is_found(tmp_path: Path, mode: int, id: str) -> None:
    assert ids(scan_structure(write_raw(tmp_path / "m.mar", Raw(mode=mode)))) == {id}


def test_two_members_of_one_name_are_found(tmp_path: Path) -> None:
    findings = scan_structure(write_raw(tmp_path / "m.mar", Raw(), Raw(content=b"other")))
    assert [(finding.rule.id, finding.member) for finding in findings] == [("S105", "model.pt")]


@pytest.mark.parametrize(
    ("one", "other"), [("a.py", "A.py"), ("é", "e\u0301"), ("straße", "STRASSE")]
)
def test_names_that_are_one_on_some_systems_are_a_warning(
    tmp_path: Path, one: str, other: str
) -> None:
    members = [Raw(name.encode(), flags=0x800) for name in (one, other)]
    findings = scan_structure(write_raw(tmp_path / "m.mar", *members))
    assert [(f.rule.id, f.severity) for f in findings] == [("S106", Severity.WARNING)]


@pytest.mark.parametrize("below", [b"a/b", b"a/b/c", b"a/"])
def test_a_file_where_a_folder_must_be_is_found(tmp_path: Path, below: bytes) -> None:
    path = write_raw(tmp_path / "m.mar", Raw(b"a"), Raw(below, content=b""))
    assert ids(scan_structure(path)) == {"S107"}


def test_an_encrypted_member_is_found(tmp_path: Path) -> None:
    assert ids(scan_structure(write_raw(tmp_path / "m.mar", Raw(flags=1)))) == {"S108"}


@pytest.mark.parametrize("method", [1, 9, 12, 14, 93, 99])
def test_a_compression_that_java_cannot_read_is_found(tmp_path: Path, method: int) -> None:
    assert ids(scan_structure(write_raw(tmp_path / "m.mar", Raw(method=method)))) == {"S109"}


def test_a_bomb_is_found_without_unpacking_it(tmp_path: Path) -> None:
    lie = {"size": FREE_BYTES * 3}
    path = write_raw(tmp_path / "m.mar", Raw(method=8, local=lie, listed=dict(lie)))
    assert ids(scan_structure(path)) == {"S110"}


def test_zeros_are_a_warning(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.mar", Raw(content=bytes(70 << 20), method=8))
    findings = scan_structure(path)
    assert [(f.rule.id, f.severity) for f in findings] == [("S111", Severity.WARNING)]


def test_a_member_that_holds_more_than_it_states_is_found(tmp_path: Path) -> None:
    lie = {"size": 10}
    path = write_raw(tmp_path / "m.mar", Raw(method=8, local=lie, listed=dict(lie)))
    assert ids(scan_structure(path)) == {"S112"}


def test_members_that_share_their_bytes_are_found(tmp_path: Path) -> None:
    first, second = Raw(b"a", method=8), Raw(b"a", method=8, listed={"offset": 0})
    findings = scan_structure(write_raw(tmp_path / "m.mar", first, second))
    assert {"S105", "S113"} <= ids(findings)


def test_a_member_inside_another_is_found(tmp_path: Path) -> None:
    inner = b"PK\x03\x04\x14\x00" + struct.pack("<HHHHIIIHH", 0, 0, 0, 33, 0, 0, 0, 4, 0) + b"x.py"
    outer = Raw(b"a", content=inner)
    hidden = Raw(b"x.py", content=b"", listed={"offset": 31})
    assert "S113" in ids(scan_structure(write_raw(tmp_path / "m.mar", outer, hidden)))


@pytest.mark.parametrize("declared", [5000, 0xFFFFFFFE])
def test_a_member_that_states_more_than_the_file_has_is_found(
    tmp_path: Path, declared: int
) -> None:
    lie = {"size": declared, "packed": declared}
    path = write_raw(tmp_path / "m.mar", Raw(local=lie, listed=dict(lie)))
    assert "S113" in ids(scan_structure(path))


def test_a_member_that_only_torchserve_would_see_is_found(tmp_path: Path) -> None:
    hidden = Raw(b"handler.py", content=b"import os", listed=None)
    path = write_raw(tmp_path / "m.mar", Raw(), hidden, Raw(b"z"))
    findings = scan_structure(path)
    assert ids(findings) == {"S114"}
    assert worst_of(findings) is Severity.DANGER


@pytest.mark.parametrize("place", ["first", "middle", "last", "behind"])
def test_bytes_of_no_member_are_found(tmp_path: Path, place: str) -> None:
    members = [Raw(b"a"), Raw(b"b", before=b"junk" if place == "middle" else b"")]
    members[1].behind = b"junk" if place == "last" else b""
    path = write_raw(tmp_path / "m.mar", *members, behind=b"junk" if place == "behind" else b"")
    if place == "first":
        path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert ids(scan_structure(path)) == {"S114"}


def test_a_comment_is_no_stray(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.mar", Raw(), comment=b"marwright sha256:" + b"0" * 64)
    assert scan_structure(path) == []


def test_a_second_list_of_members_in_the_comment_is_found(tmp_path: Path) -> None:
    outer = write_raw(tmp_path / "a.mar", Raw(b"seen-by-some.py"))
    inner = write_raw(tmp_path / "b.mar", Raw(b"seen-by-others.py")).read_bytes()
    path = write_raw(tmp_path / "m.mar", Raw(b"seen-by-some.py"), comment=inner)
    assert outer.exists()
    assert "S114" in ids(scan_structure(path))


def test_bytes_behind_compressed_content_are_found(tmp_path: Path) -> None:
    packed = deflate(CONTENT) + b"PK\x03\x04 hidden"
    facts = {"method": 8, "crc": zlib.crc32(CONTENT), "size": len(CONTENT)}
    path = write_raw(tmp_path / "m.mar", Raw(content=packed, local=facts, listed=dict(facts)))
    assert ids(scan_structure(path)) == {"S114"}


def test_a_member_behind_compressed_content_which_only_torchserve_would_see_is_found(
    tmp_path: Path,
) -> None:
    facts = {"method": 8, "crc": zlib.crc32(CONTENT), "size": len(CONTENT)}
    packed = deflate(CONTENT)
    sizes = struct.pack("<III", facts["crc"], len(packed), len(CONTENT))
    hidden = write_raw(tmp_path / "h.mar", Raw(b"handler.py", listed=None)).read_bytes()[:-22]
    member = Raw(
        content=packed + b"PK\x07\x08" + sizes + hidden,
        flags=8,
        local={"method": 8, "crc": 0, "size": 0, "packed": 0},
        listed=facts,
    )
    assert "S114" in ids(scan_structure(write_raw(tmp_path / "m.mar", member, Raw(b"z"))))


def test_a_folder_with_content_is_found(tmp_path: Path) -> None:
    assert ids(scan_structure(write_raw(tmp_path / "m.mar", Raw(b"a/")))) == {"S114"}


@pytest.mark.parametrize(
    "lie",
    [
        {"name": b"handler.pyc"},
        {"name": b"other.pt"},
        {"method": 8},
        {"flags": 0x8},
        {"flags": 0x800},
        {"crc": 1},
        {"size": 1},
        {"packed": 1},
        {"size": 1, "packed": 1},
    ],
)
def test_a_header_that_differs_from_the_list_is_found(tmp_path: Path, lie: dict[str, Any]) -> None:
    findings = scan_structure(write_raw(tmp_path / "m.mar", Raw(local=lie), Raw(b"z")))
    assert "S115" in ids(findings)


def test_a_list_that_points_at_no_header_is_a_finding(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.mar", Raw(), Raw(b"z", listed={"offset": 5}))
    assert "S115" in ids(scan_structure(path))


def test_a_stored_member_with_its_size_behind_it_is_found(tmp_path: Path) -> None:
    behind = b"PK\x07\x08" + struct.pack("<III", zlib.crc32(CONTENT), len(CONTENT), len(CONTENT))
    nothing = {"crc": 0, "size": 0, "packed": 0}
    path = write_raw(tmp_path / "m.mar", Raw(flags=8, local=nothing, behind=behind))
    assert ids(scan_structure(path)) == {"S116"}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("width", ["I", "Q"])
def test_a_deflated_member_with_its_size_behind_it_is_sound(
    tmp_path: Path, marked: bool, width: str
) -> None:
    sizes = struct.pack(f"<I2{width}", zlib.crc32(CONTENT), len(deflate(CONTENT)), len(CONTENT))
    nothing = {"crc": 0, "size": 0, "packed": 0}
    behind = (b"PK\x07\x08" if marked else b"") + sizes
    member = Raw(method=8, flags=8, local=nothing, behind=behind)
    assert scan_structure(write_raw(tmp_path / "m.mar", member, Raw(b"z"))) == []


def test_other_bytes_where_the_size_should_be_are_found(tmp_path: Path) -> None:
    nothing = {"crc": 0, "size": 0, "packed": 0}
    member = Raw(method=8, flags=8, local=nothing, behind=b"PK\x07\x08" + bytes(12))
    assert {"S114", "S115"} == ids(scan_structure(write_raw(tmp_path / "m.mar", member, Raw(b"z"))))


def test_a_zip_file_written_to_a_pipe_is_sound(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.content += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.pt", CONTENT)
    (tmp_path / "m.mar").write_bytes(pipe.content)
    assert scan_structure(tmp_path / "m.mar") == []


@pytest.mark.parametrize("cut", [1, 20])
def test_damaged_compressed_bytes_are_found(tmp_path: Path, cut: int) -> None:
    packed = b"\xff" * cut + deflate(CONTENT)[cut:]
    facts = {"method": 8, "crc": zlib.crc32(CONTENT), "size": len(CONTENT)}
    path = write_raw(tmp_path / "m.mar", Raw(content=packed, local=facts, listed=dict(facts)))
    assert ids(scan_structure(path)) == {"S117"}


def test_zip64_is_sound(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        for index in range(2):
            with archive.open(f"model-{index}.pt", "w", force_zip64=True) as stream:
                stream.write(CONTENT)
    assert scan_structure(tmp_path / "m.mar") == []


@pytest.mark.slow
def test_more_members_than_a_short_zip_file_can_count_are_sound(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.mar", "w") as archive:
        for index in range(0x10001):
            archive.writestr(f"{index}", b"")
    assert scan_structure(tmp_path / "m.mar") == []


def test_a_name_in_another_encoding_is_told(tmp_path: Path) -> None:
    findings = scan_structure(write_raw(tmp_path / "m.mar", Raw("é.py".encode())))
    assert [(f.rule.id, f.severity, f.found) for f in findings] == [
        ("S119", Severity.WARNING, "é.py to TorchServe")
    ]
    findings = scan_structure(write_raw(tmp_path / "m.mar", Raw("é.py".encode("cp437"))))
    assert [(f.rule.id, f.severity) for f in findings] == [("S119", Severity.ERROR)]


def test_an_ending_of_another_format_is_found(tmp_path: Path) -> None:
    assert ids(scan_structure(write_raw(tmp_path / "m.tar.gz", Raw()))) == {"S118"}
    assert ids(scan_structure(write_tar(tmp_path / "m.mar", ("m/h.py", b"")))) == {"S118"}


def test_a_hundred_findings_of_one_kind_are_cut_short(tmp_path: Path) -> None:
    members = [Raw(f"../{index}".encode()) for index in range(100)]
    assert len(scan_structure(write_raw(tmp_path / "m.mar", *members))) == MOST_FINDINGS


@pytest.mark.parametrize(
    ("member", "id"),
    [
        (("../x", b""), "S101"),
        (("/etc/x", b""), "S101"),
        (("m/../../x", b""), "S101"),
        (("m/a\nb", b""), "S102"),
        (make_special("m/l", tarfile.SYMTYPE, linkname="/etc/passwd"), "S103"),
        (make_special("m/l", tarfile.LNKTYPE, linkname="m/h.py"), "S103"),
        (make_special("m/d", tarfile.CHRTYPE), "S104"),
        (make_special("m/d", tarfile.BLKTYPE), "S104"),
        (make_special("m/d", tarfile.FIFOTYPE), "S104"),
        (("m/h.py", b""), "S105"),
        (("other/h.py", b""), "S105"),
        (("m/H.py", b""), "S106"),
        (("m/h.py/x", b""), "S107"),
        (make_special("m/d", tarfile.DIRTYPE, size=512), "S114"),
        (make_special("m/s", tarfile.CONTTYPE), "S120"),
        (make_special("m/s", b"Z"), "S120"),
    ],
)
def test_a_tar_file_is_looked_at_as_torchserve_unpacks_it(
    tmp_path: Path, member: Any, id: str
) -> None:
    path = write_tar(tmp_path / "m.tar.gz", ("m/h.py", b"x"), member)
    assert id in ids(scan_structure(path))


def test_a_second_gzip_file_behind_the_first_is_found(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tar.gz", ("m/h.py", b"x"), behind=gzip.compress(b"more"))
    assert ids(scan_structure(path)) == {"S114"}


def test_a_bomb_of_gzip_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "m.tar.gz", ("m/zeros", bytes(80 << 20)))
    monkeypatch.setattr(limits, "FREE_BYTES", 1 << 20)
    with pytest.raises(ArchiveError, match="unpacks to more than a model needs") as caught:
        scan_structure(path)
    assert int(caught.value.found.split()[0].replace(",", "")) < 11e6  # not the 80 MB of it


def test_a_folder_is_looked_at_without_following_links(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/h.py").touch()
    assert scan_structure(folder) == []
    (folder / "sub/link").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    (folder / "a\nb").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(folder / "socket"))
    findings = scan_structure(folder)
    assert sorted((finding.rule.id, finding.member) for finding in findings) == [
        ("S102", "a\\nb"),
        ("S103", "sub/link"),
        ("S104", "pipe"),
        ("S104", "socket"),
    ]


def test_an_archive_that_is_absent_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="there is no archive"):
        scan_structure(tmp_path / "m.mar")
