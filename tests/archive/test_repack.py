from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marwright.archive import Archive, Arguments, Packed, Run, Spec, pack_run, pack_spec
from marwright.archive.checks.integrity import verify_digests
from marwright.archive.diff import Difference
from marwright.archive.manifest import MANIFEST_NAME
from marwright.archive.member import PROVENANCE_NAME
from marwright.archive.pack import pack_arguments
from marwright.archive.repack import Changes, repack
from marwright.archive.settings import change_settings
from marwright.errors import ArchiveError, HandlerError, UsageError
from marwright.server import TorchServe, register

HANDLER = "def handle(data, context):\n    return [b''] * len(data)\n"


@pytest.fixture(autouse=True)
def _unset_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def write_files(folder: Path, **files: Any) -> Path:
    """Write files, `handler_py=` as handler.py, into a new folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def save_weights(value: float) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.full((1_000,), value)}, stream)
    return stream.getvalue()


def pack_small(folder: Path, **values: Any) -> Packed:
    """Pack a spec of handler.py and model.pt in the folder."""
    spec = Spec.create(**{"name": "m", "handler": "handler.py", "model": "model.pt", **values})
    return pack_spec(spec, folder=folder, out=folder / "m.mar", preflight=None, force=True)


def change(packed: Packed | Path, **changes: Any) -> Packed:
    path = packed if isinstance(packed, Path) else packed.path
    return repack(path, Changes(**changes), out=path.with_name("new.mar"), preflight=None)


def archive(folder: Path, **flags: str) -> Path:
    """Pack with the real torch-model-archiver, which compresses."""
    program = Path(sys.executable).with_name("torch-model-archiver")
    options = {"model-name": "m", "version": "1.0", "handler": "handler.py", **flags}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    subprocess.run([program, *words], cwd=folder, check=True, capture_output=True)
    return folder / "m.mar"


def read_members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


def test_other_settings_give_what_packing_with_them_gives(run: Run, tmp_path: Path) -> None:
    packed = pack_run(run, out=tmp_path / "a.mar", preflight=None)
    changes = {"jobQueueSize": 7, "batchSize": 4, "handler.threads": 2, "handler.top_k": 3}
    again = change(packed, settings=changes)
    settings = {"jobQueueSize": 7, "batchSize": 4, "handler": {"threads": 2, "top_k": 3}}
    fresh = pack_run(run, out=tmp_path / "b.mar", settings=settings, preflight=None)
    assert again.path.read_bytes() == fresh.path.read_bytes()


def test_another_version_gives_what_packing_that_version_gives(run: Run, tmp_path: Path) -> None:
    packed = pack_run(run, out=tmp_path / "a.mar", preflight=None)
    fresh = pack_run(run, out=tmp_path / "b.mar", version="2.0", preflight=None)
    assert change(packed, version="2.0").path.read_bytes() == fresh.path.read_bytes()


def test_another_handler_gives_what_packing_with_it_gives(tmp_path: Path) -> None:
    files = {
        "model_pt": save_weights(1),
        "handler_py": "import old_part, shared\n" + HANDLER,
        "old_part_py": "import old_deep\n",
        "old_deep_py": "",
        "shared_py": "x = 1\n",
    }
    packed = pack_small(write_files(tmp_path / "old", **files))
    new = {
        "handler_py": "import new_part, shared\n" + HANDLER,
        "new_part_py": "",
        "shared_py": "x = 2\n",
    }
    write_files(tmp_path / "new", model_pt=files["model_pt"], **new)
    fresh = pack_small(tmp_path / "new")
    again = change(packed, handler=str(tmp_path / "new/handler.py"))
    assert again.path.read_bytes() == fresh.path.read_bytes()


def test_other_weights_give_what_packing_them_gives(tmp_path: Path) -> None:
    old = write_files(tmp_path / "old", model_pt=save_weights(1), handler_py=HANDLER)
    new = write_files(tmp_path / "new", model_pt=save_weights(2), handler_py=HANDLER)
    again = change(pack_small(old), add={"model.pt": new / "model.pt"})
    assert again.path.read_bytes() == pack_small(new).path.read_bytes()


def test_other_requirements_are_in_the_bill_of_materials(tmp_path: Path) -> None:
    files = {"model_pt": save_weights(1), "handler_py": HANDLER}
    old = write_files(tmp_path / "old", requirements_txt="numpy\n", **files)
    new = write_files(tmp_path / "new", requirements_txt="numpy\nscipy\n", **files)
    packed = pack_small(old, requirements="requirements.txt")
    again = change(packed, add={"requirements.txt": new / "requirements.txt"})
    fresh = pack_small(new, requirements="requirements.txt")
    assert again.path.read_bytes() == fresh.path.read_bytes()


def test_files_added_to_what_torch_model_archivers_flags_packed_equal_a_fresh_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"model_pt": save_weights(1), "handler_py": HANDLER, "a_txt": "a", "b_txt": "b"}
    monkeypatch.chdir(write_files(tmp_path / "files", **files))
    Path("out").mkdir()
    arguments = Arguments("m", "1.0", "handler.py", serialized_file="model.pt")
    small = pack_arguments(replace(arguments, extra_files="a.txt"), preflight=None)
    both = replace(arguments, extra_files="a.txt,b.txt", export_path="out")
    full = pack_arguments(both, preflight=None)
    assert change(small, add={"b.txt": Path("b.txt")}).path.read_bytes() == full.path.read_bytes()
    assert change(full, remove=("b.txt",)).path.read_bytes() == small.path.read_bytes()


def test_nothing_changed_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    packed = pack_run(run, out=tmp_path / "a.mar", preflight=None)
    assert change(packed).path.read_bytes() == packed.path.read_bytes()


def read_stored(path: Path, name: str) -> bytes:
    """Return a member's bytes as they stand in the file, compressed or not."""
    with zipfile.ZipFile(path) as file, path.open("rb") as stream:
        info = file.getinfo(name)
        stream.seek(info.header_offset + 26)
        skipped = int.from_bytes(stream.read(2), "little") + int.from_bytes(
            stream.read(2), "little"
        )
        stream.seek(skipped, os.SEEK_CUR)
        return stream.read(info.compress_size)


def test_what_an_archiver_compressed_is_copied_as_it_stands_and_gets_digests(
    tmp_path: Path,
) -> None:
    folder = write_files(tmp_path / "files", model_pt=save_weights(1), handler_py=HANDLER)
    old = archive(folder, **{"serialized-file": "model.pt"})
    again = change(old, settings={"batchSize": 2})
    assert len(read_stored(old, "model.pt")) < 4_000
    assert read_stored(again.path, "model.pt") == read_stored(old, "model.pt")
    with Archive.open(again.path) as opened:
        assert not verify_digests(opened)
    assert read_members(again.path)["model-config.yaml"] == b"batchSize: 2\n"
    difference = Difference.between(old, again.path)
    assert [file.name for file in difference.files] == [MANIFEST_NAME, "model-config.yaml"]


def test_a_tar_file_stays_one(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files", model_pt=save_weights(1), handler_py=HANDLER)
    archive(folder, **{"serialized-file": "model.pt", "archive-format": "tgz"})
    old = folder / "m.tar.gz"
    again = repack(old, Changes(version="2.0"), out=folder / "new.tar.gz", preflight=None)
    with Archive.open(again.path) as opened:
        assert opened.container.format == "tgz"
        assert opened.read("model.pt") == (folder / "model.pt").read_bytes()


def test_the_archives_own_place_is_taken_only_when_forced(tmp_path: Path) -> None:
    packed = pack_small(write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER))
    before = packed.path.read_bytes()
    with pytest.raises(ArchiveError, match=r"m\.mar exists; pass --force .*m-2\.0\.mar to keep"):
        repack(packed.path, Changes(version="2.0"), preflight=None)
    assert packed.path.read_bytes() == before
    again = repack(packed.path, Changes(version="2.0"), force=True, preflight=None)
    assert (again.path, again.version) == (packed.path, "2.0")


def test_what_a_new_handler_needs_of_the_archive_stays(tmp_path: Path) -> None:
    files = {"handler_py": "import part\n" + HANDLER, "part_py": "x = 1\n"}
    packed = pack_small(write_files(tmp_path / "old", model_pt=save_weights(1), **files))
    new = write_files(tmp_path / "new", other_py="import part\n" + HANDLER)
    members = read_members(change(packed, handler=str(new / "other.py")).path)
    assert members["part.py"] == b"x = 1\n"
    assert json.loads(members[MANIFEST_NAME])["model"]["handler"] == "other.py"
    assert "handler.py" not in members


def test_what_the_network_imports_stays(tmp_path: Path) -> None:
    net = "import torch\nimport part\n\n\nclass Net(torch.nn.Module):\n    pass\n"
    files = {"handler_py": "import part\n" + HANDLER, "part_py": "x = 1\n", "net_py": net}
    packed = pack_small(
        write_files(tmp_path / "old", model_pt=save_weights(1), **files),
        backend="eager",
        architecture="net.py",
    )
    new = write_files(tmp_path / "new", handler_py=HANDLER)
    again = change(packed, handler=str(new / "handler.py"))
    assert read_members(again.path)["part.py"] == b"x = 1\n"


def test_a_module_of_a_new_handler_replaces_no_file_of_somebody_elses(tmp_path: Path) -> None:
    files = {"model_pt": save_weights(1), "handler_py": HANDLER, "data_py": "x = 1\n"}
    packed = pack_small(write_files(tmp_path / "old", **files), files=["data.py"])
    new = write_files(tmp_path / "new", handler_py="import data\n" + HANDLER, data_py="x = 2\n")
    with pytest.raises(ArchiveError, match=r"two files would be data\.py .* --add"):
        change(packed, handler=str(new / "handler.py"))
    again = change(packed, handler=str(new / "handler.py"), add={"data.py": new / "data.py"})
    assert read_members(again.path)["data.py"] == b"x = 2\n"


def test_one_of_our_handlers_comes_by_its_name(tmp_path: Path, root: Path) -> None:
    files = {"model_pt": save_weights(1), "handler_py": HANDLER, "classes_json": "[]"}
    old = archive(write_files(tmp_path / "f", **files), **{"extra-files": "classes.json"})
    members = read_members(change(old, handler="image_classifier").path)
    for name in ("image_classifier.py", "image_input.py"):
        assert members[name] == (root / "handlers" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"settings": {"batch_size": 4}}, ArchiveError, "did you mean batchSize"),
        ({"settings": {"batchSize": "many"}}, ArchiveError, "batchSize: input should be"),
        ({"settings": {"batchSize": 0, "x": 1}}, ArchiveError, "batchSize: .*; x: no setting"),
        ({"settings": {"batchSize.x": 1}}, ArchiveError, "no mapping batchSize"),
        ({"settings": {"handler.top_k": 0}}, ArchiveError, r"handler\.top_k"),
        ({"settings": {"minWorkers": 4}}, ArchiveError, "maxWorkers 1 is below minWorkers 4"),
        ({"remove": ("absent",)}, ArchiveError, "has no member absent; marwright inspect"),
        ({"remove": ("model.pt",)}, ArchiveError, "cannot be removed: found a manifest that names"),
        ({"remove": (MANIFEST_NAME,)}, ArchiveError, "cannot be removed"),
        ({"add": {"x": Path("absent")}}, ArchiveError, "there is no file absent"),
        ({"add": {"x": Path()}}, ArchiveError, "found a folder"),
        ({"add": {"../x": Path(__file__)}}, ArchiveError, r"'\.\./x' cannot be a name"),
        ({"add": {"model.pt/x": Path(__file__)}}, ArchiveError, "a file and a folder"),
        ({"add": {MANIFEST_NAME: Path(__file__)}}, UsageError, "cannot be added"),
        ({"version": "1/0"}, ArchiveError, "cannot be used in a URL"),
        ({"handler": "absent.py"}, HandlerError, "no handler file absent"),
        ({"handler": "frobnicate"}, HandlerError, "image_classifier"),
    ],
)
def test_a_change_that_cannot_be_made_leaves_no_file(
    tmp_path: Path, changes: Mapping[str, Any], error: type[Exception], text: str
) -> None:
    folder = write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER)
    packed = pack_small(folder)
    with pytest.raises(error, match=text):
        change(packed, **changes)
    assert not (folder / "new.mar").exists()
    assert len(list(folder.iterdir())) == 3


def test_a_handler_that_no_worker_could_load_leaves_the_old_archive(tmp_path: Path) -> None:
    packed = pack_small(write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER))
    before = packed.path.read_bytes()
    new = write_files(tmp_path / "new", broken_py="def handle(:\n", crash_py="1 / 0\n" + HANDLER)
    with pytest.raises(HandlerError, match=r"broken\.py"):
        repack(packed.path, Changes(handler=str(new / "broken.py")), force=True)
    with pytest.raises(ArchiveError, match="ZeroDivisionError"):
        repack(packed.path, Changes(handler=str(new / "crash.py")), force=True)
    assert packed.path.read_bytes() == before


def test_what_is_no_file_that_can_be_copied_is_refused(tmp_path: Path) -> None:
    packed = pack_small(write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER))
    with Archive.open(packed.path) as opened:
        folder = opened.extract(tmp_path / "unpacked")
    with pytest.raises(UsageError, match="is a folder; change the files in it"):
        repack(folder, Changes(version="2.0"), out=tmp_path / "new.mar", preflight=None)
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(packed.path, "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match=r"is not packed again: .* link: link"):
        change(packed, version="2.0")


def test_a_member_that_was_altered_keeps_its_digest_and_so_is_found(tmp_path: Path) -> None:
    packed = pack_small(write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER))
    content = packed.path.read_bytes()
    altered = content.replace(save_weights(1)[-2_000:-1_900], bytes(100))
    packed.path.write_bytes(altered)
    with Archive.open(change(packed, version="2.0").path) as opened:
        assert [finding.member for finding in verify_digests(opened)] == ["model.pt"]


def test_a_damaged_member_gets_no_digest(tmp_path: Path) -> None:
    old = archive(
        write_files(tmp_path / "f", handler_py=HANDLER, a_txt=os.urandom(9_999)),
        **{"extra-files": "a.txt"},
    )
    stored = read_stored(old, "a.txt")
    content = old.read_bytes()
    at = content.index(stored)
    for position in (at + 5_000, at):
        old.write_bytes(content[:position] + b"\xff\xff\xff" + content[position + 3 :])
        with pytest.raises(ArchiveError, match="is damaged"):
            change(old, version="2.0")
    assert not (tmp_path / "f/new.mar").exists()


def test_the_origin_of_replaced_files_is_not_claimed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "f", model_pt=save_weights(1), handler_py=HANDLER)
    (folder / "model.yaml").write_text("name: m\nhandler: handler.py\nmodel: model.pt\n")
    (folder / "report.json").write_text('{"accuracy": 0.9}')
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    spec = Spec.read(folder / "model.yaml").override(report="report.json", dataset={"name": "d"})
    packed = pack_spec(
        spec, folder=folder, path=folder / "model.yaml", out=folder / "m.mar", preflight=None
    )
    new = write_files(tmp_path / "new", handler_py=HANDLER + "# new\n", model_pt=save_weights(2))
    again = change(packed, handler=str(new / "handler.py"))
    provenance = json.loads(read_members(again.path)[PROVENANCE_NAME])
    assert provenance["source"]["outside"] == ["handler.py"]
    assert provenance["training"] == {"report": {"accuracy": 0.9}}
    (again.path).unlink()
    again = change(packed, add={"model.pt": new / "model.pt"})
    members = read_members(again.path)
    assert "training" not in json.loads(members[PROVENANCE_NAME])
    assert "dataset" not in json.loads(members["MAR-INF/spec.json"])


def test_what_the_author_should_know_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = archive(
        write_files(tmp_path / "f", handler_py="import part\n" + HANDLER, part_py=""),
        **{"extra-files": "part.py"},
    )
    content = read_members(old)
    manifest = json.loads(content[MANIFEST_NAME])
    manifest["model"]["author"] = "me"
    with zipfile.ZipFile(old, "w") as file:
        for name, text in {**content, MANIFEST_NAME: json.dumps(manifest).encode()}.items():
            file.writestr(name, text)
    old.with_name("new.mar.sig").touch()
    change(old, handler=str(write_files(tmp_path / "new", handler_py=HANDLER) / "handler.py"))
    assert "since only the old handler used it: part.py" in caplog.text
    assert "left out of the manifest: model.author" in caplog.text
    assert "new.mar.sig is a signature of the old archive" in caplog.text


def test_a_full_disk_leaves_the_old_archive_as_it_was(packed: Packed) -> None:
    before = packed.path.read_bytes()
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from marwright.archive.repack import Changes, repack\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "repack(Path(sys.argv[1]), Changes(version='2'), force=True, preflight=None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, packed.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StorageError: cannot write" in done.stderr
    assert packed.path.read_bytes() == before
    assert [path.name for path in packed.path.parent.iterdir()] == ["cnn.mar"]


def test_settings_of_a_handlers_own_and_their_order_stay() -> None:
    before = {"own": {"b": 1}, "batchSize": 2, "handler": {"x": 1, "image_size": [1, 1]}}
    after = change_settings(
        before, {"minWorkers": 1, "handler.top_k": 2, "own.b": 3, "batchSize": None}
    )
    assert (
        yaml.safe_dump(after, sort_keys=False).split()
        == yaml.safe_dump(
            {
                "minWorkers": 1,
                "handler": {"image_size": [1, 1], "top_k": 2, "x": 1},
                "own": {"b": 3},
            },
            sort_keys=False,
        ).split()
    )
    assert before["own"] == {"b": 1}


def test_what_was_there_and_is_not_changed_is_not_judged() -> None:
    before = {"maxBatchDelay": 0, "minWorkers": 4, "handler": {"image_size": "large"}}
    assert change_settings(before, {"batchSize": 2})["maxBatchDelay"] == 0
    with pytest.raises(ArchiveError, match="maxBatchDelay"):
        change_settings(before, {"maxBatchDelay": -1})


@pytest.mark.server
def test_torchserve_serves_what_was_repacked_of_an_archivers_archive(
    server: TorchServe, run: Run, root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    siblings = set((root / "handlers").glob("[!_]*.py")) - {root / "handlers/image_classifier.py"}
    old = archive(
        folder,
        **{
            "model-name": "m",
            "handler": str(root / "handlers/image_classifier.py"),
            "serialized-file": str(run.model_path),
            "extra-files": ",".join(map(str, [run.path / "classes.json", *siblings])),
        },
    )
    settings = {"batchSize": 4, "maxBatchDelay": 5, "handler.image_size": list(run.image_size)}
    again = repack(old, Changes(settings=settings), out=folder / "repacked.mar")
    version = register(server.client, again.path)
    try:
        answer = server.client.predict("m", run.samples[0].path).json()
        assert next(iter(answer)) == run.samples[0].prediction
        assert version.batch_size == 4
    finally:
        server.client.models.unregister("m", "1.0")
        (server.store / "repacked.mar").unlink()
