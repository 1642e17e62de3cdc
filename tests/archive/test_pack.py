from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marwright.archive import Packed, Run, Spec, pack_run, pack_spec
from marwright.archive.checks import scan
from marwright.archive.manifest import MANIFEST_NAME
from marwright.archive.reader import read_manifest
from marwright.errors import ArchiveError, RunError, StorageError, UsageError

HANDLER = "def handle(data, context): ...\n"


Umask = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _unset_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def read_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def write_handler(folder: Path, source: str = HANDLER) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "handler.py").write_text(source, encoding="utf-8")
    return str(folder / "handler.py")


def pack_small(
    folder: Path, run: Run, *, out: Path | None = None, force: bool = False, **values: Any
) -> Packed:
    """Pack a spec with a tiny handler, without a preflight."""
    if "handler" not in values:
        values["handler"] = write_handler(folder)
    spec = Spec.create(**{"name": "m", "model": str(run.model_path), **values})
    return pack_spec(spec, folder=folder, out=out or folder / "store", force=force, preflight=None)


def test_two_packs_of_one_run_are_identical(
    umask: Umask, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with umask(0o022):
        first = pack_run(run, out=tmp_path / "a", preflight=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    with umask(0o077):
        second = pack_run(run, out=Path("b.mar"), preflight=None).sha256
    monkeypatch.undo()
    time.tzset()
    assert first.path.read_bytes() == (tmp_path / "elsewhere/b.mar").read_bytes()
    assert first.sha256 == second


def test_copies_of_the_files_give_the_same_archive(tmp_path: Path, run: Run) -> None:
    source = "import b, a\n" + HANDLER
    digests: set[str] = set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        handler = write_handler(folder, source)
        for name in ("a.py", "b.py") if folder.name == "one" else ("b.py", "a.py"):
            (folder / name).write_text(f"x = {name!r}")
        os.utime(handler, (1_000_000_000, 1_000_000_000 + len(digests) * 10_000))
        (folder / "b.py").chmod(0o600 if digests else 0o755)
        digests.add(pack_small(folder, run, handler=handler).sha256)
    assert len(digests) == 1


def test_what_is_told_of_an_archive_is_true(packed: Packed) -> None:
    content = packed.path.read_bytes()
    assert packed.size_bytes == len(content)
    assert packed.sha256 == hashlib.sha256(content).hexdigest()
    assert packed.to_json()["sha256"] == packed.sha256
    assert (packed.path.name, packed.name, packed.version) == ("cnn.mar", "cnn", "1.0")


def test_members_have_one_time_one_mode_and_sorted_names(packed: Packed) -> None:
    with zipfile.ZipFile(packed.path) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}
    assert {entry.create_system for entry in entries} == {3}


def test_an_archive_of_a_run_holds_its_files_unchanged(
    packed: Packed, run: Run, root: Path
) -> None:
    members = read_members(packed.path)
    assert members["model.pt"] == run.model_path.read_bytes()
    for name in ("classes.json", "reference.npz"):
        assert members[name] == (run.path / name).read_bytes()
    for name in ("image_classifier.py", "image_input.py"):
        assert members[name] == (root / "handlers" / name).read_bytes()
    assert yaml.safe_load(members["model-config.yaml"])["handler"] == {"image_size": [24, 24]}


def test_the_reference_of_a_run_is_no_finding(tmp_path: Path, run: Run) -> None:
    packed = pack_run(run, out=tmp_path)
    assert "reference.npz" in read_members(packed.path)
    assert not packed.findings
    assert not scan(packed.path)


def test_a_run_of_before_there_were_references_packs_without_one(tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(run.path, tmp_path / "run"))
    (folder / "reference.npz").unlink()
    packed = pack_run(Run.open(folder), out=tmp_path, preflight=None)
    assert "reference.npz" not in read_members(packed.path)


def test_settings_given_override_and_the_image_size_of_the_run_stays(
    tmp_path: Path, run: Run
) -> None:
    packed = pack_run(
        run, out=tmp_path, settings={"batchSize": 3, "handler": {"top_k": 2}}, preflight=None
    )
    values = yaml.safe_load(read_members(packed.path)["model-config.yaml"])
    assert values["batchSize"] == 3
    assert values["handler"] == {"image_size": [24, 24], "top_k": 2}


def test_a_handler_section_left_empty_means_the_defaults(tmp_path: Path, run: Run) -> None:
    packed = pack_run(run, out=tmp_path, settings={"handler": None}, preflight=None)
    values = yaml.safe_load(read_members(packed.path)["model-config.yaml"])
    assert values["handler"] == {"image_size": [24, 24]}


@pytest.mark.parametrize("values", [{"handler": 5}, {"handler": ["top_k"]}, {"batch_size": 4}])
def test_settings_that_cannot_be_used_leave_no_file(
    tmp_path: Path, run: Run, values: dict[str, Any]
) -> None:
    with pytest.raises(ArchiveError, match="the model's settings"):
        pack_run(run, out=tmp_path / "store", settings=values)
    assert not list(tmp_path.iterdir())


def test_source_date_epoch_is_the_time_of_everything(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    packed = pack_small(tmp_path, run)
    assert read_manifest(packed.path).created_on == "14/11/2023 22:13:20"
    with zipfile.ZipFile(packed.path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_a_time_before_zip_files_becomes_the_first_they_can_state(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "315532800")
    fixed = pack_small(tmp_path / "a", run)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert pack_small(tmp_path / "b", run).sha256 == fixed.sha256


def test_the_last_time_that_a_zip_file_can_state_is_taken(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "4354819199")
    assert "31/12/2107" in read_manifest(pack_small(tmp_path, run).path).created_on


@pytest.mark.parametrize(
    "value", ["", "now", "-1", "1.5", " 1", "1\n", "²", "4354819200", "9" * 20, "9" * 5_000]
)
def test_a_source_date_epoch_that_is_no_time_is_refused(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        pack_small(tmp_path, run)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["../m", "", "a b", "a/b"])
def test_a_name_that_no_url_can_carry_is_refused(tmp_path: Path, run: Run, name: str) -> None:
    with pytest.raises(ArchiveError, match="name: expected a text"):
        pack_small(tmp_path, run, name=name)


@pytest.mark.parametrize("version", ["../1", "", "1 0", "1?", "1#", "50%"])
def test_a_version_that_no_url_can_carry_is_refused(tmp_path: Path, run: Run, version: str) -> None:
    with pytest.raises(ArchiveError, match="version"):
        pack_small(tmp_path, run, version=version)


def test_an_archive_that_exists_is_replaced_only_when_forced(tmp_path: Path, run: Run) -> None:
    first = pack_small(tmp_path, run)
    content = first.path.read_bytes()
    with pytest.raises(ArchiveError, match=r"m\.mar exists; pass --force"):
        pack_small(tmp_path, run, version="2.0")
    assert first.path.read_bytes() == content
    pack_small(tmp_path, run, version="2.0", force=True)
    assert read_manifest(first.path).version == "2.0"


def test_out_may_be_the_file_itself(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "deep/er/other.mar"
    assert pack_small(tmp_path, run, out=out).path == out
    assert read_manifest(out).name == "m"


def test_two_files_of_one_name_are_refused(tmp_path: Path, run: Run) -> None:
    twin = tmp_path / "twin" / "model.pt"
    twin.parent.mkdir()
    twin.write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"two files would be model\.pt") as caught:
        pack_small(tmp_path, run, files=[{"from": str(twin), "to": "model.pt"}])
    assert str(twin) in caught.value.found
    assert str(run.model_path) in caught.value.found
    assert not (tmp_path / "store").exists()


def test_a_file_under_the_name_of_one_that_marwright_writes_is_refused(
    tmp_path: Path, run: Run
) -> None:
    mine = tmp_path / "model-config.yaml"
    mine.write_text("batchSize: 4")
    with pytest.raises(ArchiveError, match=r"two files would be model-config\.yaml"):
        pack_small(tmp_path, run, files=["model-config.yaml"])


@pytest.mark.parametrize("extra", ["absent.txt", "dangling"])
def test_an_extra_file_that_is_no_file_is_refused(tmp_path: Path, run: Run, extra: str) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ArchiveError, match="there is no file"):
        pack_small(tmp_path, run, files=[extra])
    assert not (tmp_path / "store").exists()


def test_a_handler_that_no_worker_could_load_leaves_no_file(tmp_path: Path, run: Run) -> None:
    handler = write_handler(tmp_path, "import no_such_module\n" + HANDLER)
    with pytest.raises(ArchiveError, match=r"handler\.py:1.*no_such_module"):
        pack_small(tmp_path, run, handler=handler)
    assert not (tmp_path / "store").exists()


def test_local_modules_are_packed_in_their_folders(tmp_path: Path, run: Run) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("from . import part")
    (tmp_path / "package/part.py").write_text("import helper, namespace.far")
    (tmp_path / "namespace").mkdir()
    (tmp_path / "namespace/far.py").write_text("import helper")
    (tmp_path / "package/notes.txt").write_text("data of the package")
    (tmp_path / "helper.py").write_text("x = 1")
    handler = write_handler(tmp_path, "import package\n" + HANDLER)
    assert set(read_members(pack_small(tmp_path, run, handler=handler).path)) == {
        "handler.py",
        "helper.py",
        "namespace/far.py",
        "package/__init__.py",
        "package/part.py",
        "package/notes.txt",
        "model.pt",
        "model-config.yaml",
        "MAR-INF/bom.cdx.json",
        "MAR-INF/provenance.json",
        "MAR-INF/spec.json",
        MANIFEST_NAME,
    }


def test_a_store_that_cannot_be_written_is_a_storage_error(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*m\.mar"):
        pack_small(tmp_path, run, out=tmp_path / "file" / "store")
    with pytest.raises(StorageError, match="too long"):
        pack_small(tmp_path, run, name="m" * 300)


def test_a_full_disk_leaves_the_old_archive_as_it_was(packed: Packed, run: Run) -> None:
    before = packed.path.read_bytes()
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from marwright.archive import Run, pack_run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "pack_run(Run.open(Path(sys.argv[1])), out=Path(sys.argv[2]), force=True, preflight=None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, run.path, packed.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StorageError: cannot write" in done.stderr
    assert packed.path.read_bytes() == before
    assert [path.name for path in packed.path.parent.iterdir()] == ["cnn.mar"]


def test_a_folder_in_the_place_of_the_archive_stays(tmp_path: Path, run: Run) -> None:
    (tmp_path / "store/m.mar").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*m\.mar"):
        pack_small(tmp_path, run, force=True)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["m.mar"]


def test_an_archive_is_readable_by_whom_the_umask_allows(
    umask: Umask, tmp_path: Path, run: Run
) -> None:
    with umask(0o027):
        packed = pack_small(tmp_path, run)
    assert packed.path.stat().st_mode & 0o777 == 0o640


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Run:
    """The run with an ONNX file that optimising chose; tests leave it as it is."""
    from marwright.training.forms import export_model
    from marwright.training.network import load_network

    folder = Path(shutil.copytree(run.path, tmp_path_factory.mktemp("runs") / "run"))
    (folder / "optimised").mkdir()
    path = folder / "optimised/small.onnx"
    export_model(load_network(run), "onnx", path, torch.zeros(2, 3, *run.image_size))
    note = {"variant": "small", "file": "small.onnx", "backend": "onnx"}
    (folder / "optimised/chosen.json").write_text(json.dumps(note), encoding="utf-8")
    return Run.open(folder)


def test_the_chosen_file_is_packed_and_answers_in_the_preflight(
    tmp_path: Path, optimised: Run
) -> None:
    packed = pack_run(optimised, out=tmp_path, optimised=True)
    members = read_members(packed.path)
    assert members["small.onnx"] == (optimised.path / "optimised/small.onnx").read_bytes()
    assert "model.pt" not in members
    assert members["reference.npz"] == (optimised.path / "reference.npz").read_bytes()
    assert packed.figures["load_seconds"] > 0
    assert not packed.findings


def test_as_trained_the_own_model_of_the_run_is_packed(
    tmp_path: Path, optimised: Run, packed: Packed
) -> None:
    own = pack_run(optimised, out=tmp_path / "own", preflight=None)
    assert own.sha256 == packed.sha256
    assert "model.pt" in read_members(own.path)


def test_a_chosen_file_that_is_gone_is_told_and_leaves_no_archive(
    tmp_path: Path, optimised: Run
) -> None:
    folder = Path(shutil.copytree(optimised.path, tmp_path / "run"))
    (folder / "optimised/small.onnx").unlink()
    with pytest.raises(RunError, match=r"small\.onnx is missing.*pack --as-trained"):
        pack_run(Run.open(folder), out=tmp_path / "store", optimised=True)
    assert not (tmp_path / "store").exists()
    pack_run(Run.open(folder), out=tmp_path / "store", preflight=None)


def test_a_chosen_file_that_is_broken_leaves_no_archive(tmp_path: Path, optimised: Run) -> None:
    folder = Path(shutil.copytree(optimised.path, tmp_path / "run"))
    content = (folder / "optimised/small.onnx").read_bytes()
    (folder / "optimised/small.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArchiveError):
        pack_run(Run.open(folder), out=tmp_path / "store", optimised=True)
    assert not (tmp_path / "store").exists()
