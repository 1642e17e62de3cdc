from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marwright.archive import Run, pack_run
from marwright.archive.digests import digest_stream
from marwright.archive.manifest import MANIFEST_NAME, Manifest
from marwright.archive.member import Member
from marwright.archive.signature import signature_path
from marwright.archive.store import FOLDER, Store, Stored
from marwright.archive.writer import Format, write_archive
from marwright.errors import ArchiveError, StorageError, UsageError
from marwright.server import TorchServe


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder beside it."""
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def write(
    path: Path,
    version: str = "1.0",
    *,
    name: str = "cnn",
    content: bytes = b"def handle(data, context): ...\n",
    format: Format = "zip",
) -> Path:
    members = [
        Member(MANIFEST_NAME, Manifest(name, version, "h.py").to_json()),
        Member("h.py", content),
    ]
    write_archive(path, members, format=format, top=name)
    return path


def list_files(store: Store) -> list[str]:
    """Return every file below the store's folder but the lock."""
    paths = store.folder.rglob("*")
    names = (path.relative_to(store.folder).as_posix() for path in paths if path.is_file())
    return sorted(name for name in names if not name.endswith(".lock"))


def add(store: Store, scratch: Path, version: str, **options: str) -> Stored:
    return store.add(write(scratch / "cnn.mar", version), **options)  # type: ignore[arg-type]


def test_an_archive_gets_the_name_of_its_content_and_a_plain_one(
    store: Store, scratch: Path
) -> None:
    archive = write(scratch / "whatever.mar")
    with archive.open("rb") as stream:
        digest = digest_stream(stream)
    stored = store.add(archive)
    assert stored.path.name == f"cnn-1.0-{digest[:12]}.mar"
    assert (stored.model, stored.version, stored.names) == ("cnn", "1.0", ("cnn.mar",))
    assert (
        stored.path.read_bytes() == (store.folder / "cnn.mar").read_bytes() == archive.read_bytes()
    )
    assert list_files(store) == [f"{FOLDER}/{stored.path.name}", "cnn.mar"]


def test_the_plain_name_follows_what_was_added_last_and_the_others_stay(
    store: Store, scratch: Path
) -> None:
    first, second = add(store, scratch, "1.0"), add(store, scratch, "2.0")
    assert [(item.version, item.names) for item in store.list()] == [
        ("2.0", ("cnn.mar",)),
        ("1.0", ()),
    ]
    back = store.add(first.path)
    assert (back.path, back.names) == (first.path, ("cnn.mar",))
    assert [item.path for item in store.list()] == [first.path, second.path]
    assert len(list_files(store)) == 3


def test_whoever_writes_through_a_plain_name_changes_nothing_that_is_stored(
    store: Store, scratch: Path
) -> None:
    first = add(store, scratch, "1.0")
    with (store.folder / "cnn.mar").open("r+b") as stream:  # as cp and torch-model-archiver do
        stream.write(b"overwritten")
    assert first.is_whole()
    assert store.add(first.path, force=True).names == ("cnn.mar",)


def test_what_is_stored_cannot_be_written_by_accident(store: Store, scratch: Path) -> None:
    assert stat.S_IMODE(add(store, scratch, "1.0").path.stat().st_mode) & 0o222 == 0


def test_what_stood_under_the_plain_name_is_stored_first(store: Store, scratch: Path) -> None:
    write(store.folder / "cnn.mar", "1.0")
    assert store.list_plain() == {"cnn.mar": None}
    add(store, scratch, "2.0")
    assert [item.version for item in store.list()] == ["2.0", "1.0"]


def test_an_archive_that_is_in_the_store_is_stored_under_its_own_name(store: Store) -> None:
    stored = store.add(write(store.folder / "cnn.mar"))
    assert store.list_plain() == {"cnn.mar": stored.path}


def test_the_same_archive_twice_is_stored_once(store: Store, scratch: Path) -> None:
    assert add(store, scratch, "1.0").path == add(store, scratch, "1.0").path
    assert len(store.list()) == 1


def test_two_plain_names_let_a_server_hold_two_versions(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    add(store, scratch, "2.0", name="cnn-2.0.mar")
    assert [item.names for item in store.list()] == [("cnn-2.0.mar",), ("cnn.mar",)]


def test_a_tar_file_keeps_its_ending(store: Store, scratch: Path) -> None:
    stored = store.add(write(scratch / "a.tar.gz", format="tgz"))
    assert stored.path.name.endswith(".tar.gz")
    assert stored.names == ("cnn.tar.gz",)


def test_a_signature_comes_along_and_an_old_one_goes(store: Store, scratch: Path) -> None:
    archive = write(scratch / "cnn.mar")
    signature_path(archive).write_text("{}", encoding="utf-8")
    stored = store.add(archive)
    assert stored.signed
    assert signature_path(store.folder / "cnn.mar").exists()
    signature_path(archive).unlink()
    assert not add(store, scratch, "2.0").signed
    assert not signature_path(store.folder / "cnn.mar").exists()
    assert signature_path(stored.path).exists()
    store.add(stored.path)
    assert signature_path(store.folder / "cnn.mar").exists()


@pytest.mark.parametrize("name", ["../x.mar", "/x.mar", "a/b.mar", ".x.mar", "x", "x.tar.gz"])
def test_a_plain_name_that_no_server_reads_is_refused(
    store: Store, scratch: Path, name: str
) -> None:
    archive = write(scratch / "cnn.mar")
    with pytest.raises(UsageError, match=r"ends in \.mar"):
        store.add(archive, name=name)
    assert not list_files(store)


def test_the_plain_name_of_another_model_is_not_taken(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    other = write(scratch / "other.mar", name="other")
    with pytest.raises(StorageError, match="expected other, found cnn; choose another name"):
        store.add(other, name="cnn.mar")
    assert store.add(other, name="cnn.mar", force=True).names == ("cnn.mar",)
    assert [item.model for item in store.list()] == ["cnn", "other"]


@pytest.mark.parametrize("make", ["file", "folder", "link"])
def test_what_is_no_archive_under_the_plain_name_is_not_replaced(
    store: Store, scratch: Path, make: str
) -> None:
    plain = store.folder / "cnn.mar"
    if make == "file":
        plain.write_text("mine", encoding="utf-8")
    elif make == "folder":
        plain.mkdir()
    else:
        plain.symlink_to("nowhere")
    with pytest.raises(StorageError, match="something else than an archive"):
        add(store, scratch, "1.0")
    assert list_files(store) == (["cnn.mar"] if make == "file" else [])


def test_what_is_no_archive_or_no_store_is_refused(store: Store, scratch: Path) -> None:
    (scratch / "text.mar").write_text("text", encoding="utf-8")
    for path in (scratch / "text.mar", scratch / "absent.mar"):
        with pytest.raises(ArchiveError, match="archive"):
            store.add(path)
    with pytest.raises(UsageError, match="is a folder"):
        store.add(write(scratch / "unpacked", format="folder"))
    for path in (scratch / "absent", scratch / "text.mar"):
        with pytest.raises(StorageError, match="there is no store"):
            Store(path)
    assert not list_files(store)


def test_an_archive_is_found_by_name_version_or_key(store: Store, scratch: Path) -> None:
    first = add(store, scratch, "1.0")
    add(store, scratch, "2.0")
    for key in (first.path.name, "cnn-1.0", first.key, first.key[:6]):
        assert store.find(key).path == first.path
    for key in ("cnn-3.0", "cnn", first.key[:2], ""):
        with pytest.raises(StorageError, match="holds no archive"):
            store.find(key)


def test_several_of_one_version_are_told_apart_by_their_keys(store: Store, scratch: Path) -> None:
    first = add(store, scratch, "1.0")
    second = store.add(write(scratch / "cnn.mar", content=b"def handle(d, c): return d\n"))
    with pytest.raises(StorageError, match=r"several archives cnn-1\.0") as caught:
        store.find("cnn-1.0")
    assert first.path.name in caught.value.found
    assert second.path.name in caught.value.found


def test_what_is_needed_is_removed_only_when_forced(store: Store, scratch: Path) -> None:
    first = add(store, scratch, "1.0")
    with pytest.raises(StorageError, match=r"cnn\.mar has the same content; it is the last of cnn"):
        store.remove(first.key)
    add(store, scratch, "2.0")
    with pytest.raises(StorageError, match="a server uses it"):
        store.remove(first.key, in_use={("cnn", "1.0")})
    assert store.remove(first.key) == first.path
    assert [item.version for item in store.list()] == ["2.0"]
    store.remove("cnn-2.0", force=True)
    assert store.list() == ()


def test_a_plain_name_is_removed_only_where_its_content_is_stored(
    store: Store, scratch: Path
) -> None:
    add(store, scratch, "1.0")
    write(store.folder / "loose.mar", "2.0")
    with pytest.raises(StorageError, match="its content is not stored"):
        store.remove("loose.mar")
    with pytest.raises(StorageError, match="a server uses it"):
        store.remove("cnn.mar", in_use={("cnn", "1.0")})
    store.remove("cnn.mar")
    store.remove("loose.mar", force=True)
    assert store.list_plain() == {}
    assert [item.version for item in store.list()] == ["1.0"]


def test_gc_keeps_the_newest_and_all_that_is_needed(store: Store, scratch: Path) -> None:
    items = {version: add(store, scratch, version) for version in ("1", "2", "3", "4", "5")}
    for age, version in enumerate(("5", "4", "3", "2", "1")):
        os.utime(items[version].path, (1_000_000 - age, 1_000_000 - age))
    store.add(write(scratch / "other.mar", name="other"))
    store.add(items["1"].path, name="pinned.mar")
    os.utime(items["1"].path, (0, 0))
    told = store.gc(keep=2, in_use={("cnn", "2")}, dry_run=True)
    assert [item.version for item in told] == ["3"]
    assert items["3"].path.exists()
    assert store.gc(keep=2, in_use={("cnn", "2")}) == told
    assert [item.version for item in store.list()] == ["5", "4", "2", "1", "1.0"]


def test_gc_removes_what_a_killed_process_left(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    (store.folder / FOLDER / ".cnn-2.0.mar.x1y2z3").write_bytes(b"half")
    assert len(store.list()) == 1
    assert store.gc(keep=1) == ()
    assert len(list_files(store)) == 2


def test_a_damaged_archive_is_told_and_healed_by_adding_it_again(
    store: Store, scratch: Path
) -> None:
    stored = add(store, scratch, "1.0")
    stored.path.chmod(0o644)
    stored.path.write_bytes(b"damaged")
    (listed,) = store.list()
    assert (listed.model, listed.version, listed.is_whole()) == ("cnn-1.0", "", False)
    assert add(store, scratch, "1.0").is_whole()


def test_a_store_that_cannot_be_written_is_listed(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    (store.folder / FOLDER / ".lock").unlink()
    (store.folder / FOLDER).chmod(0o555)
    assert len(store.list()) == 1
    (store.folder / FOLDER).chmod(0o755)


def test_processes_that_add_at_once_lose_nothing(store: Store, scratch: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from marwright.archive.store import Store\n"
        "for path in sys.argv[2:]: Store(Path(sys.argv[1])).add(Path(path))"
    )
    archives = [write(scratch / f"{number}.mar", f"{number % 6}.0") for number in range(12)]
    processes = [
        subprocess.Popen([sys.executable, "-c", script, store.folder, *archives[start::3]])
        for start in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(item.version for item in store.list()) == [f"{number}.0" for number in range(6)]
    assert all(item.is_whole() for item in store.list())
    assert list(store.list_plain().values()) != [None]
    assert len(list_files(store)) == 7


def test_who_changes_a_store_waits_for_who_is_at_it(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    script = (
        "import sys; from pathlib import Path; from marwright.archive.store import Store\n"
        "store = Store(Path(sys.argv[1])); print(len(store.list()), flush=True)\n"
        "store.remove('cnn.mar')"
    )
    with (store.folder / FOLDER / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", script, store.folder], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"  # to read needs no lock
        time.sleep(0.5)
        assert (process.poll(), (store.folder / "cnn.mar").exists()) == (None, True)
    process.communicate()
    assert (process.returncode, (store.folder / "cnn.mar").exists()) == (0, False)


def test_a_full_disk_leaves_the_store_as_it_was(store: Store, scratch: Path) -> None:
    add(store, scratch, "1.0")
    before = list_files(store)
    big = write(scratch / "big.mar", "2.0", content=b"#" * 200_000)
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from marwright.archive.store import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "Store(Path(sys.argv[1])).add(Path(sys.argv[2]))"
    )
    answer = subprocess.run(
        [sys.executable, "-B", "-c", script, store.folder, big],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StorageError: cannot write" in answer.stderr
    assert list_files(store) == before


@pytest.mark.server
def test_a_torchserve_that_loads_all_models_passes_the_stored_ones_over(
    store: Store, run: Run, scratch: Path
) -> None:
    for version in ("1.0", "2.0"):
        store.add(pack_run(run, out=scratch / "cnn.mar", version=version, force=True).path)
    properties = {"load_models": "all", "model_store": str(store.folder)}
    with TorchServe(store.folder, properties=properties) as server:
        deadline = time.monotonic() + 60
        while not (models := server.client.models.list()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [model.name for model in models] == ["cnn"]
        versions = server.client.models.versions("cnn")
        assert [(item.version, item.archive) for item in versions] == [("2.0", "cnn.mar")]
        assert FOLDER not in server.log_file.read_text("utf-8").replace(str(store.folder), "")
