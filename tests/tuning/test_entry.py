from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from marwright.archive import Packed
from marwright.errors import ConfigurationError, UsageError
from marwright.server.deployment import Deployment
from marwright.tuning.entry import write_entry

VALUES = {"workers": 2, "threads": 1, "batch_size": 16, "batch_delay_ms": 1}
LINES = """\
workers: 2
threads: 1
batch_size: 16
batch_delay_ms: 1
"""


@pytest.fixture
def archive(packed: Packed) -> Path:
    """The only archive of its store; deploy.yaml is written beside the store."""
    return packed.path


def change(archive: Path, text: str) -> tuple[str, str]:
    """Return the file as it was changed, and what was said of it."""
    path = archive.parent.parent / "deploy.yaml"
    path.write_text(f"store: {archive.parent.name}\n{text}".replace("CNN", archive.name))
    note = write_entry(path, archive, VALUES)
    entry = next(
        item for item in Deployment.read(path).models or () if item.archive == archive.name
    )
    assert {key: getattr(entry, key) for key in VALUES} == VALUES
    changed = path.read_text().partition("\n")[2]
    return changed.replace(archive.name, "CNN"), note


def indent(text: str, by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def test_a_file_is_made_where_there_is_none(archive: Path) -> None:
    path = archive.parent.parent / "deploy.yaml"
    assert write_entry(path, archive, VALUES) == ""
    assert yaml.safe_load(path.read_text()) == {
        "store": archive.parent.name,
        "models": [{"archive": archive.name, **VALUES}],
    }


def test_only_the_keys_of_the_entry_change(archive: Path) -> None:
    before = """\
# what we serve
models:
  - archive: CNN   # the small one
    workers: 1     # one is enough
    queue: 50

limits:
  connections: 100  # more never come
"""
    after, note = change(archive, before)
    assert note == ""
    assert after == before.replace("workers: 1 ", "workers: 2 ").replace(
        "queue: 50\n",
        "queue: 50\n    threads: 1\n    batch_size: 16\n    batch_delay_ms: 1\n",
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "models:\n- CNN  # it\n# end\n",
            f"models:\n- archive: CNN  # it\n{indent(LINES, 2)}# end\n",
        ),
        (
            "models: [CNN]  # it\n",
            "models: [{archive: CNN, workers: 2, threads: 1, batch_size: 16, batch_delay_ms: 1}]"
            " # it\n",
        ),
        (
            "models:\n- {archive: CNN, workers: 1}  # it\n",
            "models:\n- {archive: CNN, workers: 2, threads: 1, batch_size: 16, batch_delay_ms: 1}"
            " # it\n",
        ),
        (
            "models: []\nname: a  # it\n",
            f"models:\n- archive: CNN\n{indent(LINES, 2)}name: a  # it\n",
        ),
        ("name: a  # it\n", f"name: a  # it\nmodels:\n- archive: CNN\n{indent(LINES, 2)}"),
        (
            "models:\n- archive: CNN\n  handler:\n    threads: 2  # it\n",
            f"models:\n- archive: CNN\n  handler:\n    threads: 1  # it\n{indent(LINES, 2)}",
        ),
    ],
)
def test_every_form_of_an_entry_is_changed_in_place(archive: Path, before: str, after: str) -> None:
    assert change(archive, before) == (after, "")


def test_an_entry_is_added_behind_those_of_other_archives(archive: Path) -> None:
    other = archive.with_name("other.mar")
    other.write_bytes(archive.read_bytes())
    path = archive.parent.parent / "deploy.yaml"
    path.write_text("store: store\nmodels:\n  - archive: other.mar\n    queue: 5  # few\n# end\n")
    with pytest.raises(ConfigurationError, match="cnn"):  # two archives of one model and version
        write_entry(path, archive, VALUES)
    assert path.read_text().endswith("    queue: 5  # few\n# end\n")


def test_models_that_are_not_said_are_written_out(archive: Path) -> None:
    after, note = change(archive, "models:  # all of them\nname: a\n")
    assert note == ""
    assert after == f"models:  # all of them\n- archive: CNN\n{indent(LINES, 2)}name: a\n"


def test_an_anchor_moves_with_the_name(archive: Path) -> None:
    after, note = change(archive, "models:\n- &it CNN\nname: *it  # the same\n")
    assert note == ""
    assert after == f"models:\n- archive: &it CNN\n{indent(LINES, 2)}name: *it  # the same\n"


def test_a_file_that_is_broken_stays_as_it_is(archive: Path) -> None:
    path = archive.parent.parent / "deploy.yaml"
    path.write_text("models: 7\n")
    with pytest.raises(ConfigurationError):
        write_entry(path, archive, VALUES)
    assert path.read_text() == "models: 7\n"


def test_an_archive_of_another_store_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "deploy.yaml"
    path.write_text("store: elsewhere\n")
    with pytest.raises(UsageError, match="is not in the store"):
        write_entry(path, archive, VALUES)
