from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from marwright.archive import ModelSettings
from marwright.errors import ArchiveError


def read_text(folder: Path, text: str) -> ModelSettings:
    path = folder / "model-config.yaml"
    path.write_text(text, encoding="utf-8")
    return ModelSettings.read(path)


def test_all_problems_are_named_at_once() -> None:
    values = {
        "minWorker": 1,
        "batchSize": "many",
        "maxBatchDelay": 0,
        "responseTimeout": -1,
        "handler": {"top_k": 0, "image_size": [24]},
    }
    with pytest.raises(ArchiveError, match=r"my\.yaml has settings that cannot be used") as caught:
        ModelSettings.create(values, source="my.yaml")
    problems = caught.value.found.split("; ")
    assert {problem.split(":")[0] for problem in problems} == {
        "minWorker",
        "batchSize",
        "maxBatchDelay",
        "responseTimeout",
        "handler.top_k",
        "handler.image_size.1",
    }


@pytest.mark.parametrize(
    ("key", "meant"), [("minWorker", "minWorkers"), ("batch_size", "batchSize"), ("nonsense", "")]
)
def test_an_unknown_key_is_named_with_the_one_that_was_meant(key: str, meant: str) -> None:
    (problem,) = ModelSettings.find_problems({key: 1})
    assert problem.is_unknown
    assert problem.message.partition(", did you mean ")[2] == (f"{meant}?" if meant else "")


def test_strictly_read_text_is_no_number() -> None:
    assert ModelSettings.find_problems({"batchSize": "2"}) == []
    assert [str(item) for item in ModelSettings.find_problems({"batchSize": "2"}, strict=True)] == [
        "batchSize: input should be a valid integer"
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"handler": 5},
        {"handler": None},
        {"handler": {"image_size": [0, 24]}},
        {"handler": {"image_size": [24, -1]}},
        {"handler": {"max_bytes": 0}},
        {"minWorkers": -1},
        {"batchSize": 0},
        {"batchSize": 1.5},
        {1: 2},
        {"": 1},
    ],
)
def test_impossible_settings_are_refused(values: dict[Any, Any]) -> None:
    with pytest.raises(ArchiveError, match="settings that cannot be used"):
        ModelSettings.create(values, source="x")


def test_settings_read_back_are_the_ones_written(tmp_path: Path) -> None:
    settings = ModelSettings.create(
        {"minWorkers": 2, "maxWorkers": 4, "handler": {"image_size": [24, 32], "mine": [1, "a"]}},
        source="x",
    )
    assert read_text(tmp_path, settings.to_yaml().decode()) == settings


def test_settings_with_a_default_are_spelled_out_and_the_others_left_out() -> None:
    values = yaml.safe_load(ModelSettings().to_yaml())
    with_default = {name for name, field in ModelSettings.model_fields.items() if field.default}
    assert set(values) == with_default
    assert values["handler"] == {}


def test_torchserves_other_settings_are_passed_on() -> None:
    given = {"deviceType": "cpu", "jobQueueSize": 7, "pt2": {"compile": {"enable": True}}}
    values = yaml.safe_load(ModelSettings.create(given, source="here").to_yaml())
    assert {key: values[key] for key in given} == given


def test_fewer_workers_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ArchiveError, match="maxWorkers 1 is below minWorkers 2"):
        ModelSettings.create({"minWorkers": 2}, source="here")


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert read_text(tmp_path, "") == ModelSettings()
    assert read_text(tmp_path, "# nothing\n") == ModelSettings()


@pytest.mark.parametrize("text", ["[]", "0", "false", "''", "- a", "text", "{", "a: b: c", "\0"])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArchiveError, match=r"cannot read .*model-config\.yaml"):
        read_text(tmp_path, text)


def test_a_file_that_is_absent_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"cannot read .*absent\.yaml"):
        ModelSettings.read(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ArchiveError, match=r"cannot read .*binary\.yaml"):
        ModelSettings.read(tmp_path / "binary.yaml")


def test_a_tag_that_would_run_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="could not determine a constructor"):
        read_text(tmp_path, "batchSize: !!python/object/apply:os.getpid []")
