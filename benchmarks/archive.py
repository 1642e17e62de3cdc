"""How long archives take: packing 1 GiB beside torch-model-archiver, repack, inspect, preflight.

Run as `make bench WHAT=archive`; writes benchmarks/results/archive.json. Every claim is a ratio
within one run, contestants interleaved; absolute times stand beside it for orientation only. Needs
some 6 GiB of free disk and ten minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROUNDS = 3
QUICK_ROUNDS = 7
WEIGHTS_BYTES = 1 << 30
RESULTS = Path(__file__).parent / "results/archive.json"
HANDLER = (
    "class Handler:\n"
    "    def initialize(self, context): ...\n"
    "    def handle(self, data, context): return ['ok'] * len(data)\n"
)
BY_HAND = "import sys, torch; torch.jit.load(sys.argv[1])"


@dataclass(frozen=True)
class Run:
    """What one command took."""

    seconds: float
    peak_mb: float


def main() -> None:
    """Measure everything and write the result."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        result = {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "versions": {p: version(p) for p in ("marwright", "torch", "torch-model-archiver")},
            "python": platform.python_version(),
            "pack": measure_pack(folder),
            "repack": measure_repack(folder),
            "inspect": measure_inspect(folder),
            "preflight": measure_preflight(folder),
        }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def measure_pack(folder: Path) -> dict[str, Any]:
    """Pack 1 GiB of weights that do not shrink: both of that tool's zip formats, and ours."""
    write_weights(folder / "weights.pt")
    (folder / "handler.py").write_text(HANDLER, encoding="utf-8")
    arguments = ["--model-name", "big", "--version", "1.0", "--handler", "handler.py"]
    arguments += ["--serialized-file", "weights.pt"]
    archiver = [str(Path(sys.executable).with_name("torch-model-archiver")), *arguments]
    marwright = [sys.executable, "-m", "marwright", "pack", *arguments, "--no-preflight"]
    for place in ("deflated", "stored", "ours"):
        (folder / place).mkdir()
    runs = interleave(
        {
            "torch-model-archiver": [*archiver, "--export-path", "deflated"],
            "torch-model-archiver zip-store": [
                *archiver,
                *("--export-path", "stored", "--archive-format", "zip-store"),
            ],
            "marwright pack": [*marwright, "--export-path", "ours"],
        },
        folder,
        rounds=ROUNDS,
        # Each writes a new file: over an old one, ext4 waits for the disk before it renames.
        before=lambda: clear(folder, "deflated/big.mar", "stored/big.mar", "ours/big.mar"),
    )
    return describe(runs, over="marwright pack", faster=True)


def measure_repack(folder: Path) -> dict[str, Any]:
    """Change the handler of the 1 GiB archive, beside `cp` of it: as a command and in process."""
    (folder / "new").mkdir()
    (folder / "new/handler.py").write_text(HANDLER.replace("ok", "new"), encoding="utf-8")
    arguments = ["ours/big.mar", "--handler", "new/handler.py", "--out", "ours/new.mar"]
    repack = [sys.executable, "-m", "marwright", "repack", *arguments, "--no-preflight"]
    copy = ["cp", "ours/big.mar", "ours/copy.mar"]
    runs = interleave(
        {
            "cp": copy,
            "marwright repack": repack,
            "cp, until on disk": ["sh", "-c", f"{shlex.join(copy)} && sync -f ours"],
            "marwright repack, until on disk": [
                *("sh", "-c", f"{shlex.join(repack)} && sync -f ours")
            ],
        },
        folder,
        rounds=QUICK_ROUNDS,
        before=lambda: clear(folder, "ours/copy.mar", "ours/new.mar"),
    )
    runs["repack() in process"] = [measure_in_process(folder) for _ in range(QUICK_ROUNDS)]
    result = describe(runs, over="cp")
    written = describe(runs, over="cp, until on disk")
    name = "marwright repack, until on disk"
    return {**result, name: written[name]}


def measure_in_process(folder: Path) -> Run:
    """Return what repack() takes once marwright is imported."""
    clear(folder, "ours/new.mar")
    os.sync()
    answer = subprocess.run(
        [sys.executable, "-c", REPACK], cwd=folder, capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, answer.stdout.split())
    return Run(seconds, peak)


REPACK = (
    "import re, time; from pathlib import Path\n"
    "from marwright.archive.repack import Changes, repack\n"
    "started = time.perf_counter()\n"
    "changes = Changes(handler='new/handler.py')\n"
    "repack(Path('ours/big.mar'), changes, out=Path('ours/new.mar'), preflight=None)\n"
    "seconds = time.perf_counter() - started\n"
    "status = Path('/proc/self/status').read_text()\n"
    "print(seconds, int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024)\n"
)


def clear(folder: Path, *names: str) -> None:
    """Remove files that an earlier round left."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def measure_inspect(folder: Path) -> dict[str, Any]:
    """Look into the 1 GiB archive, beside an empty Python."""
    runs = interleave(
        {
            "python -c pass": [sys.executable, "-c", "pass"],
            "marwright inspect": [sys.executable, "-m", "marwright", "inspect", "ours/big.mar"],
        },
        folder,
        rounds=QUICK_ROUNDS,
    )
    return describe(runs, over="python -c pass")


def measure_preflight(folder: Path) -> dict[str, Any]:
    """Try the CNN's archive, beside importing torch and loading its model by hand."""
    program = (
        "import sys; from pathlib import Path\n"
        "from marwright.training.settings import Settings\n"
        "from marwright.training.train import train_run\n"
        "from marwright.archive import pack_run\n"
        "run = train_run(Path('run'), settings=Settings(epochs=1))\n"
        "pack_run(run, out=Path('cnn.mar'), preflight=None)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    subprocess.run(
        [sys.executable, "-m", "marwright", "extract", "cnn.mar", "--to", "unpacked"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    runs = interleave(
        {
            "by hand": [sys.executable, "-c", BY_HAND, "run/model.pt"],
            "preflight": [sys.executable, "-c", PREFLIGHT, "unpacked"],
            "marwright check": [sys.executable, "-m", "marwright", "check", "cnn.mar"],
        },
        folder,
        rounds=QUICK_ROUNDS,
    )
    return describe(runs, over="by hand")


PREFLIGHT = (
    "import sys; from pathlib import Path\n"
    "from marwright.archive.checks.preflight import run_preflight\n"
    "from marwright.archive.reader import read_manifest\n"
    "folder = Path(sys.argv[1])\n"
    "assert run_preflight(folder, read_manifest(folder)).figures\n"
)


def interleave(
    commands: Mapping[str, list[str]],
    folder: Path,
    *,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[Run]]:
    """Run the commands in turns; each gets a temporary folder on the same disk."""
    (folder / "tmp").mkdir(exist_ok=True)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            before()
            runs[name].append(run(command, folder))
    return runs


def run(command: list[str], folder: Path) -> Run:
    """Run one command and return its seconds, with the most memory that it had."""
    os.sync()  # what others wrote is not to be written out on this one's time
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, read_peak(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return Run(seconds, peak)


def read_peak(pid: int) -> float:
    """Return the most memory that a process has had so far, in MB; its children's is not in it."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(match[1]) / 1024
    return 0.0


def describe(runs: Mapping[str, list[Run]], *, over: str, faster: bool = False) -> dict[str, Any]:
    """Return medians with spread, and each one's ratio to `over`, round by round."""
    base = [item.seconds for item in runs[over]]
    result: dict[str, Any] = {}
    for name, items in runs.items():
        seconds = [item.seconds for item in items]
        ratios = [mine / other for mine, other in zip(seconds, base, strict=True)]
        result[name] = {
            "median_seconds": round(statistics.median(seconds), 3),
            "min_seconds": round(min(seconds), 3),
            "max_seconds": round(max(seconds), 3),
            "peak_mb": round(max(item.peak_mb for item in items)),
            "ratio" if not faster else "times_slower": round(statistics.median(ratios), 2),
            "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return result


def write_weights(path: Path) -> None:
    """Write bytes that no compressor shrinks, as trained weights hardly do."""
    block = os.urandom(1 << 24)
    with path.open("wb") as stream:
        for number in range(WEIGHTS_BYTES >> 24):
            stream.write(number.to_bytes(8, "big") + block[8:])


if __name__ == "__main__":
    main()
