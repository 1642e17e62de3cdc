from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.server.keys import SECRET_NAMES
from marwright.server.properties import read_properties

Command = Callable[..., Any]

OPEN = """\
# as in many a container
inference_address=http://0.0.0.0:8080
management_address=http://0.0.0.0:8081
workflow_store=/srv/workflows
model_store=/srv/models
install_py_deps_per_model=true
"""
CLOSED = """\
allowed_urls=none
workflow_store=/srv/workflows
model_store=/srv/models
blacklist_env_vars=(?i).*(key|token|secret|pass|cred|auth).*
metrics_mode=prometheus
vmargs=-Xmx1g -XX:MaxDirectMemorySize=512m -XX:+ExitOnOutOfMemoryError
"""
BARE = {"PATH": os.environ["PATH"], "HOME": "/"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.properties"
    path.write_text(OPEN)
    return path


def test_what_is_open_is_printed_with_its_remedy(marwright: Command, path: Path) -> None:
    done = marwright("harden", path, env=BARE)
    assert done.returncode == 1
    rows = done.stdout.splitlines()[2:]
    assert rows[0].split()[:3] == ["danger", "TS102", "management_address=http://0.0.0.0:8081"]
    assert "bind it to 127.0.0.1" in rows[0]
    assert "did you mean" in done.stdout
    assert path.read_text() == OPEN


def test_a_closed_file_is_said_to_be_so(marwright: Command, path: Path) -> None:
    path.write_text(CLOSED)
    done = marwright("harden", path, "--fail-on", "warning", env=BARE)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{path}: nothing found\n"


def test_warnings_fail_where_asked(marwright: Command, path: Path) -> None:
    path.write_text(CLOSED + "enable_model_api=true\n")
    assert marwright("harden", path, env=BARE).returncode == 0
    done = marwright("harden", path, "--fail-on", "warning", env=BARE)
    assert done.returncode == 1
    assert "TS202" in done.stdout


def test_json_holds_every_finding(marwright: Command, path: Path) -> None:
    done = marwright("harden", path, "--json", env=BARE)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["file"] == str(path)
    assert report["findings"][0] == {
        "id": "TS102",
        "severity": "danger",
        "key": "management_address",
        "found": "http://0.0.0.0:8081",
        "why": "other machines may register models, that is code",
        "remedy": "bind it to 127.0.0.1, behind a proxy",
        "mended": "http://127.0.0.1:8081",
    }


def test_the_copy_is_hardened_and_says_what_it_is_not(
    marwright: Command, path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "config.properties"
    done = marwright("harden", path, "--write", out, env=BARE)
    assert done.returncode == 0  # what is left is a warning
    assert "mended management_address, inference_address, allowed_urls" in done.stderr
    assert "not mended: warning TS701 install_py_deps_per_model=true; did you" in done.stderr
    assert out.stat().st_mode & 0o777 == 0o600
    assert read_properties(out)["management_address"] == "http://127.0.0.1:8081"
    assert "what a default" not in out.read_text().lower()
    assert path.read_text() == OPEN
    again = marwright("harden", out, "--json", env=BARE)
    assert [item["id"] for item in json.loads(again.stdout)["findings"]] == ["TS701"]
    assert marwright("harden", path, "--write", out, "--fail-on", "warning").returncode == 1


def test_the_environment_counts(marwright: Command, path: Path) -> None:
    path.write_text(CLOSED + "enable_envvars_config=true\n")
    done = marwright("harden", path, env={**BARE, "TS_MANAGEMENT_ADDRESS": "http://0.0.0.0:1"})
    assert done.returncode == 1
    assert "TS102" in done.stdout


@pytest.mark.parametrize(
    ("text", "status"), [(None, 1), ("no key and no value\n", 2), ("a=\xff", 1)]
)
def test_a_bad_file_is_said_in_one_line(
    marwright: Command, path: Path, text: str | None, status: int
) -> None:
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    done = marwright("harden", path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_file_itself_is_not_overwritten(marwright: Command, path: Path) -> None:
    done = marwright("harden", path, "--write", path)
    assert done.returncode == 2
    assert path.read_text() == OPEN


def test_the_docs_show_what_it_prints(marwright: Command, root: Path, path: Path) -> None:
    text = (root / "docs/security.md").read_text("utf-8")
    file, output = re.findall(r"```(?:properties|console)\n(.*?)```", text, re.DOTALL)
    path.write_text(file)
    done = marwright(
        "harden", path.name, "--write", "hardened.properties", env=BARE, cwd=path.parent
    )
    command, *shown = output.splitlines()
    assert command == "$ marwright harden config.properties --write hardened.properties"
    assert shown == [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_the_docs_recommend_the_pattern(root: Path) -> None:
    assert f"\n    blacklist_env_vars={SECRET_NAMES}\n" in (root / "docs/security.md").read_text(
        "utf-8"
    )
