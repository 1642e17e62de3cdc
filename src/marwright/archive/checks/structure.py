"""The structure of an archive: what it would do to the folder it is unpacked to, and to whom.

TorchServe unpacks a `.mar` file with java.util.zip.ZipInputStream, which reads the header before
each member and takes them in the file's order; Python's zipfile and most others read the list at
the end. A file made for it shows different members to each, so both are compared here.
"""

from __future__ import annotations

import re
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.container import Container, Entry, open_container, printable
from marwright.archive.limits import MAX_RATIO, QUIET_BYTES, expansion_limit
from marwright.archive.member import name_problem
from marwright.archive.zip_layout import LocalHeader, find_directory, read_header

__all__ = ["RULES", "scan_structure"]

REFUSE = "do not use this archive, and ask where it comes from"

OUTSIDE = Rule("S101", Severity.DANGER, "a name leads out of the model's folder", REFUSE)
NAME = Rule(
    "S102",
    Severity.ERROR,
    "a name that not every system can unpack",
    "rename the file, and pack the model again",
)
LINK = Rule(
    "S103",
    Severity.DANGER,
    "a link, which may show a file from outside",
    "put the file itself into the archive",
)
DEVICE = Rule("S104", Severity.DANGER, "a device, pipe or socket", REFUSE)
DOUBLE = Rule("S105", Severity.DANGER, "two members of one name; which one counts differs", REFUSE)
CASE = Rule(
    "S106",
    Severity.WARNING,
    "names that are one name on some systems",
    "rename one of them if the archive is ever unpacked on macOS or Windows",
)
CLASH = Rule(
    "S107",
    Severity.ERROR,
    "a file stands where a folder must be",
    "rename one of them, and pack the model again",
)
ENCRYPTED = Rule(
    "S108",
    Severity.ERROR,
    "an encrypted member, which TorchServe cannot read",
    "pack the model without a password",
)
METHOD = Rule(
    "S109",
    Severity.ERROR,
    "a compression that TorchServe cannot read",
    "pack the model stored or deflated: marwright pack, or --archive-format zip-store",
)
BOMB = Rule("S110", Severity.DANGER, "it unpacks to more than a model needs", REFUSE)
SWELLS = Rule(
    "S111",
    Severity.WARNING,
    "it unpacks to much more than its file",
    "look whether the weights are all zero",
)
LONGER = Rule("S112", Severity.DANGER, "a member holds more than it states", REFUSE)
OVERLAP = Rule("S113", Severity.DANGER, "members share bytes of the file", REFUSE)
STRAY = Rule(
    "S114",
    Severity.DANGER,
    "bytes that belong to no member",
    "pack the model again; TorchServe and other tools may see different files in this archive",
)
DIFFERS = Rule(
    "S115",
    Severity.DANGER,
    "a member's own header says something else than the list of members",
    "pack the model again; TorchServe and other tools would see different files in this archive",
)
DESCRIPTOR = Rule(
    "S116",
    Severity.ERROR,
    "a stored member with its size behind it, which TorchServe cannot read",
    "pack the model again with a tool that writes to a file, not to a pipe",
)
DAMAGED = Rule(
    "S117", Severity.ERROR, "a member is damaged", "copy the archive again, or pack the model again"
)
ENDING = Rule(
    "S118",
    Severity.ERROR,
    "the file's ending says another format",
    "rename it: TorchServe takes .mar for a zip file, and anything else for a tar file",
)
ENCODING = Rule(
    "S119",
    Severity.WARNING,
    "a name is not marked as UTF-8; TorchServe and other tools read it differently",
    "rename the file with plain letters, and pack the model again",
)
OTHER = Rule(
    "S120",
    Severity.DANGER,
    "neither a plain file nor a plain folder; unpackers differ in what they make of it",
    "pack the model again",
)

RULES: tuple[Rule, ...] = (
    *(OUTSIDE, NAME, LINK, DEVICE, DOUBLE, CASE, CLASH, ENCRYPTED, METHOD, BOMB, SWELLS),
    *(LONGER, OVERLAP, STRAY, DIFFERS, DESCRIPTOR, DAMAGED, ENDING, ENCODING, OTHER),
)

MOST_FINDINGS = 20
"""Of one rule; a hostile archive could bring a hundred thousand."""

_UTF8, _SIZE_BEHIND, _ENCRYPTED = 0x800, 0x8, 0x1
_COMPARED = _UTF8 | _SIZE_BEHIND | _ENCRYPTED | 0x40 | 0x2000  # and strong, masked encryption


def scan_structure(source: Path | Container) -> list[Finding]:
    """Check an archive's structure; stored members are not read, deflated ones are unpacked once.

    Raises:
        ArchiveError: no such file, or one that no reader could list.
    """
    with open_container(source) if isinstance(source, Path) else source as container:
        findings = [
            *_check_ending(container),
            *_check_names(container.entries),
            *_check_clashes(container.entries),
            *_check_kinds(container),
            *_check_size(container),
        ]
        if container.format == "zip":
            bomb = any(finding.rule is BOMB for finding in findings)
            findings += _check_layout(container, unpack=not bomb)
        elif container.trailing_bytes:
            found = f"{container.trailing_bytes:,} bytes behind the end of the gzip file"
            findings.append(STRAY.at(found))
    return _thin(findings)


def _thin(findings: Iterable[Finding]) -> list[Finding]:
    """Return the first findings of each rule."""
    kept: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if len(kept[finding.rule.id]) < MOST_FINDINGS:
            kept[finding.rule.id].append(finding)
    return [finding for group in kept.values() for finding in group]


def _check_ending(container: Container) -> Iterator[Finding]:
    endings = {"zip": (".tar.gz", ".tgz"), "tgz": (".mar", ".zip"), "folder": ()}
    if container.path.name.lower().endswith(endings[container.format]):
        yield ENDING.at(f"a {container.format} file named {container.path.name}")


def _check_names(entries: Iterable[Entry]) -> Iterator[Finding]:
    for entry in entries:
        shown, problem = printable(entry.name), name_problem(entry.name)
        if re.match(r"[/\\]|[A-Za-z]:", entry.name) or ".." in re.split(r"[/\\]", entry.name):
            yield OUTSIDE.at(problem or "a name that begins with a drive", member=shown)
        elif problem:
            yield NAME.at(problem, member=shown)
        if entry.crc32 is not None and not entry.flags & _UTF8 and not entry.name.isascii():
            yield _describe_encoding(entry)


def _describe_encoding(entry: Entry) -> Finding:
    # Without the mark a name is in code page 437 (APPNOTE, appendix D); Java takes UTF-8 anyway.
    try:
        other = _raw_name(entry).decode()
    except UnicodeDecodeError:
        found, severity = "not UTF-8; TorchServe cannot read the archive", Severity.ERROR
    else:
        found, severity = f"{printable(other)} to TorchServe", Severity.WARNING
    return ENCODING.at(found, member=printable(entry.name), severity=severity)


def _raw_name(entry: Entry) -> bytes:
    return entry.name.encode("utf-8" if entry.flags & _UTF8 else "cp437")


def _check_clashes(entries: Sequence[Entry]) -> Iterator[Finding]:
    files: set[str] = set()
    alike: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.kind != "folder":
            if entry.name in files:
                yield DOUBLE.at("a second member of this name", member=printable(entry.name))
            files.add(entry.name)
            alike[unicodedata.normalize("NFC", entry.name).casefold()].add(entry.name)
    for names in alike.values():
        if len(names) > 1:
            shown = ", ".join(printable(name) for name in sorted(names)[:4])
            yield CASE.at(shown, member=printable(min(names)))
    for folder in sorted(files & _folders_of(entries)):
        yield CLASH.at("other members stand below this file", member=printable(folder))


def _folders_of(entries: Iterable[Entry]) -> set[str]:
    folders: set[str] = set()
    for entry in entries:
        folder = entry.name.rstrip("/") if entry.kind == "folder" else _parent(entry.name)
        while folder and folder not in folders:
            folders.add(folder)
            folder = _parent(folder)
    return folders


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _check_kinds(container: Container) -> Iterator[Finding]:
    for entry in container.entries:
        member = printable(entry.name)
        if entry.kind == "link":
            yield LINK.at("a link", member=member)
        elif entry.kind == "device":
            yield DEVICE.at("a device, pipe or socket", member=member)
        elif entry.kind == "other":
            yield OTHER.at("a kind of its own", member=member)
        elif entry.kind == "folder" and entry.size_bytes:
            yield STRAY.at(f"a folder that holds {entry.size_bytes:,} bytes", member=member)
        if entry.encrypted:
            yield ENCRYPTED.at("encrypted", member=member)
        if entry.method not in (0, 8):
            yield METHOD.at(f"compression method {entry.method}", member=member)


def _check_size(container: Container) -> Iterator[Finding]:
    if container.format == "folder":
        return
    size = container.path.stat().st_size
    unpacked = sum(entry.size_bytes for entry in container.entries)
    found = f"{unpacked:,} bytes from a file of {size:,}"
    if unpacked > expansion_limit(container.path):
        yield BOMB.at(found)
    elif unpacked > max(QUIET_BYTES, size * MAX_RATIO):
        yield SWELLS.at(found)


def _check_layout(container: Container, *, unpack: bool) -> Iterator[Finding]:
    """Walk through a zip file as TorchServe does, and compare with the list at its end.

    `unpack` follows deflated members to their end; members that share bytes never are: each of a
    hundred thousand could be the same gigabyte.
    """
    with container.path.open("rb") as stream:
        directory = find_directory(stream, str(container.path))
        if directory.shift_bytes:
            yield STRAY.at(f"the list of members is {directory.shift_bytes:,} bytes further on")
        if directory.trailing_bytes:
            yield STRAY.at(f"{directory.trailing_bytes:,} bytes behind the end of the zip file")
        position = 0
        for entry in sorted(container.entries, key=lambda entry: entry.header_offset):
            yield from _check_gap(position, entry.header_offset, printable(entry.name))
            unpack = unpack and entry.header_offset >= position
            findings, end = _check_member(stream, entry, unpack=unpack)
            yield from findings
            position = max(position, end)
        yield from _check_gap(position, directory.offset + directory.shift_bytes, "")


def _check_gap(position: int, start: int, member: str) -> Iterator[Finding]:
    what = "the member" if member else "the list of members"
    if start > position:
        yield STRAY.at(f"{start - position:,} bytes before {what}", member=member)
    elif start < position:
        yield OVERLAP.at(
            f"{what} begins {position - start:,} bytes before the one ahead ends", member=member
        )


def _check_member(stream: IO[bytes], entry: Entry, *, unpack: bool) -> tuple[list[Finding], int]:
    """Compare one member's two headers; return where it ends."""
    member = printable(entry.name)
    try:
        header = read_header(stream, entry.header_offset)
    except (zipfile.BadZipFile, OSError, OverflowError, ValueError) as exc:
        return [DIFFERS.at(printable(str(exc)), member=member)], entry.header_offset
    end = header.data_offset + entry.compressed_bytes
    findings = [DIFFERS.at(text, member=member) for text in _compare(entry, header)]
    if unpack and entry.method == 8 and not findings:
        findings += _check_deflated(stream, header.data_offset, entry)
    if entry.flags & _SIZE_BEHIND and not findings:
        length = _measure_descriptor(stream, end, entry)
        if entry.method == 0:
            findings.append(DESCRIPTOR.at("stored, with its size behind it", member=member))
        elif not length:
            findings.append(DIFFERS.at("not the stated size behind it", member=member))
        end += length
    return findings, end


def _compare(entry: Entry, header: LocalHeader) -> Iterator[str]:
    """Yield what a member's own header states otherwise than the list does."""
    if header.name != _raw_name(entry):
        yield f"the name {printable(header.name.decode('utf-8', 'replace'))}"
    if header.method != entry.method:
        yield f"compression method {header.method}, not {entry.method}"
    if (header.flags ^ entry.flags) & _COMPARED:
        yield f"flags {header.flags:#x}, not {entry.flags:#x}"
    if entry.method == 0 and entry.compressed_bytes != entry.size_bytes:
        yield f"stored, but {entry.compressed_bytes:,} bytes are not {entry.size_bytes:,}"
    stated = header.crc32, header.compressed_bytes, header.size_bytes
    listed = entry.crc32, entry.compressed_bytes, entry.size_bytes
    if stated != listed and not (header.flags & _SIZE_BEHIND and not any(stated)):
        yield f"checksum and sizes {stated}, not {listed}"


def _check_deflated(stream: IO[bytes], offset: int, entry: Entry) -> Iterator[Finding]:
    """Unpack a member without keeping it: neither its end nor its size need be as stated.

    ZipInputStream goes by the end of the deflate stream, others by the stated sizes.
    """
    member, inflate = printable(entry.name), zlib.decompressobj(-15)
    left, unpacked = entry.compressed_bytes, 0
    stream.seek(offset)
    try:
        while not inflate.eof and unpacked <= entry.size_bytes:
            block = inflate.unconsumed_tail or stream.read(min(left, 1 << 16))
            left -= 0 if inflate.unconsumed_tail else len(block)
            if not block:
                yield DAMAGED.at("cut off", member=member)
                return
            unpacked += len(inflate.decompress(block, 1 << 20))
    except zlib.error as exc:
        yield DAMAGED.at(str(exc), member=member)
        return
    if unpacked > entry.size_bytes:
        yield LONGER.at(f"more than its {entry.size_bytes:,} bytes", member=member)
    elif unpacked < entry.size_bytes:
        yield DAMAGED.at(f"{unpacked:,} bytes, not {entry.size_bytes:,}", member=member)
    elif rest := left + len(inflate.unused_data):
        yield STRAY.at(f"{rest:,} bytes behind its compressed content", member=member)


def _measure_descriptor(stream: IO[bytes], offset: int, entry: Entry) -> int:
    """Return the length of the checksum and sizes behind a member (4.3.9), or 0 for others."""
    stream.seek(offset)
    found = stream.read(24)
    crc = (entry.crc32 or 0).to_bytes(4, "little")
    for width in (4, 8):
        if max(entry.compressed_bytes, entry.size_bytes) >= 1 << 8 * width:
            continue
        sizes = (entry.compressed_bytes, entry.size_bytes)
        text = crc + b"".join(size.to_bytes(width, "little") for size in sizes)
        for stated in (b"PK\x07\x08" + text, text):
            if found.startswith(stated):
                return len(stated)
    return 0
