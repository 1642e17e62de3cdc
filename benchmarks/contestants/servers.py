"""How each contestant is set up, started and ended.

A peer has a virtual environment of its own, benchmarks/.venvs/NAME, with what NAME.txt pins. It
sees this project's packages through a .pth file, as a venv made with --system-site-packages sees
the system's: pip counts what is there (torch above all, which is not installed once more for each
peer), and installs beside it what a peer wants in another version; its own packages come first.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
import requests
from contestants.materials import (
    ContestantError,
    Materials,
    Picture,
    borrow_onnxruntime,
    hide_simplejpeg,
)

from marwright.errors import MarwrightError
from marwright.server import Ports, TorchServe
from marwright.server.java import find_java

__all__ = [
    "CONTESTANTS",
    "Contestant",
    "JAVA",
    "end_processes",
    "find_venv",
    "list_processes",
    "make_venvs",
    "PEERS",
    "post",
    "start_marwright",
    "measure_limit",
]

HERE = Path(__file__).parent
VENVS = HERE.parent / ".venvs"
BOOT_SECONDS = 90.0
END_SECONDS = 15.0
WORKERS = 2
JAVA = 40
"""Seconds of load in which Java compiles: plain TorchServe 365 requests/s at first, 700 then."""
PEERS = ("fastapi", "mlserver", "bentoml", "litserve", "ray_serve")


@dataclass(frozen=True)
class Contestant:
    """One way to serve the model; `start` gives the URL that predicts."""

    start: Callable[[Materials], AbstractContextManager[str]]
    takes_envelope: bool = False
    has_same_pixels: bool = True
    """Whether its probabilities are those of the common pixels and weights; else the label."""
    shares_socket: bool = False
    """Two processes accept from one socket, and one of them may get all connections."""
    warm_seconds: int = 6
    """Of load before anything is measured, until it gets no faster."""


def make_environment(materials: Materials, folder: Path, **more: str) -> dict[str, str]:
    """Return a program's environment: all that it writes lies in its folder."""
    return {
        **os.environ,
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP", "HOME", "BENCH_FOLDER"), str(folder)),
        "BENCH_MODEL": str(materials.run.path),
        "BENCH_OPTIMIZED": str(int(materials.optimized)),
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def find_venv(name: str) -> Path:
    """Return a peer's venv.

    Raises:
        ContestantError: it is not there, or holds what another version of NAME.txt pinned.
    """
    stamp = VENVS / name / ".ready"
    if not stamp.is_file() or stamp.read_bytes() != (HERE / f"{name}.txt").read_bytes():
        raise ContestantError("not set up: make bench WHAT=serving ARGS=--setup")
    return VENVS / name


def make_venvs() -> None:
    """Make what find_venv misses."""
    for requirements in sorted(HERE.glob("*.txt")):
        name = requirements.stem
        with contextlib.suppress(ContestantError):
            find_venv(name)
            continue
        print(f"{name}: installing {requirements.name}", flush=True)
        venv = VENVS / name
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        [packages] = venv.glob("lib/python3*/site-packages")
        shared = f"{sysconfig.get_path('purelib')}\n"
        (packages / "project.pth").write_text(shared, encoding="utf-8")
        command = [str(venv / "bin/pip"), "install", "--disable-pip-version-check", "--quiet"]
        if subprocess.run([*command, "-r", str(requirements)]).returncode:
            raise ContestantError(f"{name}: pip could not install {requirements.name}")
        (venv / ".ready").write_bytes(requirements.read_bytes())


def list_processes() -> list[psutil.Process]:
    """Return what runs below this process; serving.py adopts those whose parents end."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_processes() -> None:
    """End what a contestant left, this process's other children included: it has none."""
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        left = list_processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                stop(process)
        psutil.wait_procs(left, timeout=END_SECONDS)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextmanager
def make_folder() -> Iterator[Path]:
    """Give a contestant a private folder with a short path: sockets lie in it."""
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


@contextmanager
def run_program(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a server in its folder; ends it, and all that it started, as Ctrl-C would."""
    with (folder / "output.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        end_processes()


def wait_until(is_up: Callable[[], bool], folder: Path) -> None:
    """Wait until a server is up, or has ended, or its time is over."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException, LookupError, ValueError):
            if is_up():
                return
        if not list_processes():
            raise ContestantError(f"ended before it answered: {read_last_line(folder)}")
        time.sleep(0.1)
    raise ContestantError(f"not up within {BOOT_SECONDS:g} s: {read_last_line(folder)}")


def post(url: str, request: tuple[Path, str], timeout: float = 10.0) -> requests.Response:
    """Send one request."""
    file, kind = request
    return requests.post(
        url, data=file.read_bytes(), headers={"Content-Type": kind}, timeout=timeout
    )


def read_last_line(folder: Path) -> str:
    """Return the last line that a server wrote."""
    text = (folder / "output.log").read_text(encoding="utf-8", errors="replace")
    return (text.strip().splitlines() or ["it wrote nothing"])[-1].strip()


def find_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# Plain TorchServe, and marwright's.


def start_torchserve(one_thread: bool) -> Callable[[Materials], AbstractContextManager[str]]:
    """Return a start of the plain `torchserve` command with its default settings."""

    @contextmanager
    def start(materials: Materials) -> Iterator[str]:
        with make_folder() as folder:
            ports = Ports.find_free().to_properties()
            lines = [f"{key}={value}" for key, value in ports.items()]
            (folder / "config.properties").write_text("\n".join(lines), encoding="utf-8")
            command = [str(Path(sys.executable).with_name("torchserve")), "--foreground", "--ncs"]
            command += ["--disable-token-auth", "--ts-config", "config.properties"]
            command += ["--model-store", str(materials.store), "--models", "cnn=plain.mar"]
            more = {"JAVA_HOME": str(find_java().path.resolve().parents[1])}
            if one_thread:
                more["OMP_NUM_THREADS"] = "1"
            environment = make_environment(materials, folder, **more)
            with run_program(command, folder, environment):
                address = f"{ports['management_address']}/models/cnn"
                wait_until(lambda: has_workers(address), folder)
                yield f"{ports['inference_address']}/predictions/cnn"

    return start


def has_workers(address: str) -> bool:
    """Whether TorchServe says that every worker is READY."""
    workers = requests.get(address, timeout=5).json()[0]["workers"]
    return [item["status"] for item in workers] == ["READY"] * WORKERS


def start_marwright(
    name: str,
    *surroundings: Callable[[], AbstractContextManager[None]],
    properties: Mapping[str, str] = MappingProxyType({}),
    eager_batches: bool = True,
) -> Callable[[Materials], AbstractContextManager[str]]:
    """Return a start of the archive NAME.mar; tokens are off, as they are for plain TorchServe."""

    @contextmanager
    def start(materials: Materials) -> Iterator[str]:
        if reason := materials.failures.get(name):
            raise ContestantError(reason)
        with contextlib.ExitStack() as stack:
            for surround in surroundings:
                stack.enter_context(surround())
            stack.callback(end_processes)
            try:
                server = TorchServe(
                    materials.store,
                    models=[f"{name}.mar"],
                    properties={"disable_token_authorization": "true", **properties},
                    eager_batches=eager_batches,
                    timeout=BOOT_SECONDS,
                )
                stack.enter_context(server)
            except MarwrightError as error:
                raise ContestantError(" ".join(str(error).split())) from error
            yield f"{server.endpoint.inference_url}/predictions/cnn"

    return start


def borrow_onnx() -> AbstractContextManager[None]:
    """Let marwright's workers import the ONNX Runtime of the venv `onnx`, if need be."""
    return borrow_onnxruntime(find_venv("onnx"))


# The peers.


def start_peer(
    venv: str,
    *command: str,
    path: str = "/classify",
    takes_envelope: bool = False,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Materials], AbstractContextManager[str]]:
    """Return a start of a peer's program; what stands in braces is filled in."""

    @contextmanager
    def start(materials: Materials) -> Iterator[str]:
        programs = find_venv(venv) / "bin"
        with make_folder() as folder:
            port = find_port()
            fill = {"port": port, "folder": folder, "here": HERE, "other_port": find_port()}
            if venv == "mlserver":
                write_mlserver_settings(folder, port)
            environment = make_environment(
                materials,
                folder,
                BENCH_PORT=str(port),
                PYTHONPATH=str(HERE),
                OMP_NUM_THREADS="1",
                **{key: value.format(**fill) for key, value in variables.items()},
            )
            program, *rest = (word.format(**fill) for word in command)
            with run_program([str(programs / program), *rest], folder, environment):
                url = f"http://127.0.0.1:{port}{path}"
                request = materials.pictures[0].make_request(in_envelope=takes_envelope)
                wait_until(lambda: post(url, request).ok, folder)
                yield url

    return start


def write_mlserver_settings(folder: Path, port: int) -> None:
    """Write the two files that MLServer is set up by."""
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": find_port(),
        "metrics_port": find_port(),
        "parallel_workers": WORKERS,
        "environments_dir": str(folder / "environments"),
        "metrics_dir": str(folder / "metrics"),
    }
    model = {
        "name": "cnn",
        "implementation": "mlserver_model.Model",
        "max_batch_size": 32,
        "max_batch_time": 0.001,
    }
    (folder / "metrics").mkdir()
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")


UVICORN = "uvicorn fastapi_app:app --workers 2 --host 127.0.0.1 --port {port} --no-access-log"
BENTO = "bentoml serve bentoml_service:Server --host 127.0.0.1 --port {port}"
BENTOML = {"BENTOML_HOME": "{folder}", "BENTOML_DO_NOT_TRACK": "True"}
RAY = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_STATS_PORT": "{other_port}",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "{folder}/haproxy/haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "{folder}/haproxy/admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "{folder}/haproxy",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "{folder}/haproxy/server-state",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # with its 15, the load generator would go first
}

CONTESTANTS = {
    "torchserve_defaults": Contestant(start_torchserve(one_thread=False), warm_seconds=JAVA),
    "torchserve_one_thread": Contestant(start_torchserve(one_thread=True), warm_seconds=JAVA),
    "marwright": Contestant(start_marwright("marwright"), warm_seconds=JAVA),
    "marwright_pillow": Contestant(
        start_marwright("marwright", hide_simplejpeg), warm_seconds=JAVA
    ),
    "marwright_onnx": Contestant(start_marwright("marwright_onnx", borrow_onnx), warm_seconds=JAVA),
    "marwright_int8": Contestant(
        start_marwright("marwright_int8", borrow_onnx), has_same_pixels=False, warm_seconds=JAVA
    ),
    "marwright_scaled": Contestant(
        start_marwright("marwright_scaled"), has_same_pixels=False, warm_seconds=JAVA
    ),
    "fastapi": Contestant(
        start_peer("fastapi", *UVICORN.split(), "--log-level", "warning"),
        shares_socket=True,
    ),
    "mlserver": Contestant(
        start_peer(
            *("mlserver", "mlserver", "start", "{folder}"),
            path="/v2/models/cnn/infer",
            takes_envelope=True,
        ),
        takes_envelope=True,
    ),
    "bentoml": Contestant(
        start_peer("bentoml", *BENTO.split(), variables=BENTOML),
        shares_socket=True,
    ),
    "litserve": Contestant(start_peer("litserve", "python", "{here}/litserve_server.py")),
    "ray_serve": Contestant(start_peer("ray_serve", "python", "{here}/ray_app.py", variables=RAY)),
}
"""All that serve, by name; the two without a server are measure_limit's."""


def measure_limit(
    materials: Materials, picture: Picture, seconds: int, *, optimized: bool
) -> float:
    """Return what two processes without a server answer in a second, together."""
    command = [sys.executable, str(HERE / "in_process.py"), str(picture.path), str(seconds)]
    with make_folder() as folder:
        environment = make_environment(materials, folder, BENCH_OPTIMIZED=str(int(optimized)))
        processes = [
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(WORKERS)
        ]
        try:
            for process in processes:
                read_answer(process)  # "ready"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            return sum(float(read_answer(process)) for process in processes)
        finally:
            end_processes()


def read_answer(process: subprocess.Popen[str]) -> str:
    """Return the next line of in_process.py."""
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise ContestantError(f"in_process.py ended with status {process.wait()}")
    return line
