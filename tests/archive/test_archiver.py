"""Every row: the same arguments to the real torch-model-archiver 0.12 and to `marwright pack`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from marwright.archive import Arguments
from marwright.archive.manifest import ARCHIVER_HANDLERS, MANIFEST_NAME

HANDLER = (
    "class Handler:\n"
    "    def initialize(self, context): ...\n"
    "    def handle(self, data, context): return ['ok'] * len(data)\n"
)
NETWORK = "import torch\n\n\nclass Network(torch.nn.Module): ...\n"
FILES = {
    "handler.py": HANDLER,
    "entry.py": "def serve(data, context): ...\n",
    "sub/other.py": HANDLER.replace("Handler", "Other"),
    "native.so": "not really",
    "network.py": NETWORK,
    "requirements.txt": "nothing==1.0\n",
    "deps/requirements-gpu.txt": "nothing==1.0\n",
    "config.yaml": "batchSize: 4\nmaxBatchDelay: 5\n",
    "conf/model-config.yml": "minWorkers: 1\nmaxWorkers: 1\n",
    "a.txt": "a",
    "b.txt": "b",
    "c.json": "{}",
    "with space.txt": "s",
    "ümläut.txt": "u",
    "index_to_name.json": '{"0": "zero"}',
    "folder/x.txt": "x",
    "folder/y.bin": "y",
    "folder/.hidden": "h",
    "folder/deep/er/z.txt": "z",
    "folder/deep/__pycache__/z.pyc": "p",
    "folder/__pycache__/z.pyc": "p",
    "folder/.git/config": "g",
    "folder/deep/.secret/s.txt": "s",
    "folder/__MACOSX/m.txt": "m",
    "folder/empty/.keep": "",
    "more/n.txt": "n",
    "more/a.txt": "another a",
    "twin/a.txt": "a",
}
TABLE = "docs/archiver-table.md"
BASE = "--model-name m --version 1.0"
PT = f"{BASE} --serialized-file model.pt"
ROWS = [
    # names, versions, short and cut forms
    f"{PT} --handler handler.py",
    "--model-name=m --version=1.0 --serialized-file=model.pt --handler=handler.py",
    "--model-name m -v 2.1 --serialized-file model.pt --handler handler.py -f",
    "--model-name m -v1.0 --handler handler.py -r requirements.txt -c config.yaml",
    "--model-n m --vers 1.0 --ser model.pt --ha handler.py --extra a.txt --exp out --a tgz",
    "--model-name A.b-c_9 --version 1.0+cu12 --handler handler.py",
    "--model-name m --version v1 --handler handler.py --force",
    # handlers
    *(f"{PT} --handler {name}" for name in sorted(ARCHIVER_HANDLERS)),
    f"{PT} --handler handler",
    f"{PT} --handler sub/other.py",
    f"{PT} --handler ./sub/other",
    f"{PT} --handler entry:serve",
    f"{PT} --handler sub/../handler.py",
    # eager, config, requirements
    f"{BASE} --model-file network.py --serialized-file model.pt --handler handler.py",
    f"{BASE} --handler handler.py",
    f"{PT} --handler handler.py --requirements-file deps/requirements-gpu.txt",
    f"{PT} --handler handler.py --config-file conf/model-config.yml",
    f"{PT} --handler handler.py --config-file ./config.yaml --requirements-file ./requirements.txt",
    # runtimes
    f"{PT} --handler handler.py --runtime python",
    f"{PT} --handler handler.py --runtime python3",
    f"{PT} --handler BaseHandler --runtime LSP",
    f"{PT} --handler TorchScriptHandler --runtime LSP",
    f"{PT} --handler native --runtime LSP",
    # formats and places
    f"{PT} --handler handler.py --archive-format default",
    f"{PT} --handler handler.py --archive-format zip-store",
    f"{PT} --handler handler.py --archive-format tgz --extra-files folder",
    f"{PT} --handler handler.py --archive-format no-archive --extra-files folder",
    f"{PT} --handler handler.py --export-path out",
    f"{PT} --handler handler.py --export-path out --archive-format tgz",
    f"{PT} --handler handler.py --export-path out/ --archive-format no-archive",
    f"{PT} --handler handler.py --archive-format no-archive -f",
    # extra files
    f"{PT} --handler handler.py --extra-files a.txt",
    f"{PT} --handler handler.py --extra-files a.txt,b.txt,c.json",
    f"{PT} --handler handler.py --extra-files a.txt,,b.txt,",
    f"{PT} --handler handler.py --extra-files 'with space.txt,ümläut.txt'",
    f"{PT} --handler handler.py --extra-files folder",
    f"{PT} --handler handler.py --extra-files folder/",
    f"{PT} --handler handler.py --extra-files ./folder,more,b.txt --model-file network.py",
    f"{PT} --handler handler.py --extra-files folder,c.json",
    f"{PT} --handler handler.py --extra-files '*.txt'",
    f"{PT} --handler handler.py --extra-files '[ab].txt'",
    f"{PT} --handler handler.py --extra-files '?.txt, *.json'",
    f"{PT} --handler handler.py --extra-files 'nothing*.csv,a.txt'",
    f"{PT} --handler handler.py --extra-files 'folder/*'",
    f"{PT} --handler handler.py --extra-files 'folder/**/*.txt'",
    f"{PT} --handler handler.py --extra-files a.txt,a.txt",
    f"{PT} --handler handler.py --extra-files a.txt,twin/a.txt",
    f"{PT} --handler handler.py --extra-files handler.py,model.pt",
    f"{PT} --handler image_classifier --extra-files index_to_name.json",
    # refused by both
    f"{PT}",
    "--model-name m --handler handler.py",
    "--version 1.0 --handler handler.py",
    f"{PT} --handler handler.py --archive-format rar",
    f"{PT} --handler handler.py --runtime ruby",
    f"{PT} --handler handler.py --frobnicate",
    f"{PT} --handler handler.py --model m",
    "--model-name a/b --version 1.0 --handler handler.py",
    f"{PT} --handler handler.py --export-path absent",
    f"{PT} --handler handler.py --export-path a.txt",
    f"{PT} --handler absent.py",
    f"{PT} --handler absent",
    f"{PT} --handler handler.py --extra-files absent.txt",
    f"{PT} --handler handler.py --config-file absent.yaml",
    f"{PT} --handler handler.py --requirements-file absent.txt",
    f"{PT} --handler handler.py --model-file absent.py",
    f"{BASE} --handler handler.py --serialized-file absent.pt",
    f"{BASE} --handler handler.py --serialized-file folder",
]
LOSSES = {
    f"{PT} --handler handler.py --extra-files a.txt,more/a.txt": "a.txt and more/a.txt",
    f"{PT} --handler handler.py --extra-files more,a.txt": "more/a.txt and a.txt",
    f"{PT} --handler handler.py --extra-files twin/a.txt,more": "twin/a.txt and more/a.txt",
}
"""Where torch-model-archiver keeps the last of two files and says nothing."""


@dataclass(frozen=True)
class Outcome:
    """What one command left."""

    status: int
    errors: str
    made: dict[str, dict[str, bytes]]
    """Content of every archive, by its path."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something of everything; each row works in a copy of links to it."""
    import torch

    folder = tmp_path_factory.mktemp("sources")
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "model.pt")
    (folder / "out").mkdir()
    return folder


def run_row(program: list[str], row: str, sources: Path, folder: Path) -> Outcome:
    (folder / "tmp").mkdir(parents=True)
    subprocess.run(["cp", "-r", f"{sources}/.", folder / "work"], check=True)
    done = subprocess.run(
        [*program, *shlex.split(row)],
        cwd=folder / "work",
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "MARWRIGHT_DEBUG": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(done.returncode, done.stderr, dict(find_archives(folder / "work", sources)))


def find_archives(work: Path, sources: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield every file or folder that was not there before, with its content."""
    for place in (work, work / "out"):
        for path in sorted(place.iterdir()):
            name = path.relative_to(work).as_posix()
            if not (sources / name).exists():
                yield name, read_archive(path)


def read_archive(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        files = [item for item in path.rglob("*") if item.is_file()]
        return {item.relative_to(path).as_posix(): item.read_bytes() for item in files}
    if path.suffix == ".gz":
        with tarfile.open(path) as tar:
            return {
                item.name: stream.read()
                for item in tar
                if (stream := tar.extractfile(item)) is not None
            }
    with zipfile.ZipFile(path) as archive:
        return {
            item.filename: archive.read(item) for item in archive.infolist() if not item.is_dir()
        }


def without_time(made: dict[str, dict[str, bytes]]) -> dict[str, dict[str, bytes]]:
    return {
        path: {
            name: json.dumps({**json.loads(content), "createdOn": ""}).encode()
            if name.endswith(MANIFEST_NAME)
            else content
            for name, content in members.items()
        }
        for path, members in made.items()
    }


ARCHIVER = [str(Path(sys.executable).with_name("torch-model-archiver"))]
MARWRIGHT = [sys.executable, "-m", "marwright", "pack"]


@pytest.fixture(scope="module")
def table(root: Path) -> Iterator[list[str]]:
    """Collect the comparison; WRITE_TABLE=1 writes it into the docs, which the rows then match."""
    lines: list[str] = []
    yield lines
    if os.environ.get("WRITE_TABLE"):
        path = root / TABLE
        head = path.read_text("utf-8").split("| arguments |")[0]
        rows = ["| arguments | status of both | archive of both |", "|---|---|---|", *lines, ""]
        path.write_text(head + "\n".join(rows), encoding="utf-8")


@pytest.mark.parametrize("row", ROWS)
def test_the_same_arguments_give_the_same_archive(
    row: str, sources: Path, tmp_path: Path, table: list[str], root: Path
) -> None:
    theirs = run_row(ARCHIVER, row, sources, tmp_path / "theirs")
    ours = run_row([*MARWRIGHT, "--no-preflight"], row, sources, tmp_path / "ours")
    assert ours.status == theirs.status, ours.errors
    assert "Traceback" not in ours.errors
    assert without_time(ours.made) == without_time(theirs.made)
    assert bool(ours.made) == (ours.status == 0)
    made = ", ".join(f"{path}, {len(files)} members" for path, files in ours.made.items())
    line = f"| `{row}` | {ours.status} | {made or 'none'} |"
    table.append(line)
    assert os.environ.get("WRITE_TABLE") or line in (root / TABLE).read_text("utf-8")


@pytest.mark.parametrize(("row", "both"), LOSSES.items())
def test_where_the_archiver_loses_a_file_pack_refuses_and_names_both(
    row: str, both: str, sources: Path, tmp_path: Path
) -> None:
    theirs = run_row(ARCHIVER, row, sources, tmp_path / "theirs")
    ours = run_row(MARWRIGHT, row, sources, tmp_path / "ours")
    assert theirs.status == 0
    assert ours.status == 1
    assert not ours.made
    assert f"two files would be a.txt inside the archive: found {both}" in ours.errors


def test_an_archive_that_exists_is_kept_unless_forced(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    row = shlex.split(f"{PT} --handler handler.py --extra-files a.txt")
    subprocess.run(["cp", "-r", f"{sources}/.", tmp_path / "work"], check=True)
    for program in (ARCHIVER, [*MARWRIGHT, "--no-preflight"]):
        archive = tmp_path / "work/m.mar"
        archive.write_bytes(b"old")
        statuses = []
        for force in ([], ["--force"]):
            done = subprocess.run(
                [*program, *row, *force],
                cwd=tmp_path / "work",
                env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
                capture_output=True,
                check=False,
            )
            statuses.append(done.returncode)
            assert (archive.read_bytes() == b"old") == (not force)
        assert statuses == [1, 0]


def test_the_table_has_at_least_forty_combinations() -> None:
    assert len(set(ROWS)) >= 40
    assert {f"--handler {name}" in " ".join(ROWS) for name in ARCHIVER_HANDLERS} == {True}


def test_a_folder_that_is_no_archive_is_not_replaced(sources: Path, tmp_path: Path) -> None:
    row = f"{PT.replace('--model-name m', '--model-name folder')} --handler handler.py -f"
    ours = run_row(
        [*MARWRIGHT, "--no-preflight"], f"{row} --archive-format no-archive", sources, tmp_path
    )
    assert ours.status == 1
    assert (tmp_path / "work/folder/x.txt").read_text() == "x"


def test_arguments_are_a_library_too(sources: Path, tmp_path: Path) -> None:
    arguments = Arguments("m", "1.0", str(sources / "handler.py"), export_path=str(tmp_path))
    members, notes = arguments.list_members()
    assert ([member.name for member in members], notes) == (["handler.py"], [])
    assert arguments.target == tmp_path / "m.mar"


def test_what_the_archiver_deletes_first_is_nobodys(
    sources: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = "import tempfile; print(tempfile.gettempdir())"
    folder = Path(subprocess.check_output([sys.executable, "-c", program], text=True).strip())
    assert folder.is_relative_to(tmp_path_factory.getbasetemp())
    (folder / "m").mkdir()
    row = f"{BASE} --handler handler.py --export-path {tmp_path}"
    command = [*ARCHIVER, *shlex.split(row)]
    subprocess.run(command, cwd=sources, check=True)
    assert not (folder / "m").exists()
