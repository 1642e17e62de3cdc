"""What digests find, in zip and tar files, and what they leave alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive.checks.findings import Finding, Severity
from marwright.archive.checks.integrity import RULES, verify_digests
from marwright.archive.member import Member
from marwright.archive.reader import Archive
from marwright.archive.writer import Format, write_archive

MANIFEST = json.dumps(
    {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {"modelName": "m", "handler": "h.py", "modelVersion": "1.0"},
        "archiverVersion": "0.12.0",
    }
).encode()


def write(path: Path, format: Format = "zip") -> Path:
    members = {"MAR-INF/MANIFEST.json": MANIFEST, "h.py": b"class H: ...\n", "w.bin": b"w" * 3000}
    listed = [Member(name, content) for name, content in sorted(members.items())]
    return write_archive(path, listed, format=format, top="m").path


def verify(path: Path) -> list[Finding]:
    with Archive.open(path) as archive:
        return verify_digests(archive)


def rewrite(path: Path, change: Callable[[dict[zipfile.ZipInfo, bytes]], object]) -> None:
    """Write a zip file again after a change to its members, comments and checksums included."""
    with zipfile.ZipFile(path) as source:
        comment = source.comment
        members = {info: source.read(info) for info in source.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w") as target:
        target.comment = comment
        for info, content in members.items():
            target.writestr(info, content)


def pick(members: dict[zipfile.ZipInfo, bytes], name: str) -> zipfile.ZipInfo:
    return next(info for info in members if info.filename == name)


@pytest.mark.parametrize("format", ["zip", "tgz"])
def test_an_archive_as_packed_has_no_findings(tmp_path: Path, format: Format) -> None:
    assert verify(write(tmp_path / "m.mar", format)) == []


def test_an_altered_member_is_found_though_all_checksums_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    rewrite(path, lambda members: members.update({pick(members, "h.py"): b"class H: pass\n"}))
    (finding,) = verify(path)
    assert (finding.rule.id, finding.member, finding.severity) == ("I601", "h.py", Severity.ERROR)
    assert "stated" in finding.found


def test_one_flipped_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    path.write_bytes(path.read_bytes().replace(b"wwww", b"wWww", 1))
    (finding,) = verify(path)
    assert (finding.rule.id, finding.member) == ("I601", "w.bin")
    assert "CRC-32" in finding.found


def test_a_removed_member_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    rewrite(path, lambda members: members.pop(pick(members, "w.bin")))
    assert [finding.rule.id for finding in verify(path)] == ["I603"]


def test_a_member_that_was_added_is_found_with_and_without_a_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.py", b"import os\n")
    assert [(finding.rule.id, finding.member) for finding in verify(path)] == [("I602", "extra.py")]

    def add_digest(members: dict[zipfile.ZipInfo, bytes]) -> None:
        info = pick(members, "extra.py")
        info.comment = b"sha256:17c8f4dc3b3a0b8c5c1b1f8a3c3a0d6a1a37b4b3f8a94ffb1ad45e8ae4e7bb7a"

    rewrite(path, add_digest)
    assert [finding.rule.id for finding in verify(path)] == ["I601", "I603"]


def test_a_second_member_of_the_same_name_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")

    def double(members: dict[zipfile.ZipInfo, bytes]) -> None:
        twin = zipfile.ZipInfo("h.py")
        twin.comment = pick(members, "h.py").comment
        members[twin] = members[pick(members, "h.py")]

    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(path, double)
    assert [(finding.rule.id, finding.member) for finding in verify(path)] == [("I603", "h.py")]


def test_an_archive_without_digests_gets_a_note(tmp_path: Path) -> None:
    path = tmp_path / "m.mar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", MANIFEST)
        archive.writestr("h.py", b"class H: ...\n")
    (finding,) = verify(path)
    assert (finding.rule.id, finding.severity) == ("I604", Severity.NOTE)


def test_a_folder_entry_needs_no_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("assets/", b"")
    assert verify(path) == []


def test_an_altered_member_of_a_tar_file_is_found(tmp_path: Path) -> None:
    source = write(tmp_path / "m.tar.gz", "tgz")
    with tarfile.open(source) as before, tarfile.open(tmp_path / "n.tar.gz", "w:gz") as after:
        after.pax_headers = dict(before.pax_headers)
        for info in before:
            content = before.extractfile(info)
            assert content is not None
            data = content.read().replace(b"class", b"klass")
            after.addfile(info, io.BytesIO(data))
    (finding,) = verify(tmp_path / "n.tar.gz")
    assert (finding.rule.id, finding.member) == ("I601", "h.py")


def test_memory_stays_flat_whatever_the_size(tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    with weights.open("wb") as stream:
        stream.truncate(300 << 20)
    members = [
        Member("MAR-INF/MANIFEST.json", MANIFEST),
        Member("h.py", b""),
        Member("w.bin", weights),
    ]
    path = write_archive(tmp_path / "m.mar", members).path
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from marwright.archive.reader import Archive\n"
        "from marwright.archive.checks.integrity import verify_digests\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Archive.open(Path(sys.argv[1])) as archive: assert not verify_digests(archive)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert int(answer.stdout) < 30_000  # KiB


def test_every_rule_has_an_id_of_its_own_and_a_remedy() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(rule.id.startswith("I6") and rule.remedy for rule in RULES)
