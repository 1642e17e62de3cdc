"""docs/clients.md: its Python runs as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marwright.archive import Run
from marwright.client import Endpoint
from marwright.server import TorchServe

pytestmark = pytest.mark.server

PREPARE = """
import sys
from pathlib import Path
from marwright.client import Endpoint
endpoint = Endpoint.read(Path(sys.argv[1]))
scans = [Path(name) for name in sys.argv[2:]]
"""


def find_blocks(root: Path, language: str) -> list[str]:
    text = (root / "docs/clients.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def set_addresses(text: str, endpoint: Endpoint) -> str:
    """Return a text with a server's addresses in place of those of TorchServe's defaults."""
    usual = {
        "http://127.0.0.1:8080": endpoint.inference_url,
        "http://127.0.0.1:8081": endpoint.management_url,
        "127.0.0.1:7070": endpoint.grpc_inference,
        "127.0.0.1:7071": endpoint.grpc_management,
    }
    for address, actual in usual.items():
        assert address in text
        text = text.replace(address, actual)
    return text


def test_the_pages_python_runs_as_written(
    root: Path, server: TorchServe, run: Run, tmp_path: Path
) -> None:
    blocks = find_blocks(root, "python")
    assert len(blocks) > 3
    scans = [str(sample.path) for sample in run.samples[:2]]
    (tmp_path / "key_file.json").symlink_to(server.run_folder / "key_file.json")
    program = PREPARE + set_addresses("\n".join(blocks), server.endpoint)
    answer = subprocess.run(
        [sys.executable, "-c", program, str(server.run_folder / "endpoint.json"), *scans],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq")
def test_curl_finds_addresses_and_tokens_by_the_endpoint_file(
    root: Path, server: TorchServe, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "marwright").mkdir()
    (tmp_path / "marwright/clinic.json").symlink_to(server.run_folder / "endpoint.json")
    shutil.copy(run.samples[7].path, tmp_path / "image.png")
    blocks = find_blocks(root, "bash")
    assert len(blocks) == 3
    answer = subprocess.run(
        ["bash", "-e", "-u", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count('{"7":') == 2
    assert "Workers scaled" in answer.stdout or "Worker already" in answer.stdout
