"""The plugin as a user meets it: pytest in a process of its own, on a user's tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from marwright.archive import Spec, pack_spec

NOISY = """
def handle(data, context):
    if data is None:
        return None
    for row in data:
        for number in range(150):
            print(f"noise {number} of", bytes(row["body"]).decode())
    return ["heard"] * len(data)
"""

BROKEN = """
def handle(data, context):
    raise ValueError("no luck")
"""

USERS_TESTS = """
import os

import pytest


def test_two_versions_at_once(served_archive, torchserve):
    one, two = served_archive("cnn.mar"), served_archive("cnn-2.0.mar")
    assert (one.version, two.version) == ("1.0", "2.0")
    assert one.predict(one.samples[0]).json() == two.predict(two.samples[0]).json()
    assert len(torchserve.client.models.versions("cnn")) == 2


@pytest.mark.archive("cnn.mar", workers=2)
def test_the_marker(served_archive, torchserve, tmp_path):
    cnn = served_archive
    assert torchserve.client.models.describe(cnn.name).ready_workers == 2
    first, second = cnn.samples[:2]
    assert "method" in cnn.explain(first).json()
    with pytest.raises(AssertionError, match="instead of"):
        cnn.check(type(first)(second.path, first.content_type, 200, {"no such label": 0.9}))
    (tmp_path / "broken.png").write_bytes(b"no image")
    cnn.check(type(first)(tmp_path / "broken.png", "image/png", 415))
    with pytest.raises(AssertionError, match="broken.png has status 415 instead of 200"):
        cnn.check(type(first)(tmp_path / "broken.png", "image/png", 200))


def test_nothing_is_left(torchserve):
    assert torchserve.client.models.list() == ()
    endpoint = torchserve.endpoint
    assert not [*endpoint.model_store.glob("*.mar"), *endpoint.staging.glob("*.mar")]


def test_that_fails(served_archive):
    served_archive("noisy.mar").predict(b"the first test")
    raise AssertionError("the user's own")


def test_that_fails_later(served_archive):
    served_archive("noisy.mar").predict(b"the second test")
    raise AssertionError("the user's own")


def test_a_handler_that_breaks(served_archive):
    served_archive("broken.mar")


def test_an_archive_that_is_not_there(served_archive):
    served_archive("absent.mar")


def test_nothing_is_left_of_what_failed(torchserve):
    assert torchserve.client.models.list() == ()
    print("server", os.getpid(), torchserve.run_folder)
"""


def start_pytest(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start pytest with the plugin alone, whether or not it is installed as one."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-p", "marwright.pytest_plugin"),
            *("--strict-markers", "-W", "error", "-p", "no:cacheprovider"),
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    with start_pytest(folder, *arguments) as process:
        output, _ = process.communicate(timeout=300)
    return process.returncode, output


def write_tests(folder: Path, text: str) -> Path:
    (folder / "test_users.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def outputs(
    store: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """What two sessions say that run at the same time: a user's tests, and the example."""
    users = tmp_path_factory.mktemp("users")
    shutil.copytree(store, users / "store")
    for name, source in (("noisy", NOISY), ("broken", BROKEN)):
        (users / f"{name}.py").write_text(source)
        spec = Spec.create(name=name, handler=f"{name}.py")
        pack_spec(spec, folder=users, out=users / f"store/{name}.mar", preflight=None)
        (users / f"{name}.py").unlink()
    example = tmp_path_factory.mktemp("example")
    shutil.copytree(store, example / "model_store")
    shutil.copy(root / "examples/test_archive.py", example)
    started = {
        "users": start_pytest(write_tests(users, USERS_TESTS), "-rA", "--torchserve-store=store"),
        "example": start_pytest(example, "-rA", "test_archive.py"),
    }
    said = {}
    for name, process in started.items():
        with process:
            text, _ = process.communicate(timeout=500)
        said[name] = process.returncode, text
    return said


@pytest.fixture(scope="module")
def output(outputs: dict[str, tuple[int, str]]) -> str:
    return outputs["users"][1]


@pytest.mark.server
def test_the_example_passes_beside_another_session(outputs: dict[str, tuple[int, str]]) -> None:
    status, text = outputs["example"]
    assert status == 0, text
    assert "2 passed" in text


@pytest.mark.server
@pytest.mark.parametrize(
    "name",
    [
        "test_two_versions_at_once",
        "test_the_marker",
        "test_nothing_is_left",
        "test_nothing_is_left_of_what_failed",
    ],
)
def test_a_users_test_passes(output: str, name: str) -> None:
    assert re.search(rf"^PASSED test_users.py::{name}$", output, re.MULTILINE), output


def read_sections(output: str, test: str) -> str:
    """Return what the report of a failed test says."""
    found = re.search(rf"^_+ {test} _+$(.*?)(?=^_{{5,}} |^={{5,}} )", output, re.M | re.S)
    assert found, output
    return found[1]


@pytest.mark.server
def test_what_the_workers_wrote_since_the_test_began_is_in_its_report(output: str) -> None:
    first, second = (
        read_sections(output, name) for name in ("test_that_fails", "test_that_fails_later")
    )
    assert "worker log of noisy 1.0" in first
    assert "noise 149 of the first test" in first
    assert "the second test" not in first
    assert "noise 149 of the second test" in second
    assert "the first test" not in second


@pytest.mark.server
def test_a_long_log_is_cut_and_says_so(output: str) -> None:
    section = read_sections(output, "test_that_fails_later")
    assert section.count("noise ") == 100
    assert re.search(r"^\.\.\. \d+ lines before$", section, re.MULTILINE)


@pytest.mark.server
def test_errors_of_ours_are_told_without_a_traceback_of_ours(output: str) -> None:
    broken = read_sections(output, "test_a_handler_that_breaks")
    assert broken.strip().startswith("broken 1.0 cannot be loaded: found ValueError: no luck")
    assert "pytest_plugin.py" not in broken
    absent = read_sections(output, "test_an_archive_that_is_not_there")
    assert "absent.mar" in absent
    assert len(absent.strip().splitlines()) == 1


@pytest.mark.server
def test_the_servers_end_with_their_sessions(output: str) -> None:
    found = re.search(r"^server \d+ (\S+)$", output, re.MULTILINE)
    assert found
    assert not Path(found[1]).exists()


def test_without_a_server_each_test_fails_in_one_line(tmp_path: Path) -> None:
    write_tests(
        tmp_path,
        """
        def test_one(served_archive): pass
        def test_two(torchserve): pass
        """,
    )
    (tmp_path / "conftest.py").write_text(
        "import marwright.server.launch as module\n"
        "from marwright.errors import JavaError\n"
        "def find_java():\n"
        "    raise JavaError('TorchServe needs Java', remedy='install it')\n"
        "module.find_java = find_java\n"
    )
    status, output = run_pytest(tmp_path)
    assert status == 1
    assert "2 errors" in output
    for name in ("test_one", "test_two"):
        section = read_sections(output, f"ERROR at setup of {name}")
        assert section.strip() == "TorchServe needs Java; install it"


def test_without_its_fixtures_nothing_is_imported(tmp_path: Path) -> None:
    write_tests(
        tmp_path,
        """
        import sys

        def test_one():
            ours = {name for name in sys.modules if name.startswith("marwright")}
            assert ours == {"marwright", "marwright.errors", "marwright.pytest_plugin"}
            assert not {"requests", "torch", "yaml", "pydantic"} & sys.modules.keys()
        """,
    )
    status, output = run_pytest(tmp_path)
    assert (status, "1 passed" in output) == (0, True), output


def test_a_timeout_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_tests(tmp_path, "def test_one(torchserve): pass")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntorchserve_timeout = soon\n")
    status, output = run_pytest(tmp_path)
    assert status != 0
    assert "torchserve_timeout is no number of seconds: 'soon'" in output
