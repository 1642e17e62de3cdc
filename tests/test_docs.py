"""What docs/archives.md shows is what the program takes, prints and was measured to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from marwright.archive import Packed, Run, Spec
from marwright.archive.keys import make_key_pair
from marwright.archive.policy import Policy


@pytest.fixture
def text(root: Path) -> str:
    return (root / "docs/archives.md").read_text("utf-8")


def find_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_spec_shown_is_one(text: str) -> None:
    values = yaml.safe_load(find_blocks(text, "yaml")[0])
    assert Spec.create(**values).settings.batchSize == 8
    assert set(values) < set(Spec.model_fields)


def test_the_policy_shown_is_one(text: str, tmp_path: Path) -> None:
    _, public = make_key_pair(tmp_path / "keys")
    public.rename(tmp_path / "trusted.pem")
    (tmp_path / "policy.yaml").write_text(find_blocks(text, "yaml")[1])
    assert Policy.read(tmp_path / "policy.yaml").require == "signature"


def test_the_python_shown_runs(text: str, packed: Packed, run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run.path)
    (tmp_path / "model_store").symlink_to(packed.path.parent)
    sample = next(run.path.glob("samples/7-*.png")).name
    code = re.sub(r"7-\d+\.png", sample, find_blocks(text, "python")[0])
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("200 application/json {")


def test_the_links_lead_somewhere(root: Path) -> None:
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_figures_are_those_of_the_last_measurement(root: Path, text: str) -> None:
    measured = json.loads((root / "benchmarks/results/archive.json").read_text("utf-8"))
    pack, repack = measured["pack"], measured["repack"]
    for shown in (
        f"{pack['marwright pack']['median_seconds']} s",
        f"{pack['torch-model-archiver']['times_slower']} times",
        f"{pack['torch-model-archiver zip-store']['times_slower']} times",
        f"{pack['marwright pack']['peak_mb']} MB",
        f"{repack['marwright repack']['ratio']} times",
        f"{repack['repack() in process']['ratio']} times",
        f"{repack['marwright repack, until on disk']['ratio']} times",
        f"{measured['inspect']['marwright inspect']['median_seconds']} s",
        f"{measured['preflight']['preflight']['ratio']} times",
    ):
        assert shown in text
