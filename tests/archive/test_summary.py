from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Packed, Run, pack_run, signing
from marwright.archive.keys import make_key_pair
from marwright.archive.manifest import MANIFEST_NAME, Manifest
from marwright.archive.member import Member, collect
from marwright.archive.summary import MAX_VALUES, Summary, flatten
from marwright.archive.writer import Format, write_archive
from marwright.errors import ArchiveError

HANDLER = b"def handle(data, context): ...\n"


def write(path: Path, *, format: Format = "zip", **members: bytes) -> Path:
    """Write an archive with a handler and the members; `config` is its model-config.yaml."""
    config = "model-config.yaml" if "config" in members else None
    files = {config if name == "config" else name: content for name, content in members.items()}
    manifest = Manifest("m", "1.0", "h.py", config_file=config)
    everything = {MANIFEST_NAME: manifest.to_json(), "h.py": HANDLER, **files}
    listed = collect(Member(str(name), content) for name, content in everything.items())
    write_archive(path, listed, format=format, top="m")
    return path


def test_a_packed_run_tells_all_of_itself(run: Run, tmp_path: Path) -> None:
    packed = pack_run(run, out=tmp_path, preflight=None)
    summary = Summary.read(packed.path)
    assert (summary.format, summary.manifest.name, summary.size_bytes) == (
        "zip",
        "cnn",
        packed.size_bytes,
    )
    assert summary.settings["batchSize"] == 8
    assert summary.spec["name"] == "cnn"
    assert summary.provenance["training"]["config"]["dataset"] == "digits"
    assert summary.samples == len(run.samples)
    assert summary.has_bom
    assert summary.root_digest == packed.root_digest
    assert (summary.is_signed, summary.signer, summary.problems) == (False, "", ())
    assert all(member.sha256 for member in summary.members)


@pytest.mark.parametrize("format", ["zip", "tgz", "folder"])
def test_archives_of_every_format_are_summarised(tmp_path: Path, format: Format) -> None:
    path = write(tmp_path / "m", format=format, config=b"batchSize: 4\n")
    summary = Summary.read(path)
    assert [member.name for member in summary.members] == [
        MANIFEST_NAME,
        "h.py",
        "model-config.yaml",
    ]
    assert (summary.format, summary.settings) == (format, {"batchSize": 4})


def test_an_archive_of_torch_model_archiver_is_summarised(tmp_path: Path) -> None:
    for name in ("h.py", "model.pt"):
        (tmp_path / name).write_bytes(HANDLER * 1_000)
    archiver = Path(sys.executable).with_name("torch-model-archiver")
    flags = ["--model-name", "m", "--version", "1.0", "--handler", "h.py"]
    subprocess.run(
        [archiver, *flags, "--serialized-file", "model.pt"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    summary = Summary.read(tmp_path / "m.mar")
    weights = next(member for member in summary.members if member.name == "model.pt")
    assert weights.compressed_bytes < weights.size_bytes
    assert (summary.root_digest, weights.sha256, summary.problems) == (None, None, ())


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"config": b"a: [\n"}, "expected YAML"),
        ({"config": b"- a\n"}, "list instead of a mapping"),
        ({"config": b"x" * (2 << 20)}, "too long"),
        ({"config": b"[" * 5_000}, "expected YAML"),
        ({"MAR-INF/spec.json": b"{"}, "expected JSON"),
        ({"MAR-INF/provenance.json": b"[]"}, "list instead of dict"),
        ({"MAR-INF/samples.json": b"[" * 100_000}, "expected JSON"),
    ],
)
def test_what_is_broken_is_told_and_the_rest_shown(
    tmp_path: Path, members: dict[str, Any], problem: str
) -> None:
    summary = Summary.read(write(tmp_path / "m.mar", **members))
    assert len(summary.problems) == 1
    assert problem in summary.problems[0]
    assert summary.manifest.name == "m"


def test_settings_that_name_themselves_a_billion_times_are_not_followed(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    summary = Summary.read(write(tmp_path / "m.mar", config="\n".join(lines).encode()))
    assert f"more than {MAX_VALUES:,} values" in summary.problems[0]
    loop = Summary.read(write(tmp_path / "m.mar", config=b"a: &a {b: *a}\n"))
    assert "a name of more than" in loop.problems[0]


def test_dates_and_odd_keys_of_settings_fit_into_json(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar", config=b"2026-01-01: {1: !!set {a}, null: 2026-01-02}\n")
    document = json.dumps(Summary.read(path).to_json(), default=str)
    assert json.loads(document)["settings"] == {"2026-01-01": {"1": ["a"], "None": "2026-01-02"}}


def test_values_are_named_by_their_place() -> None:
    values: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}, "d": [], "e": None}
    assert flatten(values) == {"a.b.0": 1, "a.b.1.c": 2, "d": [], "e": None}


def test_a_signature_beside_the_archive_is_told_without_being_verified(packed: Packed) -> None:
    packed.path.with_name("cnn.mar.sig").write_text("{}", encoding="utf-8")
    summary = Summary.read(packed.path)
    assert (summary.is_signed, summary.signer) == (True, "")
    assert "is no signature of a model" in summary.problems[0]


def test_the_signer_is_told_by_the_signatures_own_word(packed: Packed, tmp_path: Path) -> None:
    key, _ = make_key_pair(tmp_path / "keys", password=None)
    signature = signing.sign_with_key(packed.path, key=key)
    summary = Summary.read(packed.path)
    assert (summary.is_signed, summary.signer) == (True, signature.signer)
    assert summary.signer.startswith("the key ")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no archive"):
        Summary.read(tmp_path / "absent.mar")


def test_large_members_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mar")
    with zipfile.ZipFile(path, "a") as archive, archive.open("model.pt", "w") as member:
        for _ in range(256):
            member.write(bytes(1 << 20))
    script = (
        "import sys; from pathlib import Path\n"
        "from marwright.archive.summary import Summary\n"
        "summary = Summary.read(Path(sys.argv[1]))\n"
        "peak = Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print(summary.size_bytes >> 20, int(peak) >> 10, 'torch' in sys.modules)"
    )
    began = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    size, peak, torch = answer.stdout.split()
    assert (int(size), int(peak) < 100, torch) == (256, True, "False")
    assert time.monotonic() - began < 5  # 0.2 s on a quiet machine
