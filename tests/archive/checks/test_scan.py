from __future__ import annotations

import importlib
import pickle
import pkgutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from marwright.archive import Packed, checks
from marwright.archive.checks import ALL_RULES, RULES, scan
from marwright.archive.checks.findings import Rule, refuse
from marwright.errors import ArchiveError

EVIL = b"cos\nsystem\n(S'x'\ntR."


def write(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_packed_archive_has_no_finding_and_is_scanned_in_no_time(packed: Packed) -> None:
    assert scan(packed.path) == []  # and imports what it needs
    times = []
    for _ in range(5):
        start = time.process_time()
        scan(packed.path)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_structure_and_pickles_are_both_told(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar", **{"../x": b"", "m.pkl": EVIL, "n.pkl": pickle.dumps(scan)})
    assert [finding.rule.id for finding in scan(path)] == ["S101", "P201", "P202"]
    with pytest.raises(ArchiveError, match=r"m\.mar is refused: .*S101 \.\./x: .*and 1 more"):
        refuse(scan(path), path)


def test_a_bomb_is_not_unpacked_and_yet_not_taken_for_safe(tmp_path: Path) -> None:
    path = tmp_path / "m.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.pkl", EVIL * 100)
    content = path.read_bytes()
    stated = len(EVIL * 100).to_bytes(4, "little")
    path.write_bytes(content.replace(stated, b"\x01\0\0\0"))
    found = [(finding.rule.id, finding.found) for finding in scan(path)]
    assert found[1:] == [("P204", "not unpacked, because of S112")]


def test_no_two_rules_have_one_id() -> None:
    rules = {
        id(rule): rule
        for module in pkgutil.iter_modules(checks.__path__, f"{checks.__name__}.")
        for rule in vars(importlib.import_module(module.name)).values()
        if isinstance(rule, Rule)
    }
    ids = sorted(rule.id for rule in rules.values())
    assert ids == sorted(set(ids))
    assert ids == sorted(rule.id for rule in ALL_RULES)
    assert set(RULES) < set(ALL_RULES)


def test_every_rule_says_what_and_what_to_do_in_one_line() -> None:
    for rule in ALL_RULES:
        for text in (rule.title, rule.remedy):
            assert text.isprintable(), rule.id
            assert not text.endswith("."), rule.id
            assert 5 < len(text) < 200, rule.id


def test_a_finding_alone_imports_no_check() -> None:
    program = (
        "import sys, marwright.archive.checks.findings;"
        "print([name for name in sys.modules if 'pickl' in name or name.endswith('structure')])"
    )
    command = [sys.executable, "-c", program]
    assert "checks.pickles" not in subprocess.check_output(command, text=True)


def test_an_unknown_attribute_is_none() -> None:
    assert not hasattr(checks, "NO_RULES")
