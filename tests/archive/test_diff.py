from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.archive import Run, pack_run
from marwright.archive.diff import Change, Difference, FileChange
from marwright.archive.manifest import MANIFEST_NAME, Manifest
from marwright.archive.member import Member, collect
from marwright.archive.writer import Format, write_archive
from marwright.errors import ArchiveError

HANDLER = b"def handle(data, context):\n    return data\n"


def save(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def write(
    path: Path,
    members: Mapping[str, bytes] | None = None,
    *,
    version: str = "1.0",
    created_on: str = "",
    format: Format = "zip",
) -> Path:
    """Write an archive of a handler, settings and weights, or of other members in their place."""
    content = {"h.py": HANDLER, "c.yaml": b"batchSize: 4\n", "w.pt": save({"w": torch.ones(2)})}
    manifest = Manifest(
        "m", version, "h.py", serialized_file="w.pt", config_file="c.yaml", created_on=created_on
    )
    everything = {**content, **(members or {}), MANIFEST_NAME: manifest.to_json()}
    listed = collect(Member(name, data) for name, data in everything.items())
    write_archive(path, listed, format=format, top="m")
    return path


def test_the_same_content_in_another_container_is_equal(tmp_path: Path) -> None:
    first = write(tmp_path / "a.mar", created_on="01/01/1980 00:00:00")
    for format in ("zip", "tgz", "folder"):
        second = write(tmp_path / f"b.{format}", created_on="24/11/2026 00:00:00", format=format)
        assert not Difference.between(first, second)
        assert not Difference.between(second, first)


def test_ours_equals_what_torch_model_archiver_makes_of_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_bytes(HANDLER)
    flags = ["--model-name", "m", "--version", "1.0", "--handler", "h.py"]
    for program in (["torch-model-archiver"], ["marwright", "pack", "--no-preflight"]):
        folder = tmp_path / program[0]
        folder.mkdir()
        command = [str(Path(sys.executable).with_name(program[0])), *program[1:], *flags]
        subprocess.run(
            [*command, "--export-path", str(folder)], cwd=tmp_path, check=True, capture_output=True
        )
    assert not Difference.between(
        tmp_path / "torch-model-archiver/m.mar", tmp_path / "marwright/m.mar"
    )


def test_files_manifest_settings_and_text_are_told_apart(tmp_path: Path) -> None:
    before = write(tmp_path / "a.mar", {"old.txt": b"old"})
    changed = {"h.py": HANDLER + b"# new\n", "c.yaml": b"batchSize: 8\n", "new.txt": b""}
    after = write(tmp_path / "b.mar", changed, version="2.0")
    difference = Difference.between(before, after)
    assert [(file.kind, file.name) for file in difference.files] == [
        ("changed", MANIFEST_NAME),
        ("changed", "c.yaml"),
        ("changed", "h.py"),
        ("added", "new.txt"),
        ("removed", "old.txt"),
    ]
    assert difference.manifest == (Change("model.modelVersion", "1.0", "2.0"),)
    assert difference.settings == (Change("batchSize", 4, 8),)
    handler = next(text for text in difference.texts if text.name == "h.py")
    assert (handler.added, handler.removed, "+# new" in handler.lines) == (1, 0, True)
    assert not difference.weights


def test_schema_and_provenance_are_compared_key_by_key(tmp_path: Path, run: Run) -> None:
    before = pack_run(run, out=tmp_path / "a.mar", preflight=None)
    after = pack_run(run, out=tmp_path / "b.mar", version="2.0", preflight=None)
    difference = Difference.between(before.path, after.path)
    assert difference.spec == (Change("version", "1.0", "2.0"),)
    assert difference.provenance == ()
    assert not difference.weights


def test_weights_are_compared_by_tensor(tmp_path: Path) -> None:
    before = write(tmp_path / "a.mar", {"w.pt": save({"w": torch.ones(2), "b": torch.zeros(1)})})
    after = write(
        tmp_path / "b.mar", {"w.pt": save({"w": torch.tensor([1, 1.25]), "b": torch.zeros(1)})}
    )
    (weights,) = Difference.between(before, after).weights
    assert (weights.member, weights.equal) == ("w.pt", 1)
    assert (weights.tensors[0].name, weights.tensors[0].max_abs) == ("w", 0.25)


def test_weights_that_an_archiver_compressed_are_compared_by_tensor(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_bytes(HANDLER)
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "w.pt").write_bytes(save({"w": torch.full((100,), value)}))
        archiver = Path(sys.executable).with_name("torch-model-archiver")
        flags = ["--version", "1.0", "--handler", "h.py", "--serialized-file", "w.pt"]
        subprocess.run(
            [archiver, "--model-name", name, *flags], cwd=tmp_path, check=True, capture_output=True
        )
    difference = Difference.between(tmp_path / "a.mar", tmp_path / "b.mar")
    assert difference.weights[0].tensors[0].max_abs == 1.0


def test_weights_of_an_unknown_kind_are_compared_as_bytes(tmp_path: Path) -> None:
    before = write(tmp_path / "a.mar", {"w.pt": b"\x80\x02one"})
    after = write(tmp_path / "b.mar", {"w.pt": b"\x80\x02two"})
    (weights,) = Difference.between(before, after).weights
    assert (weights.format, weights.note) == (
        "bytes",
        "neither written by torch nor .safetensors nor .onnx",
    )


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b", b"\n" * 6_000, b" " * (300 << 10)])
def test_what_is_no_short_text_is_told_as_a_file_only(tmp_path: Path, content: bytes) -> None:
    before = write(tmp_path / "a.mar", {"data": b"text"})
    difference = Difference.between(before, write(tmp_path / "b.mar", {"data": content}))
    assert difference.files == (FileChange("data", "changed", 4, len(content)),)
    assert not difference.texts


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "a.mar")
    with pytest.raises(ArchiveError, match="no archive"):
        Difference.between(good, tmp_path / "absent.mar")
    with pytest.raises(ArchiveError, match=r"c\.yaml of .* cannot be read"):
        Difference.between(good, write(tmp_path / "b.mar", {"c.yaml": b"- 1\n"}))


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    good, bomb = write(tmp_path / "a.mar"), write(tmp_path / "b.mar")
    content = bytearray(bomb.read_bytes())
    at = content.rindex(b"w.pt") - 46  # its entry in the list at the end; offset 24 is the size
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    bomb.write_bytes(content)
    with zipfile.ZipFile(bomb) as archive:
        assert archive.getinfo("w.pt").file_size == 0xFFFFFFF0
    with pytest.raises(ArchiveError, match="unpacks to more than a model needs"):
        Difference.between(good, bomb)
