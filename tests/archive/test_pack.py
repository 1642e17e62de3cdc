from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from marwright.archive import Archive, ModelSettings, Packed, Run, pack_files, pack_run
from marwright.archive.manifest import MANIFEST_NAME
from marwright.errors import ArchiveError, HandlerError, StorageError, UsageError

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


def pack_small(folder: Path, run: Run, **options: Any) -> Packed:
    if "handler" not in options:
        options["handler"] = write_handler(folder)
    small = {
        "name": "m",
        "version": "1.0",
        "serialized_file": run.model_path,
        "out": folder / "store",
    }
    return pack_files(**{**small, **options})


def test_two_packs_of_one_run_are_identical(
    umask: Umask, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with umask(0o022):
        first = pack_run(run, out=tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    with umask(0o077):
        second = pack_run(run, out=Path("b.mar"))
    monkeypatch.undo()
    time.tzset()
    assert first.path.read_bytes() == (tmp_path / "elsewhere/b.mar").read_bytes()
    assert first.sha256 == second.sha256


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
    assert members["classes.json"] == (run.path / "classes.json").read_bytes()
    for name in ("image_classifier.py", "image_input.py"):
        assert members[name] == (root / "handlers" / name).read_bytes()
    assert yaml.safe_load(members["model-config.yaml"])["handler"] == {"image_size": [24, 24]}


def test_settings_given_override_and_the_image_size_of_the_run_stays(
    tmp_path: Path, run: Run
) -> None:
    packed = pack_run(run, out=tmp_path, settings={"batchSize": 3, "handler": {"top_k": 2}})
    values = yaml.safe_load(read_members(packed.path)["model-config.yaml"])
    assert values["batchSize"] == 3
    assert values["handler"] == {"image_size": [24, 24], "top_k": 2}


def test_a_handler_section_left_empty_means_the_defaults(tmp_path: Path, run: Run) -> None:
    packed = pack_run(run, out=tmp_path, settings={"handler": None})
    values = yaml.safe_load(read_members(packed.path)["model-config.yaml"])
    assert values["handler"] == {"image_size": [24, 24]}


@pytest.mark.parametrize("values", [{"handler": 5}, {"handler": ["top_k"]}, {"batch_size": 4}])
def test_settings_that_cannot_be_used_leave_no_file(
    tmp_path: Path, run: Run, values: dict[str, Any]
) -> None:
    with pytest.raises(ArchiveError, match="the model's settings"):
        pack_run(run, out=tmp_path / "store", settings=values)
    assert not list(tmp_path.iterdir())


def test_content_equals_what_torch_model_archiver_makes(
    tmp_path: Path, run: Run, root: Path
) -> None:
    settings = tmp_path / "model-config.yaml"
    settings.write_bytes(ModelSettings().to_yaml())
    extra = [run.path / "classes.json", root / "handlers/image_input.py"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "scratch").mkdir()
    files = {
        "--serialized-file": run.model_path,
        "--handler": root / "handlers/image_classifier.py",
        "--extra-files": ",".join(map(str, extra)),
        "--config-file": settings,
        "--export-path": tmp_path / "theirs",
    }
    options = [str(part) for pair in files.items() for part in pair]
    archiver = Path(sys.executable).with_name("torch-model-archiver")
    subprocess.run(
        [archiver, "--model-name", "cnn", "--version", "1.0", *options],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        check=True,
        capture_output=True,
    )
    ours = pack_files(
        name="cnn",
        version="1.0",
        handler="image_classifier",
        serialized_file=run.model_path,
        extra_files=extra[:1],
        out=tmp_path / "ours",
    )
    expected, found = read_members(tmp_path / "theirs/cnn.mar"), read_members(ours.path)
    manifests = [json.loads(members.pop(MANIFEST_NAME)) for members in (expected, found)]
    assert expected == found
    theirs, mine = ({**manifest, "createdOn": ""} for manifest in manifests)
    assert theirs == mine


def test_source_date_epoch_is_the_time_of_everything(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    packed = pack_small(tmp_path, run)
    assert Archive.open(packed.path).manifest.created_on == "14/11/2023 22:13:20"
    with zipfile.ZipFile(packed.path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_a_time_before_zip_files_becomes_the_first_they_can_state(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = pack_small(tmp_path / "a", run)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert pack_small(tmp_path / "b", run).sha256 == fixed.sha256


def test_the_last_time_that_a_zip_file_can_state_is_taken(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "4354819199")
    assert "31/12/2107" in Archive.open(pack_small(tmp_path, run).path).manifest.created_on


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
    with pytest.raises(UsageError, match="cannot be used in a URL"):
        pack_small(tmp_path, run, name=name)
    with pytest.raises(UsageError, match="cannot be used in a URL"):
        pack_small(tmp_path, run, version=name)


def test_an_archive_that_exists_is_replaced_only_when_forced(tmp_path: Path, run: Run) -> None:
    first = pack_small(tmp_path, run)
    content = first.path.read_bytes()
    with pytest.raises(UsageError, match=r"m\.mar exists; pass --force"):
        pack_small(tmp_path, run, version="2.0")
    assert first.path.read_bytes() == content
    pack_small(tmp_path, run, version="2.0", force=True)
    assert Archive.open(first.path).manifest.version == "2.0"


def test_out_may_be_the_file_itself(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "deep/er/other.mar"
    assert pack_small(tmp_path, run, out=out).path == out
    assert Archive.open(out).manifest.name == "m"


def test_two_files_of_one_name_are_refused(tmp_path: Path, run: Run) -> None:
    twin = tmp_path / "twin" / "model.pt"
    twin.parent.mkdir()
    twin.write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"two files would be model\.pt") as caught:
        pack_small(tmp_path, run, extra_files=[twin])
    assert str(twin) in caught.value.found
    assert str(run.model_path) in caught.value.found
    assert not (tmp_path / "store").exists()


def test_a_file_under_the_name_of_one_that_marwright_writes_is_refused(
    tmp_path: Path, run: Run
) -> None:
    mine = tmp_path / "model-config.yaml"
    mine.write_text("batchSize: 4")
    with pytest.raises(ArchiveError, match=r"two files would be model-config\.yaml"):
        pack_small(tmp_path, run, extra_files=[mine])


@pytest.mark.parametrize("extra", ["absent.txt", "."])
def test_an_extra_file_that_is_no_file_is_refused(tmp_path: Path, run: Run, extra: str) -> None:
    with pytest.raises(ArchiveError, match="there is no file"):
        pack_small(tmp_path, run, extra_files=[tmp_path / extra])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", [None, b"these are no weights", "half"])
def test_weights_that_do_not_load_leave_no_file(
    tmp_path: Path, run: Run, content: bytes | str | None
) -> None:
    weights = tmp_path / "model.pt"
    if content is not None:
        whole = run.model_path.read_bytes()
        weights.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    (tmp_path / "store").mkdir()
    with pytest.raises(ArchiveError, match=r"the weights .*model\.pt do not load"):
        pack_small(tmp_path, run, serialized_file=weights)
    assert not list((tmp_path / "store").iterdir())


def test_a_handler_that_no_worker_could_load_leaves_no_file(tmp_path: Path, run: Run) -> None:
    handler = write_handler(tmp_path, "import no_such_module\n" + HANDLER)
    with pytest.raises(HandlerError, match=r"'no_such_module' at handler\.py:1"):
        pack_small(tmp_path, run, handler=handler)
    assert not (tmp_path / "store").exists()


def test_local_modules_are_packed_in_their_folders(tmp_path: Path, run: Run) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("from . import part")
    (tmp_path / "package/part.py").write_text("import helper, namespace.far")
    (tmp_path / "namespace").mkdir()
    (tmp_path / "namespace/far.py").write_text("import helper")
    (tmp_path / "package/notes.txt").write_text("not imported")
    (tmp_path / "helper.py").write_text("x = 1")
    handler = write_handler(tmp_path, "import package\n" + HANDLER)
    assert set(read_members(pack_small(tmp_path, run, handler=handler).path)) == {
        "handler.py",
        "helper.py",
        "namespace/far.py",
        "package/__init__.py",
        "package/part.py",
        "model.pt",
        "model-config.yaml",
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
        "pack_run(Run.open(Path(sys.argv[1])), out=Path(sys.argv[2]), force=True)\n"
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
