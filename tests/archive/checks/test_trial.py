"""What only a process of its own can show: how a trial ends, and what it leaves behind.

Most handlers here end while TorchServe is imported, in a module that stands where TorchServe's is
looked for: torch takes seconds to import, and adds nothing to these claims.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from marwright.archive.checks.findings import Finding
from marwright.archive.checks.preflight import run_preflight
from marwright.archive.checks.trial import Batch, Trial, try_worker
from marwright.server import TorchServe

Make = Callable[..., Any]
HANDLE = "def handle(data, context):\n"
ANSWER = HANDLE + "    return data and [b'x' for row in data]\n"
END = "import os\nos._exit(0)\n"


@pytest.fixture
def try_early(unpacked: Make) -> Callable[..., Trial]:
    """Return a function that runs code where a worker imports TorchServe."""

    def run(code: str, *, timeout: float = 30) -> Trial:
        folder, _ = unpacked(ANSWER, ts=code)
        return try_worker(folder, samples=[], batches=[], timeout=timeout)

    return run


@pytest.fixture
def find_early(unpacked: Make) -> Callable[..., Finding]:
    """Return a function that returns what the preflight finds of such code."""

    def find(code: str, *, timeout: float = 30) -> Finding:
        (found,) = run_preflight(*unpacked(ANSWER, ts=code), timeout=timeout).findings
        return found

    return find


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(7)", "the process ended itself with exit status 7"),
        ("import sys; sys.exit('enough')", "the process ended itself with exit status 1"),
        ("import os; os.kill(os.getpid(), 15)", "the process was ended by SIGTERM"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL, as the system does where memory is short"),
        ("import os; os.abort()", "the process was ended by SIGABRT"),
    ],
)
def test_a_death_is_an_error_that_tells_how(
    find_early: Callable[..., Finding], code: str, words: str
) -> None:
    found = find_early(code)
    assert (str(found.severity), found.rule.id) == ("error", "W503")
    assert words in found.found
    assert found.found.endswith("while importing TorchServe")


def test_a_crash_names_the_line_and_the_stack(find_early: Callable[..., Finding]) -> None:
    found = find_early("import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()\n")
    assert (found.rule.id, found.place) == ("W503", "ts.py:3")
    assert "SIGSEGV" in found.found
    assert 'File "ts.py", line 3, in crash\n    ctypes.string_at(0)' in found.detail
    assert "trial_worker" not in found.detail


def test_a_death_without_a_stack_is_told_with_the_last_words(
    find_early: Callable[..., Finding],
) -> None:
    found = find_early("import os\nprint('last\\nwords', flush=True)\nos._exit(1)")
    assert found.detail == "last\nwords"


@pytest.mark.parametrize("wait", ["time.sleep(60)", "while True: pass", "os.read(os.pipe()[0], 1)"])
def test_what_hangs_is_an_error_with_its_stack(
    find_early: Callable[..., Finding], wait: str
) -> None:
    started = time.monotonic()
    found = find_early(f"import os, time\ndef wait():\n    {wait}\nwait()\n", timeout=0.5)
    assert (str(found.severity), found.rule.id, found.place) == ("error", "W504", "ts.py:3")
    assert found.found == "the time limit passed while importing TorchServe"
    assert found.detail.index('File "ts.py", line 4, in <module>') < found.detail.index(
        "line 3, in"
    )
    assert time.monotonic() - started < 3


def test_what_takes_the_clock_away_or_stops_itself_is_killed(
    find_early: Callable[..., Finding],
) -> None:
    code = "import faulthandler, os\nfaulthandler.cancel_dump_traceback_later()\n"
    found = find_early(code + "os.kill(os.getpid(), 19)\n", timeout=0.5)
    assert found.rule.id == "W504"


@pytest.mark.parametrize(
    "start",
    [
        "import subprocess\npid = subprocess.Popen(['sleep', '300']).pid",
        "pid = os.fork() or sleep()",
    ],
    ids=["program", "fork"],
)
def test_nothing_that_was_started_outlives_the_trial(
    try_early: Callable[..., Trial], tmp_path: Path, start: str
) -> None:
    file = tmp_path / "pid"
    code = f"import os, time\ndef sleep():\n    time.sleep(300)\n    os._exit(0)\n{start}\n"
    code += f"open({str(file)!r}, 'w').write(str(pid))\n"
    started = time.monotonic()
    try_early(code + END)
    assert time.monotonic() - started < 10  # though its child holds the pipes open
    assert _ends(int(file.read_text()))


def test_what_is_printed_does_no_harm_and_is_bounded(try_early: Callable[..., Trial]) -> None:
    code = "import sys\nfor _ in range(300):\n"
    code += "    print('x' * 9999, flush=True)\n    sys.stderr.write('y' * 9999)\n"
    trial = try_early(code + END)
    assert trial.status == 0
    assert len(trial.output) == 64 << 10
    assert try_early("print('a word', flush=True)\n" + END).output == "a word\n"


def test_the_caller_is_as_it_was(try_early: Callable[..., Trial]) -> None:
    def look() -> Any:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        return Path.cwd(), descriptors, sys.path[:], dict(os.environ)

    try_early(END)
    before = look()
    try_early(END)
    assert look() == before


def test_peak_memory_is_the_childs_own(unpacked: Make) -> None:
    # Linux hands the parent's peak on to ru_maxrss of its children.
    code = """
import sys
from pathlib import Path
ballast = bytearray(800_000_000)
from marwright.archive.checks.trial import try_worker
trial = try_worker(Path(sys.argv[1]), samples=[], batches=[], timeout=60)
print(trial.events[-1]["memory_bytes"])
"""
    folder, _ = unpacked(ANSWER, ts=END)
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 5_000_000 < int(done.stdout) < 100_000_000


def test_a_module_that_hides_one_of_a_workers_is_found_as_a_worker_would(unpacked: Make) -> None:
    made = unpacked(ANSWER, queue="raise RuntimeError('not that queue')")
    (found,) = run_preflight(*made).findings
    assert found.rule.id == "W503"
    assert found.detail.endswith("RuntimeError: not that queue")


def test_a_whole_trial_leaves_the_folder_as_it_was(unpacked: Make) -> None:
    made = unpacked(ANSWER, marwright="raise RuntimeError", trial="raise RuntimeError")
    before = sorted(made[0].rglob("*"))
    assert [item.rule.id for item in run_preflight(*made).findings] == ["W531"]
    assert sorted(made[0].rglob("*")) == before


@pytest.mark.slow  # two torch imports, and the time limit
def test_a_handler_that_hangs_or_crashes_is_found_at_each_stage(unpacked: Make) -> None:
    source = f"import time\n{HANDLE}    if data is None: time.sleep(300)\n"
    (found,) = run_preflight(*unpacked(source), timeout=20).findings
    assert (found.rule.id, found.place) == ("W504", "handler.py:3")
    assert found.found.endswith("while loading")
    source = f"import ctypes\n{HANDLE}    if data: ctypes.string_at(0)\n"
    (found,) = run_preflight(*unpacked(source, samples=("a",))).findings
    assert (found.rule.id, found.place) == ("W503", "handler.py:3")
    assert found.found.endswith("while answering a batch of 1")


def _ends(pid: int) -> bool:
    """Whether a process that was killed is gone soon; nobody may have collected its status."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


FACTS = """\
import json, os, sys
def handle(data, context):
    facts = {
        "path": sys.path,
        "cwd": os.getcwd(),
        "environment": {
            key: value
            for key, value in os.environ.items()
            if key.startswith("TS_") or key == "PYTHONPATH"
        },
        "properties": context.system_properties,
        "config": context.model_yaml_config,
        "manifest": context.manifest,
        "modules": sorted(name for name in sys.modules if name.split(".")[0] == "ts"),
    }
    return data and [json.dumps(facts)] * len(data)
"""


@pytest.mark.server
def test_a_worker_of_torchserve_and_a_trial_see_the_same(
    unpacked: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder, _ = unpacked(FACTS, settings="batchSize: 3\nown: [1]\n", samples=("x",))
    store = tmp_path / "store"
    store.mkdir()
    shutil.make_archive(str(tmp_path / "m"), "zip", folder)
    (tmp_path / "m.zip").rename(store / "m.mar")
    with TorchServe(store, models=["m.mar"]) as server:
        theirs = json.loads(server.client.predict("m", b"x").body)
    trial = try_worker(
        folder,
        samples=[(folder / "MAR-INF/samples/0.txt", None)],
        batches=[Batch(((0, "whole"),))],
        timeout=60,
    )
    answered = trial.find("answered")
    assert answered is not None
    ours = json.loads(base64.b64decode(answered["answers"][0]["body"]))
    assert _without_folder(ours) == _without_folder(theirs)
    assert ours["path"][0] == ours["cwd"] == str(folder)


def _without_folder(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a handler saw, its model_dir written as FOLDER."""
    text = json.dumps(facts).replace(facts["properties"]["model_dir"], "FOLDER")
    seen = json.loads(text)
    # What marwright itself imports of TorchServe's, besides a worker's.
    seen["modules"] = [name for name in seen["modules"] if "handler_utils" not in name]
    return seen
