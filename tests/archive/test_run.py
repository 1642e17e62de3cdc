from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from marwright.archive import Run
from marwright.archive.run import Choice
from marwright.errors import RunError, StorageError

FILES = ("config.json", "model.pt", "classes.json", "report.json", "samples/samples.json")


@pytest.fixture
def folder(tmp_path: Path, run: Run) -> Path:
    """A run folder that a test may break."""
    return Path(shutil.copytree(run.path, tmp_path / "run"))


def test_a_whole_run_is_read(run: Run) -> None:
    opened = Run.open(run.path)
    assert opened == run
    assert opened.classes == tuple("0123456789")
    assert opened.image_size == (24, 24)
    assert opened.model_path.is_file()
    assert [sample.label for sample in opened.samples] == list("0123456789")
    assert all(sample.path.is_file() for sample in opened.samples)


def test_a_missing_folder_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder .*absent; train one: marwright train"):
        Run.open(tmp_path / "absent")


def test_a_name_too_long_for_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"):
        Run.open(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RunError) as caught:
        Run.open(folder)
    assert caught.value.found == f"{name} is missing"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"5", b"null", b"[" * 100_000])
def test_a_broken_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        Run.open(folder)
    assert caught.value.found.startswith(f"{name} ")


def test_all_problems_are_named_at_once(folder: Path) -> None:
    (folder / "model.pt").unlink()
    (folder / "report.json").write_text("[]")
    (folder / "config.json").write_text('{"image_size": [24]}')
    (folder / "classes.json").write_text('["a", "a"]')
    (folder / "samples/samples.json").write_text("[1]")
    with pytest.raises(RunError) as caught:
        Run.open(folder)
    named = [problem.split()[0] for problem in caught.value.found.split("; ")]
    assert sorted(named) == sorted(FILES)


def test_an_empty_folder_lacks_every_file(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    assert all(f"{name} is missing" in caught.value.found for name in FILES)


@pytest.mark.parametrize("size", [None, 24, [24], [0, 24], [24, -1], [24.0, 24], [True, True]])
def test_an_impossible_image_size_is_refused(folder: Path, size: object) -> None:
    (folder / "config.json").write_text(json.dumps({"image_size": size}))
    with pytest.raises(RunError, match="image_size"):
        Run.open(folder)


@pytest.mark.parametrize("classes", [[], [1, 2], ["a", None], ["a", "b", "a"]])
def test_classes_that_are_no_labels_are_refused(folder: Path, classes: object) -> None:
    (folder / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(RunError, match=r"classes\.json holds"):
        Run.open(folder)


@pytest.mark.parametrize("entry", [1, None, {}, {"file": "x.png", "label": 1}])
def test_a_sample_without_its_fields_is_refused(folder: Path, entry: object) -> None:
    (folder / "samples/samples.json").write_text(json.dumps([entry]))
    with pytest.raises(RunError, match="entry 0 without file, label, prediction, probability"):
        Run.open(folder)


def test_a_missing_sample_is_named(folder: Path) -> None:
    scan = next((folder / "samples").glob("7-*.png"))
    scan.unlink()
    with pytest.raises(RunError, match=f"samples/{scan.name} is missing"):
        Run.open(folder)


def test_a_run_folder_called_samples_is_like_any_other(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("samples"))
    (renamed / "config.json").unlink()
    with pytest.raises(RunError, match=r"found config\.json is missing"):
        Run.open(renamed)


def test_a_run_of_a_table_has_columns_and_no_image_size(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"columns": ["length", "depth"]}))
    run = Run.open(folder)
    assert run.is_table
    assert run.columns == ("length", "depth")


def test_a_run_of_images_has_no_columns(run: Run) -> None:
    assert not run.is_table
    assert run.columns == ()
    assert run.weights_path.is_file()


@pytest.mark.parametrize("columns", [None, [], "length", [1, 2], ["length", None]])
def test_columns_that_are_no_names_are_refused(folder: Path, columns: object) -> None:
    (folder / "config.json").write_text(json.dumps({"columns": columns}))
    with pytest.raises(RunError, match=r"config\.json has"):
        Run.open(folder)


def choose(folder: Path, note: object) -> Run:
    """Write what optimising chose, and a file for it."""
    (folder / "optimised").mkdir()
    (folder / "optimised/pruned.onnx").write_bytes(b"onnx")
    text = note if isinstance(note, str) else json.dumps(note)
    (folder / "optimised/chosen.json").write_text(text)
    return Run.open(folder)


NOTE = {"variant": "pruned", "file": "pruned.onnx", "backend": "onnx"}


def test_where_nothing_was_chosen_there_is_no_choice(run: Run) -> None:
    assert run.read_choice() is None


def test_a_choice_is_read(folder: Path) -> None:
    choice = choose(folder, NOTE).read_choice()
    assert choice == Choice("pruned", folder / "optimised/pruned.onnx", "onnx")


def test_a_chosen_file_that_is_gone_is_named(folder: Path) -> None:
    run = choose(folder, NOTE)
    (folder / "optimised/pruned.onnx").unlink()
    with pytest.raises(RunError, match=r"pruned\.onnx is missing; run marwright optimize again"):
        run.read_choice()


@pytest.mark.parametrize(
    "note",
    [
        "",
        "{",
        "[]",
        {},
        {**NOTE, "backend": None},
        {**NOTE, "file": 5},
        {**NOTE, "file": "../model.pt"},
        {**NOTE, "file": ""},
    ],
)
def test_a_broken_note_of_the_choice_is_refused(folder: Path, note: object) -> None:
    with pytest.raises(RunError, match=r"what was chosen for .* cannot be used"):
        choose(folder, note).read_choice()
