from __future__ import annotations

import json
from typing import Any

import pytest

from marwright.archive import Manifest
from marwright.archive.manifest import format_creation_time
from marwright.errors import ArchiveError


def write_manifest(**model: Any) -> bytes:
    return json.dumps({"model": {"modelName": "m", "handler": "h.py", **model}}).encode()


def test_a_manifest_read_back_is_the_one_written() -> None:
    written = Manifest(
        name="cnn",
        version="1.0",
        handler="h.py",
        serialized_file="model.pt",
        model_file="model.py",
        config_file="model-config.yaml",
        requirements_file="requirements.txt",
        created_on="01/01/1980 00:00:00",
    )
    assert Manifest.parse(written.to_json(), source="x") == written


def test_files_that_are_absent_are_not_named() -> None:
    document = json.loads(Manifest("m", "1.0", "h.py").to_json())
    assert document["model"] == {"modelName": "m", "handler": "h.py", "modelVersion": "1.0"}
    assert document["runtime"] == "python"


def test_an_old_manifest_without_a_version_has_version_1() -> None:
    assert Manifest.parse(write_manifest(), source="x").version == "1.0"
    assert Manifest.parse(write_manifest(modelVersion=2.5), source="x").version == "2.5"


@pytest.mark.parametrize("name", ["", "-m", ".m", "a b", "a/b", "../a", "é", "m\n", "m?"])
def test_a_name_that_no_url_can_carry_is_refused(name: str) -> None:
    with pytest.raises(ArchiveError, match="model name"):
        Manifest(name, "1.0", "h.py")


@pytest.mark.parametrize("version", ["", "a b", "a/b", "../a", "m\n", "m?", "a#b", "50%", "a\\b"])
def test_a_version_that_no_url_can_carry_is_refused(version: str) -> None:
    with pytest.raises(ArchiveError, match="model version"):
        Manifest("m", version, "h.py")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\xfa",
        b"no JSON",
        b"[]",
        b"null",
        b'{"model": 1}',
        b'{"model": {}}',
        b'{"model": {"modelName": "m"}}',
        b'{"model": {"handler": "h.py"}}',
        b"[" * 100_000,
        b"1" * 5_000,
        write_manifest(modelName=5),
        write_manifest(modelName="../m"),
        write_manifest(modelName=None),
        write_manifest(handler=5),
        write_manifest(handler="\x1b[2J.py"),
        write_manifest(handler="\ud800.py"),
        write_manifest(modelVersion="\u202e1"),
        write_manifest(serializedFile=["model.pt"]),
        write_manifest(configFile={}),
        b'{"runtime": 3, "model": {"modelName": "m", "handler": "h.py"}}',
    ],
)
def test_a_broken_manifest_is_an_archive_error_that_names_the_archive(text: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"some\.mar has a broken manifest"):
        Manifest.parse(text, source="some.mar")


def test_times_are_stated_in_utc() -> None:
    assert format_creation_time(0) == "01/01/1970 00:00:00"
    assert format_creation_time(1_700_000_000) == "14/11/2023 22:13:20"
