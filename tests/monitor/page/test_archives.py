from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from marwright.archive import Packed
from marwright.archive.admission import POLICY_NAME
from marwright.archive.keys import make_key_pair
from marwright.archive.signing import sign_with_key
from marwright.monitor.page import archives
from marwright.monitor.page.archives import Archives


def test_a_sound_archive_says_so_and_is_read_once(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Archives()
    contents = kept.read(packed.path)
    assert contents.is_sound
    assert contents.digests == f"as packed, {len(contents.summary.members)} files"
    assert contents.signature == "none"
    monkeypatch.setattr(archives, "look_into", lambda *a, **k: pytest.fail("read again"))
    assert kept.read(packed.path) is contents


def test_an_altered_member_is_named(packed: Packed, tmp_path: Path) -> None:
    altered = tmp_path / "altered.mar"
    with zipfile.ZipFile(packed.path) as source, zipfile.ZipFile(altered, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            target.writestr(item, content + b"\n" if item.filename.endswith(".py") else content)
    contents = Archives().read(altered)
    assert not contents.is_sound
    assert "a member is not what its digest states" in contents.digests


def test_an_archive_that_changes_is_read_again(packed: Packed) -> None:
    kept = Archives()
    first = kept.read(packed.path)
    os.utime(packed.path, ns=(1, 1))
    assert kept.read(packed.path) is not first


def test_a_large_archive_keeps_nobody_waiting(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LARGEST", 10)
    assert "marwright verify" in Archives().read(packed.path).digests


def test_a_signature_is_named_and_judged_by_the_stores_policy(
    packed: Packed, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing")
    private, public = make_key_pair(tmp_path / "keys")
    sign_with_key(packed.path, key=private)
    kept = Archives()
    assert "nobody asked by whom: a signature by" in kept.read(packed.path).signature
    policy = packed.path.with_name(POLICY_NAME)
    policy.write_text(f"keys: [{public}]\n", encoding="utf-8")
    trusted = Archives().read(packed.path)
    assert trusted.is_sound
    assert "trusted by the store's policy" in trusted.signature
    _, other = make_key_pair(tmp_path / "others")
    policy.write_text(f"keys: [{other}]\n", encoding="utf-8")
    refused = Archives().read(packed.path)
    assert not refused.is_sound
    assert "the signature does not hold" in refused.signature
