from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from marwright.archive import Archive, Spec, pack_spec
from marwright.archive.pack import Packed
from marwright.errors import ArchiveError

HANDLER = "import local\n\n\ndef handle(data, context): ...\n"
WHOLE = {
    "name": "digits",
    "version": "2.0",
    "handler": "handlers/mine.py",
    "backend": "torchscript",
    "model": "weights/model.pt",
    "files": ["assets/", "*.txt", {"from": "notes/a.md", "to": "docs/a.md"}],
    "requirements": ["einops==0.8.0"],
    "python": "3.10",
    "settings": {"batchSize": 4, "maxBatchDelay": 3, "handler": {"top_k": 2}},
    "limits": {"max_bytes": 1000},
    "samples": ["samples/*.png", {"file": "samples/bad.bin", "status": 415}],
    "input": {"content_types": ["image/png"], "shape": [None, 3, 24, 24], "datatype": "FP32"},
    "output": {"schema": {"type": "object"}},
    "labels": ["zero", "one"],
    "licence": "Apache-2.0",
    "description": "Digits.",
    "dataset": {"name": "digits"},
}
FILES = {
    "handlers/mine.py": HANDLER,
    "handlers/local.py": "x = 1\n",
    "weights/model.pt": "",
    "assets/one/deep.json": "{}",
    "assets/one/skip.tmp": "t",
    "assets/__pycache__/x.pyc": "p",
    "assets/.git/config": "g",
    "read.txt": "r",
    "secret.txt": "s",
    "notes/a.md": "# a",
    "samples/1.png": "1",
    "samples/bad.bin": "b",
    ".marwrightignore": "*.tmp\n/secret.txt\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all that WHOLE names."""
    for name, content in FILES.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path / "project"


def write_spec(folder: Path, values: dict[str, Any] | str) -> Path:
    path = folder / "model.yaml"
    text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def pack(folder: Path, **changes: Any) -> Packed:
    values = {key: value for key, value in {**WHOLE, **changes}.items() if value is not None}
    path = write_spec(folder, values)
    return pack_spec(
        Spec.read(path), folder=folder, path=path, out=folder / "store", force=True, preflight=None
    )


@pytest.fixture
def members(folder: Path) -> dict[str, bytes]:
    with Archive.open(pack(folder, model=None).path) as archive:
        return {name: archive.read(name) for name in archive.names}


def test_everything_named_lies_in_its_place(members: dict[str, bytes]) -> None:
    assert set(members) == {
        "MAR-INF/MANIFEST.json",
        "MAR-INF/bom.cdx.json",
        "MAR-INF/provenance.json",
        "MAR-INF/samples.json",
        "MAR-INF/samples/1.png",
        "MAR-INF/samples/bad.bin",
        "MAR-INF/spec.json",
        "assets/one/deep.json",
        "classes.json",
        "docs/a.md",
        "local.py",
        "mine.py",
        "model-config.yaml",
        "read.txt",
        "requirements.txt",
    }


def test_what_a_worker_reads_says_what_the_spec_says(members: dict[str, bytes]) -> None:
    manifest = json.loads(members["MAR-INF/MANIFEST.json"])["model"]
    assert (manifest["modelName"], manifest["modelVersion"]) == ("digits", "2.0")
    settings = yaml.safe_load(members["model-config.yaml"])
    assert (settings["batchSize"], settings["maxBatchDelay"]) == (4, 3)
    assert settings["handler"] == {"top_k": 2, "max_bytes": 1000}
    assert json.loads(members["classes.json"]) == ["zero", "one"]
    assert members["requirements.txt"] == b"einops==0.8.0\n"


def test_samples_travel_with_what_they_must_get(members: dict[str, bytes]) -> None:
    assert json.loads(members["MAR-INF/samples.json"]) == [
        {"file": "1.png", "status": 200},
        {"file": "bad.bin", "status": 415},
    ]


def test_what_users_of_the_archive_ask_travels_in_it(members: dict[str, bytes]) -> None:
    told = json.loads(members["MAR-INF/spec.json"])
    for key in ("input", "output", "licence", "description", "labels", "backend"):
        assert key in told
    assert str(Path.home()) not in members["MAR-INF/spec.json"].decode()


def test_two_copies_of_a_project_give_the_same_archive(folder: Path, tmp_path: Path) -> None:
    first = pack(folder, model=None)
    copy = tmp_path / "elsewhere" / "copy"
    copy.parent.mkdir()
    folder.rename(copy)
    (copy / "store").rename(tmp_path / "old")
    second = pack(copy, model=None)
    assert (tmp_path / "old/digits.mar").read_bytes() == second.path.read_bytes()
    assert first.root_digest == second.root_digest


def test_every_problem_is_told_at_once_with_its_line(folder: Path) -> None:
    text = (
        "name: a b\n"
        "version: 1.0\n"
        "modle: x.pt\n"
        "description: {}\n"
        "settings:\n"
        "  batchsize: 4\n"
        "  maxBatchDelay: 0\n"
        "samples:\n"
        "  - file: samples/1.png\n"
        "    status: ok\n"
        "output:\n"
        "  schema: {type: nonsense}\n"
        "licence: a\nlicence: b\n"
    )
    with pytest.raises(ArchiveError, match="9 problems") as caught:
        Spec.read(write_spec(folder, text))
    lines = [line.split("model.yaml:")[1] for line in caught.value.detail.splitlines()]
    assert [int(line.split(":")[0]) for line in lines] == [1, 2, 3, 4, 6, 7, 10, 12, 14]
    assert "1.0" in lines[1]
    assert "did you mean model?" in lines[2]
    assert "did you mean batchSize?" in lines[4]
    assert "samples.0.status" in lines[6]
    assert "stands twice, first in line 13" in lines[8]


def test_files_that_are_not_there_are_told_with_their_line(folder: Path) -> None:
    changes = {"model": "absent.pt", "files": ["absent/", "*.csv"], "samples": ["absent.png"]}
    with pytest.raises(ArchiveError, match="4 problems") as caught:
        Spec.read(write_spec(folder, {**WHOLE, **changes}))
    for name in ("absent.pt", "absent/", r"*.csv", "absent.png"):
        assert f"there is no file {name}" in caught.value.detail


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backend": "eager"}, "eager needs `architecture`"),
        ({"architecture": "handlers/local.py"}, "goes with `backend: eager`"),
        ({"labels": ["a", "a"]}, "holds a label twice"),
        ({"backend": "caffe"}, "'aotinductor', 'openvino' or 'eager'"),
        ({"python": "2.7"}, "python: expected a text of the form"),
        ({"limits": {"max_pixels": 0}}, "limits.max_pixels"),
        ({"handler": "absent.py"}, "there is no file absent.py"),
    ],
)
def test_keys_that_do_not_agree_are_refused(
    folder: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ArchiveError) as caught:
        Spec.read(write_spec(folder, {**WHOLE, **changes}))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n- b\n", "a mapping, found list"),
        ("name: [\n", "expected YAML, found line 2"),
        ("name: \x00\n", "expected YAML"),
        (f"a: &a [{'x, ' * 999}]\nb: [{'*a, ' * 999}]\n", "too many aliases"),
        ("[" * 5000, "expected YAML"),
        ("", "name: is missing"),
        ("name: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_in_one_line(folder: Path, text: str, told: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        Spec.read(write_spec(folder, text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_outside_needs_a_place(folder: Path) -> None:
    (folder.parent / "shared.txt").write_text("s")
    with pytest.raises(ArchiveError, match=r"say its place: \{from: \.\./shared\.txt"):
        pack(folder, model=None, files=["../shared.txt"])
    packed = pack(folder, model=None, files=[{"from": "../shared.txt", "to": "data/"}])
    with Archive.open(packed.path) as archive:
        assert "data/shared.txt" in archive.names


def test_a_link_in_a_circle_is_refused(folder: Path) -> None:
    (folder / "assets/loop").symlink_to(folder / "assets")
    with pytest.raises(ArchiveError, match="leads back to a folder above it"):
        pack(folder, model=None)


def test_a_folder_may_be_moved_inside(folder: Path) -> None:
    packed = pack(folder, model=None, files=[{"from": "assets", "to": "static/v1"}])
    with Archive.open(packed.path) as archive:
        assert "static/v1/one/deep.json" in archive.names


def test_name_and_version_may_be_overridden() -> None:
    spec = Spec.create(name="a").override(name="b", version="3.1")
    assert (spec.name, spec.version) == ("b", "3.1")
    with pytest.raises(ArchiveError, match="name"):
        spec.override(name="b/c")


def test_the_schema_describes_every_key() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schema = Spec.model_json_schema(by_alias=True)
    assert set(WHOLE) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
