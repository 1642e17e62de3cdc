"""What docs/training.md, optimising.md and federated.md show is what the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from marwright.cli.main import app
from marwright.training.augment import AUGMENTATIONS
from marwright.training.optimise.export import FORMS
from marwright.training.optimise.variant import read_plan
from marwright.training.settings import CHOICES

PAGES = ("docs/training.md", "docs/optimising.md", "docs/federated.md")


def list_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each line of code that runs marwright, comments left out."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks.append("\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE)))
    for line in "\n".join(blocks).splitlines():
        if line.startswith("marwright "):
            yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_shown_exists(root: Path, page: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group's
    shown = list(list_commands(root / page))
    for name, *words in shown:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"marwright {name} {given - known}"
    assert shown


def test_the_plan_shown_is_one(root: Path, tmp_path: Path) -> None:
    text = (root / "docs/optimising.md").read_text("utf-8")
    (tmp_path / "plan.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    plan = read_plan(tmp_path / "plan.yaml")
    assert [variant.name for variant in plan.variants] == ["third", "sparse"]
    assert plan.rounds == 7


def test_the_pages_name_every_form_setting_and_augmentation(root: Path) -> None:
    training, optimising = (
        (root / f"docs/{name}.md").read_text("utf-8") for name in ("training", "optimising")
    )
    for form in FORMS:
        assert f"| `{form}` |" in optimising
    for choice in (*CHOICES["optimizer"], *CHOICES["schedule"], *AUGMENTATIONS):
        assert choice in training
