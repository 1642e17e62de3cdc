"""docs/clients.md: its Python runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from marwright.archive import Run
from marwright.server import TorchServe

pytestmark = pytest.mark.server

PREPARE = """
import sys
from pathlib import Path
from marwright.client import Endpoint
endpoint = Endpoint.read(Path(sys.argv[1]))
scans = [Path(name) for name in sys.argv[2:]]
"""


def test_the_pages_python_runs_as_written(root: Path, server: TorchServe, run: Run) -> None:
    text = (root / "docs/clients.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    scans = [str(sample.path) for sample in run.samples[:2]]
    program = PREPARE + "\n".join(blocks)
    answer = subprocess.run(
        [sys.executable, "-c", program, str(server.run_folder / "endpoint.json"), *scans],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
