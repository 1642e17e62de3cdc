from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from marwright.archive import Archive, Packed, Run, pack_files, pack_run
from marwright.errors import ArchiveError, HandlerError, StorageError, UsageError


def read_members(path: Path) -> dict[str, bytes]:
    """Return an archive's members."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_archive_holds_model_handler_siblings_classes_and_settings(packed: Packed) -> None:
    assert sorted(read_members(packed.path)) == [
        "MAR-INF/MANIFEST.json",
        "classes.json",
        "image_classifier.py",
        "image_input.py",
        "model-config.yaml",
        "model.pt",
    ]
    manifest = Archive.open(packed.path).manifest
    assert (manifest.name, manifest.version) == ("cnn", "1.0")


def test_two_packs_of_one_run_are_identical(
    run: Run, packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o077)
    try:
        again = pack_run(run, out=Path("elsewhere"))
    finally:
        os.umask(umask)
    assert again.sha256 == packed.sha256
    assert again.path.read_bytes() == packed.path.read_bytes()


def test_the_content_is_that_of_torch_model_archiver(
    run: Run, packed: Packed, root: Path, tmp_path: Path
) -> None:
    members = read_members(packed.path)
    (tmp_path / "model-config.yaml").write_bytes(members["model-config.yaml"])
    handlers = root / "handlers"
    extra = f"{run.path / 'classes.json'},{handlers / 'image_input.py'}"
    (tmp_path / "tmp").mkdir()
    script = "from model_archiver.model_packaging import *; generate_model_archive()"
    options = {
        "--model-name": "cnn",
        "--version": "1.0",
        "--serialized-file": run.model_path,
        "--handler": handlers / "image_classifier.py",
        "--extra-files": extra,
        "--config-file": tmp_path / "model-config.yaml",
        "--export-path": tmp_path,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    subprocess.run(
        [sys.executable, "-c", script, *flat],
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
    theirs = read_members(tmp_path / "cnn.mar")
    ours, wanted = (json.loads(m.pop("MAR-INF/MANIFEST.json")) for m in (members, theirs))
    assert members == theirs
    assert ours.pop("createdOn") != wanted.pop("createdOn")
    assert ours == wanted


def test_an_archive_is_replaced_only_by_force(run: Run, packed: Packed) -> None:
    with pytest.raises(UsageError, match="--force"):
        pack_run(run, out=packed.path.parent)
    assert pack_run(run, out=packed.path.parent, force=True).sha256 == packed.sha256


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class A: pass\nclass B: pass\n", "A (line 1), B (line 2)"),
        ("x = 1\n", "none"),
        ("class A(:\n", "bad.py:1"),
        ("import absent_package\ndef handle(data, context): ...\n", "'absent_package' at bad.py:1"),
        ("class A:\n    def handle(self, data, context): ...\n", "without a method initialize"),
    ],
)
def test_a_handler_no_worker_could_load_is_refused(
    run: Run, tmp_path: Path, source: str, found: str
) -> None:
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    with pytest.raises(HandlerError) as caught:
        pack_run(run, out=tmp_path / "store", handler=str(tmp_path / "bad.py"))
    assert found in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_siblings_travel_with_the_handler(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import near\ndef handle(data, context): ...\n", "utf-8")
    (tmp_path / "near.py").write_text("from pack_age import far\n", encoding="utf-8")
    (tmp_path / "pack_age").mkdir()
    (tmp_path / "pack_age/far.py").write_text("import near\n", encoding="utf-8")
    packed = pack_run(run, out=tmp_path / "store", handler=str(tmp_path / "own.py"))
    assert {"own.py", "near.py", "pack_age/far.py"} < set(read_members(packed.path))


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_weights_that_do_not_load_are_refused(
    tmp_path: Path, content: bytes | None, run: Run
) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(run.model_path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ArchiveError, match=r"do not load.*expected a TorchScript file"):
        pack_files(
            name="cnn",
            version="1.0",
            handler="image_classifier",
            serialized_file=weights,
            out=tmp_path / "store",
        )
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match=r"cannot write .*cnn\.mar"):
        pack_run(run, out=tmp_path / "file" / "store")


def test_a_full_disk_leaves_the_old_archive_as_it_was(packed: Packed, run: Run) -> None:
    before = packed.path.read_bytes()
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from marwright.archive import Run, pack_run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "pack_run(Run.open(Path(sys.argv[1])), out=Path(sys.argv[2]), force=True)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(run.path), str(packed.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StorageError: cannot write" in answer.stderr
    assert packed.path.read_bytes() == before
    assert os.listdir(packed.path.parent) == ["cnn.mar"]  # noqa: PTH208 - hidden files count
