"""Whatever bytes an archive consists of, reading it ends in an answer or in one error of ours.

500 cases by default. More of them:

    MARWRIGHT_FUZZ=10000 .venv/bin/python -m pytest tests/archive/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import run
from sys import executable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.archive import Archive
from marwright.archive.checks import scan
from marwright.archive.checks.findings import Severity, refuse, worst
from marwright.archive.manifest import MANIFEST_NAME
from marwright.errors import MarwrightError

CASES = int(os.environ.get("MARWRIGHT_FUZZ", "500"))
CANARY = b"still here"


def write_zip(members: dict[str, bytes], method: int, *, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return buffer.getvalue()


def write_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"m/{name}")
            info.size = len(content)
            info.pax_headers = {"MARWRIGHT.sha256": "0" * 64}
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


MANIFEST = {
    "modelName": "m",
    "modelVersion": "1.0",
    "handler": "h.py",
    "serializedFile": "model.pt",
}
# As torch.save writes it; torch itself would take longer to import than all cases take.
STATE = OrderedDict(weight=[1.0] * 20, names=["a", b"b", (1, 2)])
TORCH = write_zip({"x/data.pkl": pickle.dumps(STATE, 2), "x/data/0": bytes(64)}, zipfile.ZIP_STORED)
MEMBERS = {
    MANIFEST_NAME: json.dumps({"runtime": "python", "model": MANIFEST}).encode(),
    "h.py": b"def handle(data, context):\n    return data\n",
    "model.pt": TORCH,
    "sub/labels.pkl": pickle.dumps(OrderedDict(a=1)),
    "sub/empty": b"",
}
ZIPS = [
    write_zip(MEMBERS, zipfile.ZIP_STORED, comment=b"marwright sha256:" + b"0" * 64),
    write_zip(MEMBERS, zipfile.ZIP_DEFLATED),
]
TAR = write_tar(MEMBERS)

SIGNATURES = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"]
NUMBERS = [0, 1, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]
NAMES = [
    b"../x",
    b"/abs",
    b"..\\a",
    b"h.py",
    b"a/..",
    b"\x00\x00\x00\x00",
    b"H.PY",
    b"\xff\xfe\xfd\xfc",
]

Mutation = Callable[[bytearray], None]


@st.composite
def flips(draw: st.DrawFn) -> Mutation:
    where, value = draw(st.floats(0, 1)), draw(st.integers(1, 255))

    def flip(content: bytearray) -> None:
        if content:
            content[int(where * (len(content) - 1))] ^= value

    return flip


@st.composite
def cuts(draw: st.DrawFn) -> Mutation:
    start, length = draw(st.floats(0, 1)), draw(st.integers(1, 200))
    to_end = draw(st.booleans())

    def cut(content: bytearray) -> None:
        at = int(start * len(content))
        del content[at : len(content) if to_end else at + length]

    return cut


@st.composite
def splices(draw: st.DrawFn) -> Mutation:
    source = draw(st.sampled_from([*ZIPS, TAR, TORCH]))
    origin, target, length = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.integers(1, 500))
    replace = draw(st.booleans())

    def splice(content: bytearray) -> None:
        start, at = int(origin * len(source)), int(target * len(content))
        content[at : at + (length if replace else 0)] = source[start : start + length]

    return splice


@st.composite
def fields(draw: st.DrawFn) -> Mutation:
    signature, which = draw(st.sampled_from(SIGNATURES)), draw(st.integers(0, 9))
    offset, width = draw(st.integers(4, 44)), draw(st.sampled_from([1, 2, 4]))
    value = draw(st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1))

    def overwrite(content: bytearray) -> None:
        places = [at for at in range(len(content) - 4) if content.startswith(signature, at)]
        if places:
            at = places[which % len(places)] + offset
            content[at : at + width] = value.to_bytes(4, "little")[:width]

    return overwrite


@st.composite
def renames(draw: st.DrawFn) -> Mutation:
    old, new = (
        draw(st.sampled_from([b"h.py", b"MAR-", b"mode", b"sub/"])),
        draw(st.sampled_from(NAMES)),
    )
    count = draw(st.sampled_from([1, 2, -1]))

    def rename(content: bytearray) -> None:
        content[:] = content.replace(old, new, count)

    return rename


@st.composite
def doubles(draw: st.DrawFn) -> Mutation:
    signature, which = draw(st.sampled_from(SIGNATURES)), draw(st.integers(0, 9))

    def double(content: bytearray) -> None:
        places = [at for at in range(len(content) - 4) if content.startswith(signature, at)]
        if len(places) > 1:
            at = which % (len(places) - 1)
            entry = content[places[at] : places[at + 1]]
            content[places[at] : places[at]] = entry

    return double


MUTATIONS = st.lists(
    flips() | cuts() | splices() | fields() | renames() | doubles(), min_size=1, max_size=5
)


LIES = st.sampled_from(["name", "flags", "method", "crc", "packed", "size"])


HIDDEN = write_zip({"hidden.py": b"import os"}, zipfile.ZIP_STORED)[: 30 + 9 + 9]
"""A member's header and content."""


@st.composite
def members_that_may_lie(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what `assemble` writes of one member: mostly the truth."""
    rarely = st.integers(0, 5).map(lambda number: number == 0)
    value = st.sampled_from([0, 1, 8, 100, 0x800, 0xFFFFFFFF])
    return {
        "name": draw(st.sampled_from(["h.py", "model.pt", "a", "b", "sub/c", "d/", "A", "é"])),
        "content": draw(st.binary(max_size=40)) * draw(st.sampled_from([1, 50])),
        "deflated": draw(st.booleans()),
        "sized_behind": draw(st.booleans()),
        "listed": not draw(rarely),
        "local": {draw(LIES): draw(value)} if draw(rarely) else {},
        "list": {draw(LIES): draw(value)} if draw(rarely) else {},
        "before": draw(st.binary(max_size=9)) if draw(rarely) else b"",
        "inside": draw(st.sampled_from([b"", b"", b"junk", HIDDEN])),
    }


def assemble(members: list[dict[str, Any]]) -> bytes:
    """Write a zip file whose headers and list say what they are told to."""
    body, listing, count = b"", b"", 0
    for member in members:
        engine = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = member["content"]
        if member["deflated"]:
            packed = engine.compress(packed) + engine.flush()
            if member["inside"] == HIDDEN:  # as Java expects it there: behind the size
                real = zlib.crc32(member["content"]), len(packed), len(member["content"])
                packed += b"PK\7\x08" + struct.pack("<III", *real)
            packed += member["inside"]
        sizes = zlib.crc32(member["content"]), len(packed), len(member["content"])
        name = member["name"].encode()
        flags = (0 if name.isascii() else 0x800) | (8 if member["sized_behind"] else 0)
        truth = {"flags": flags, "method": 8 * member["deflated"], "name": name}
        truth |= dict(zip(("crc", "packed", "size"), sizes, strict=True))
        unsized = {"crc": 0, "packed": 0, "size": 0} if member["sized_behind"] else {}
        body += member["before"]
        if member["listed"]:
            where = struct.pack("<HHHII", 0, 0, 0, 0, len(body))
            listing += b"PK\1\2\x14\0\x14\0" + state({**truth, **member["list"]}, where)
            count += 1
        body += b"PK\3\4\x14\0" + state({**truth, **unsized, **member["local"]}) + packed
        if member["sized_behind"]:
            body += b"PK\7\x08" + struct.pack("<III", *sizes)
    ends = count, count, len(listing), len(body)
    return body + listing + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, *ends, 0)


def state(facts: dict[str, Any], where: bytes = b"") -> bytes:
    """Return what both headers of a member have in common, and the name."""
    name = facts["name"] if isinstance(facts["name"], bytes) else b"x"
    numbers = facts["flags"] & 0xFFFF, facts["method"] & 0xFFFF, 0, 33
    sizes = facts["crc"], facts["packed"], facts["size"], len(name), 0
    return struct.pack("<HHHHIIIHH", *numbers, *sizes) + where + name


WHOLE = {"deflated": False, "sized_behind": False, "listed": True, "local": {}, "list": {}}
WHOLE |= {"before": b"", "inside": b""}
FIRST = [{**WHOLE, "name": name, "content": MEMBERS[name]} for name in (MANIFEST_NAME, "h.py")]


def seal(tar: bytearray) -> bytes:
    """Return the gzip file of a tar file whose headers have right checksums again."""
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            total = sum(tar[at : at + 512]) - sum(tar[at + 148 : at + 156]) + 8 * 32
            tar[at + 148 : at + 156] = b"%06o\0 " % (total % 0o1000000)
    return gzip.compress(bytes(tar), 1)


@pytest.fixture(scope="module")
def yard() -> Iterator[Path]:
    """A folder with a canary in it, and room for the archive and what it unpacks to."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "canary").write_bytes(CANARY)
        yield Path(name)


def exercise(path: Path, yard: Path) -> None:
    """Do with an archive all that is done with those of strangers."""
    shutil.rmtree(yard / "unpacked", ignore_errors=True)  # of a case that failed
    grave = None
    with contextlib.suppress(MarwrightError):
        grave = (worst(scan(path)) or Severity.NOTE) >= Severity.ERROR
    unpacked = None
    with contextlib.suppress(MarwrightError), Archive.open(path) as archive:
        unpacked = archive.extract(yard / "unpacked")
    assert sorted(file.name for file in yard.iterdir()) == sorted(
        {"canary", path.name} | ({"unpacked"} if unpacked else set())
    )
    assert (yard / "canary").read_bytes() == CANARY
    if unpacked:
        files = [file for file in unpacked.rglob("*") if not file.is_dir()]
        assert not any(file.is_symlink() for file in files)
        found = {file.relative_to(unpacked).as_posix(): file.read_bytes() for file in files}
        if grave is False and path.name == "m.mar":
            with contextlib.suppress(ValueError):
                assert found == read_as_java(path.read_bytes())
        shutil.rmtree(unpacked)


def read_as_java(content: bytes) -> dict[str, bytes]:
    """Read a zip file as java.util.zip.ZipInputStream does, header after header.

    Raises:
        ValueError: where Java throws; TorchServe then registers nothing.
    """
    found, at = {}, 0
    while content.startswith(b"PK\x03\x04", at) and at + 30 <= len(content):
        flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = struct.unpack(
            "<HHHHIIIHH", content[at + 6 : at + 30]
        )
        name = content[at + 30 : at + 30 + name_bytes].decode()
        at += 30 + name_bytes + extra_bytes
        if flags & 1 or method not in (0, 8) or (flags & 8 and method == 0):
            raise ValueError("Java throws")
        if method == 0:
            text, at = content[at : at + size], at + size
        else:
            inflate = zlib.decompressobj(-15)
            try:
                text = inflate.decompress(content[at:])
            except zlib.error as exc:
                raise ValueError("Java throws") from exc
            used = len(content) - at - len(inflate.unused_data)
            at += used
            if flags & 8:
                at += 4 if content.startswith(b"PK\x07\x08", at) else 0
                crc, packed, size = struct.unpack("<III", content[at : at + 12].ljust(12))
                at += 12
            if not inflate.eof or used != packed:
                raise ValueError("Java throws")
        if len(text) != size or zlib.crc32(text) != crc:
            raise ValueError("Java throws")
        if not name.endswith("/"):
            found[name] = text
    return found


@settings(max_examples=CASES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(base=st.sampled_from(ZIPS), mutations=MUTATIONS)
def test_a_changed_zip_file_ends_in_an_answer_or_an_error_of_ours(
    yard: Path, base: bytes, mutations: list[Mutation]
) -> None:
    content = bytearray(base)
    for mutate in mutations:
        mutate(content)
    path = yard / "m.mar"
    path.write_bytes(content)
    exercise(path, yard)
    path.unlink()


@settings(max_examples=CASES // 4, deadline=None, suppress_health_check=list(HealthCheck))
@given(members=st.lists(members_that_may_lie(), min_size=1, max_size=4), first=st.booleans())
def test_a_zip_file_that_lies_is_found_out_or_the_same_to_java(
    yard: Path, members: list[dict[str, Any]], first: bool
) -> None:
    path = yard / "m.mar"
    path.write_bytes(assemble([*FIRST, *members] if first else [*members, *FIRST]))
    exercise(path, yard)
    path.unlink()


@settings(max_examples=CASES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS, inside=st.booleans())
def test_a_changed_tar_file_ends_in_an_answer_or_an_error_of_ours(
    yard: Path, mutations: list[Mutation], inside: bool
) -> None:
    content = bytearray(TAR if inside else gzip.compress(TAR))
    for mutate in mutations:
        mutate(content)
    path = yard / "m.tar.gz"
    path.write_bytes(seal(content) if inside else bytes(content))
    exercise(path, yard)
    path.unlink()


@settings(max_examples=CASES // 10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.text(min_size=1, max_size=30), max_size=5),
    kinds=st.lists(st.sampled_from(["file", "link", "pipe", "folder"]), min_size=5, max_size=5),
    mutations=MUTATIONS,
)
def test_any_folder_ends_in_an_answer_or_an_error_of_ours(
    yard: Path, names: list[str], kinds: list[str], mutations: list[Mutation]
) -> None:
    folder = yard / "m"
    for name, content in MEMBERS.items():
        changed = bytearray(content)
        for mutate in mutations if name != MANIFEST_NAME else ():
            mutate(changed)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(changed)
    for name, kind in zip(names, kinds, strict=False):
        with contextlib.suppress(OSError, ValueError):
            file = folder / name.replace("/", "_")
            if kind == "file":
                file.touch()
            elif kind == "folder":
                file.mkdir()
            elif kind == "pipe":
                os.mkfifo(file)
            else:
                file.symlink_to(yard / "canary")
    exercise(folder, yard)
    shutil.rmtree(folder)


@settings(max_examples=CASES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=MUTATIONS, stored=st.booleans())
def test_a_changed_torch_file_is_looked_into_without_a_foreign_error(
    yard: Path, mutations: list[Mutation], stored: bool
) -> None:
    changed = bytearray(TORCH)
    for mutate in mutations:
        mutate(changed)
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    path = yard / "m.mar"
    path.write_bytes(write_zip({**MEMBERS, "model.pt": bytes(changed)}, method))
    exercise(path, yard)
    path.unlink()


def test_an_archive_cut_anywhere_is_an_error_of_ours(tmp_path: Path) -> None:
    for name, content in (("m.mar", ZIPS[0]), ("m.mar", ZIPS[1]), ("m.tar.gz", gzip.compress(TAR))):
        for length in range(0, len(content), max(1, len(content) * 3 // CASES)):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(MarwrightError):
                refuse(scan(tmp_path / name), name)


# Each is made without the memory it would take to read.
GREEDY = {
    "a member of 4 GB that is not there": "zip_of(stated(0xFFFFFFF0))",
    "4 GB of zeros": "zip_of(stated(4 << 30, packed=zeros(4 << 30)))",
    "4 GB of zeros that state 10 bytes": "zip_of(stated(10, packed=zeros(4 << 30)))",
    "a manifest of 4 GB": "zip_of(stated(4 << 30, packed=zeros(4 << 30), name=MANIFEST_NAME))",
    "a manifest of 99 MB": "zip_of(stated(99 << 20, packed=zeros(99 << 20), name=MANIFEST_NAME))",
    "200 members of one name": "zip_of(*[stated(1 << 20, packed=zeros(1 << 20))] * 200)",
    "LZMA with 4 GB of memory": "zip_of(stated(9, packed=LZMA, method=14, name=MANIFEST_NAME))",
    "a manifest 100,000 deep": "zip_of(whole(b'[' * 100_000, name=MANIFEST_NAME))",
    "a manifest of 1,000,000 digits": "zip_of(whole(b'1' * 1_000_000, name=MANIFEST_NAME))",
    "a zip64 file of a billion members": "ZIP64",
    "a list of members of 4 GB": "bytes(100) + END",
    "4 GB of zeros in a tar file": "gzip_of(deflated(header(4 << 30)), zeros(4 << 30))",
    "an extended header of 2 GB": "gzip_of(deflated(header(2 << 30, type=b'x')), zeros(2 << 30))",
    "a long name of 2 GB": "gzip_of(deflated(header(2 << 30, type=b'L')), zeros(2 << 30))",
    "20,000 extended headers": "gzip_of(deflated(header(0, type=b'x') * 20_000))",
    "a sparse member of 8 TB": "gzip_of(deflated(header(0o77777777777 << 3, type=b'S')))",
    "a pickle with bytes of 8 EB": "zip_of(whole(b'\\x80\\x04\\x8e' + b'\\xff' * 7 + b'\\x7f'))",
    "a pickle with 100 million values": "zip_of(stated(100 << 20, packed=zeros(100 << 20, b'N')))",
    "a pickle with 100 million marks": "zip_of(whole(b'\\x80\\x02' + b'(' * 2_000_000))",
    "4 GB in a torch file": "zip_of(whole(zip_of(stated(4 << 30, packed=zeros(4 << 30)))))",
    "zip files in zip files": "zip_of(whole(nested(20), name='a.zip'))",
}

PROGRAM = """
import gzip, io, resource, struct, sys, tarfile, zlib
from pathlib import Path
from marwright.archive import Archive, limits
from marwright.archive.checks import scan
from marwright.archive.checks.findings import refuse
from marwright.archive.manifest import MANIFEST_NAME
from marwright.errors import MarwrightError

END = b"PK\\5\\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 0xFFFFFFF0, 0, 0)
COUNTS = 10**9, 10**9, 46 * 10**9, 0
ZIP64 = b"PK\\6\\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *COUNTS)
ZIP64 += b"PK\\6\\7" + struct.pack("<IQI", 0, 0, 1)
ZIP64 += b"PK\\5\\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
LZMA = bytes((9, 20, 5, 0, 0x5D)) + b"\\xff" * 4 + bytes(100)

def zeros(size, byte=b"\\0"):
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = engine.compress(byte * (1 << 20)) + engine.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 20) + engine.flush(zlib.Z_FINISH)

def stated(size, packed=b"", method=None, name="model.pt"):
    method = method if method is not None else 8 if packed else 0
    return name, method, 0, size, size if method == 0 else len(packed), packed

def whole(content, name="model.pt"):
    return name, 0, zlib.crc32(content), len(content), len(content), content

def zip_of(*members):
    body, listing = bytearray(), bytearray()
    for name, method, crc, size, packed_bytes, packed in members:
        shown = [min(number, 0xFFFFFFFF) for number in (crc, packed_bytes, size)]
        extra = struct.pack("<HHQ", 1, 8, size) if size > 0xFFFFFFFE else b""
        facts = struct.pack("<HHHHHIIIHH", 45, 0, method, 0, 33, *shown, len(name), len(extra))
        listing += b"PK\\1\\2\\x2d\\x03" + facts + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        listing += name.encode() + extra
        body += b"PK\\3\\4" + facts + name.encode() + extra + packed
    counts = len(members), len(members), len(listing), len(body)
    return bytes(body + listing) + b"PK\\5\\6" + struct.pack("<HHHHIIH", 0, 0, *counts, 0)

def nested(depth):
    content = b"x"
    for _ in range(depth):
        content = zip_of(whole(content, name="a.pt"))
    return content

def header(size, type=tarfile.REGTYPE):
    info = tarfile.TarInfo("m/model.pt")
    info.size, info.type = size, type
    return info.tobuf(tarfile.GNU_FORMAT)

def deflated(content):
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(content) + engine.flush(zlib.Z_FULL_FLUSH)

def gzip_of(*parts):
    return gzip.compress(b"")[:10] + b"".join(parts)

limits.FREE_BYTES = 64 << 20  # the rest would only take time
case, folder = sys.argv[1], Path(sys.argv[2])
content = eval(case)
path = folder / ("m.tar.gz" if content.startswith(b"\\x1f\\x8b") else "m.mar")
path.write_bytes(content)
del content
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = []
for act in (
    lambda: refuse(scan(path), path),
    lambda: Archive.open(path).extract(folder / "unpacked"),
):
    try:
        act()
    except MarwrightError as exc:
        outcomes.append(str(exc))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(outcomes))
print(*outcomes, sep="\\n")
"""


@pytest.mark.parametrize("case", GREEDY)
def test_an_archive_that_asks_for_memory_gets_none(tmp_path: Path, case: str) -> None:
    command = [executable, "-W", "error", "-c", PROGRAM, GREEDY[case], str(tmp_path)]
    ended = run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stderr == ""
    megabytes, count = map(int, ended.stdout.splitlines()[0].split())
    assert count, "neither scanning nor unpacking it was refused"
    assert megabytes < 64
    assert not (tmp_path / "unpacked").exists()
