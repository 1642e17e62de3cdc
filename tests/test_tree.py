"""The house rules of docs/design.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from marwright.server.deployment import Deployment
from marwright.server.properties import render_properties
from marwright.server.rendering import render_deployment


def read_imports(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, absolute module) of every import below a folder."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path.name, node.module


def test_handlers_import_nothing_of_the_toolkit(root: Path) -> None:
    assert not [pair for pair in read_imports(root / "handlers") if "marwright" in pair[1]]


def test_training_imports_archive_errors_and_storage_at_most(root: Path) -> None:
    leaves = ("marwright.handlers.image_features", "marwright.handlers.logits")  # see design.md
    allowed = ("marwright.archive", "marwright.errors", "marwright.storage", *leaves)
    found = [pair for pair in read_imports(root / "training") if pair[1].startswith("marwright")]
    assert not [pair for pair in found if not pair[1].startswith(allowed)]


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("archive", {"client", "gateway", "monitor", "release", "server", "tuning"}),
        ("client", {"gateway", "monitor", "release", "server", "tuning"}),
        ("server", {"gateway", "monitor", "release", "tuning"}),
        ("gateway", {"monitor", "release", "tuning"}),
        ("release", {"monitor", "tuning"}),
        ("tuning", {"gateway", "monitor", "release"}),
        ("monitor", {"tuning"}),
    ],
)
def test_the_toolkit_imports_neither_handlers_nor_training_nor_what_stands_above(
    root: Path, package: str, above: set[str]
) -> None:
    forbidden = {"handlers", "training", "cli", *above}
    found = [pair[1].split(".") for pair in read_imports(root / "src/marwright" / package)]
    assert not [name for name in found if name[0] == "marwright" and set(name[1:2]) & forbidden]


def test_config_properties_is_what_the_defaults_render_to(root: Path) -> None:
    assert (root / "config.properties").read_text("utf-8") == render_properties(
        render_deployment(Deployment())
    )


def test_the_readme_shows_every_command(root: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "marwright", "--help"], capture_output=True, text=True, check=True
    )
    commands = re.findall(r"^  ([a-z]+)  +[A-Z]", answer.stdout, re.MULTILINE)
    readme = (root / "README.md").read_text("utf-8")
    assert len(commands) > 10
    for command in commands:
        assert f"`marwright {command}" in readme
