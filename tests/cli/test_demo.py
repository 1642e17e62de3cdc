from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "marwright", "demo", "--json"]


def start_demo(folder: Path) -> subprocess.Popen[str]:
    """Start the demo in a folder of its own, its temporary files there too."""
    (folder / "tmp").mkdir(parents=True)
    return subprocess.Popen(
        COMMAND,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_demos_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    demos = [start_demo(tmp_path / name) for name in ("a", "b")]
    for demo in demos:
        output, errors = demo.communicate()
        assert demo.returncode == 0, errors
        assert json.loads(output)["version_switch"] == ["1.0", "2.0", "1.0"]


@pytest.mark.parametrize("step", ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_step_leaves_nothing(
    tmp_path: Path, step: str, number: signal.Signals
) -> None:
    with start_demo(tmp_path / "demo") as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if step in line:
                break
        demo.send_signal(number)
        rest = demo.stderr.read()
        status = demo.wait(60)
    assert status == 128 + number
    assert "Traceback" not in rest
    left = [path for path in (tmp_path / "demo").rglob(".*") if path.name != ".gitkeep"]
    assert not left
    # torch makes its user's compile cache when torchvision is imported; it is meant to stay.
    names = [path.name for path in (tmp_path / "demo/tmp").iterdir()]
    assert [name for name in names if not name.startswith("torchinductor_")] == []
