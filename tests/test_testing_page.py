"""docs/testing.md: its tests pass as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.server
def test_the_pages_tests_pass_as_written(root: Path, store: Path, tmp_path: Path) -> None:
    text = (root / "docs/testing.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"test_block_{number}.py").write_text(block, encoding="utf-8")
    (tmp_path / "model_store").symlink_to(store)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "marwright.pytest_plugin"),
            *("--strict-markers", "-W", "error", "-p", "no:cacheprovider"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
