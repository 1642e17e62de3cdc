from __future__ import annotations

import importlib.util
import json
import subprocess
import tempfile
from collections import namedtuple
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from marwright import doctor
from marwright.doctor import Finding, examine
from marwright.errors import JavaError
from marwright.server import Ports

CHECKS = [
    "Python",
    "torchserve",
    "torch-model-archiver",
    "pyyaml",
    "numpy",
    "requests",
    "captum",
    "nvidia-ml-py",
    "Java",
    "ports",
    "memory",
    "disk for temporary files",
    "disk for archives",
    "prometheus",
    "promtool",
    "prometheus-alertmanager",
    "amtool",
    "torch",
    "torchvision",
]


def test_programs_that_are_missing_are_a_note_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(doctor._check_monitoring())
    assert {finding.state for finding in found} == {"note"}
    assert all("apt-get install prometheus" in finding.remedy for finding in found)


def find(findings: Any, check: str) -> Finding:
    (finding,) = (item for item in findings if item.check == check)
    assert isinstance(finding, Finding)
    return finding


def test_every_check_is_made_once_and_in_order(tmp_path: Path) -> None:
    findings = list(examine(tmp_path))
    assert [finding.check for finding in findings] == CHECKS
    assert all(finding.found for finding in findings)
    assert all(finding.remedy for finding in findings if finding.state != "ok")
    assert find(findings, "torch").state == "ok"
    assert find(findings, "torchserve").state == "ok"


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.5.1+cpu", "fail"),
        ("1.13.1", "fail"),
        ("2.6.0", "ok"),
        ("2.6.0a0+git1234", "ok"),
        ("2.10.0+cu128", "ok"),
        ("3.0.0rc1", "ok"),
    ],
)
def test_a_torch_with_a_known_hole_fails(version: str, state: str) -> None:
    finding = doctor._judge("torch", version, "False")
    assert finding.state == state
    assert ("torch>=2.6" in finding.remedy) == (state == "fail")


@pytest.mark.parametrize(("extra", "words"), [("True", "with CUDA"), ("False", "without CUDA")])
def test_torch_says_whether_it_has_cuda(extra: str, words: str) -> None:
    assert doctor._judge("torch", "2.8.0", extra).found == f"2.8.0, {words}"


@pytest.mark.parametrize(("extra", "state"), [("True", "ok"), ("False", "note")])
def test_a_torchvision_without_its_operators_is_a_note(extra: str, state: str) -> None:
    assert doctor._judge("torchvision", "0.23.0", extra).state == state


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ports: {ports}", "inference"),
        ("ports: {ports}", "health"),
        ("gateway: {{port: {port}}}\nports: {ports}", "gateway"),
    ],
)
def test_a_taken_port_is_a_note_that_names_it(
    tmp_path: Path, taken_port: int, text: str, name: str
) -> None:
    path = tmp_path / "deploy.yaml"
    ports = {**asdict(Ports.find_free()), "health": Ports.find_free().inference}
    if name in ports:
        ports[name] = taken_port
    path.write_text(text.format(port=taken_port, ports=json.dumps(ports)))
    finding = doctor._check_ports(path)
    assert finding.state == "note"
    assert finding.found == f"port {taken_port} ({name}) is taken"
    assert "--free-ports" in finding.remedy


def test_the_ports_of_the_deployment_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("ports: free\n")
    assert doctor._check_ports(path) == Finding("ports", "ok", "whatever is free")
    default = ["inference", "management", "metrics", "grpc_inference", "grpc_management", "health"]
    path.write_text("ports: [no, such]\n")
    assert list(doctor._list_ports(path)) == default
    assert list(doctor._list_ports(tmp_path / "absent")) == default


def test_no_java_fails_and_says_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing() -> None:
        raise JavaError("no Java", found="Java 11 at /usr/bin/java (PATH)", remedy="install one")

    monkeypatch.setattr(doctor, "find_java", find_nothing)
    expected = Finding("Java", "fail", "Java 11 at /usr/bin/java (PATH)", "install one")
    assert doctor._check_java() == expected


@pytest.mark.parametrize(("version", "state"), [("3.9.19", "fail"), ("3.10.0", "ok")])
def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: version)
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: version.split("."))
    assert doctor._check_python().state == state


@pytest.mark.parametrize("found", ["0.11.1", "0.9.0", None])
def test_another_torchserve_fails(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def read_version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(doctor, "version", read_version)
    finding = find(doctor._check_packages(), "torchserve")
    assert (finding.state, finding.found) == ("fail", found or "missing")
    assert finding.remedy == "pip install 'torchserve==0.12.0'"


@pytest.mark.parametrize(("package", "state"), [("pyyaml", "fail"), ("captum", "note")])
def test_a_missing_package_fails_only_where_every_model_needs_it(
    monkeypatch: pytest.MonkeyPatch, package: str, state: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    finding = find(doctor._check_packages(), package)
    assert (finding.state, finding.remedy) == (state, f"pip install {package}")


def test_little_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory(1 << 30))
    assert doctor._check_memory() == Finding(
        "memory", "fail", "1.0 GB available", "free some: Java and a worker need about 2 GB"
    )


def test_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(1 << 20))
    assert {finding.state for finding in doctor._check_disk(tmp_path)} == {"fail"}


def test_a_store_that_does_not_exist_yet_is_looked_for_above(tmp_path: Path) -> None:
    finding = find(doctor._check_disk(tmp_path / "not/yet"), "disk for archives")
    assert finding.found.endswith(f"free at {tmp_path}")
    assert not (tmp_path / "not").exists()


def test_a_store_that_is_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = find(doctor._check_disk(tmp_path / "file"), "disk for archives")
    assert (finding.state, finding.remedy) == ("fail", "choose a writable folder")


def test_no_folder_for_temporary_files_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def find_nothing() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", find_nothing)
    findings = list(doctor._check_disk(tmp_path))
    assert [finding.check for finding in findings] == CHECKS[11:13]
    assert [finding.state for finding in findings] == ["fail", "ok"]


@pytest.mark.parametrize(
    ("status", "said", "found"),
    [
        (1, "Traceback\nImportError: libtorch.so: no such file\n", "ImportError: libtorch.so"),
        (-11, "", "it ended without a word"),
    ],
)
def test_a_build_that_cannot_be_imported_fails_with_its_last_word(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, found: str
) -> None:
    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(doctor.subprocess, "run", answer)
    findings = list(doctor._check_imports())
    assert [finding.state for finding in findings] == ["fail", "fail"]
    assert all(finding.found.startswith(found) for finding in findings)
    assert findings[0].remedy == "pip install --force-reinstall torch"
