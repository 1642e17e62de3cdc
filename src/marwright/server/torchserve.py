"""TorchServe, started and stopped as one thing.

Java is started directly, not by the `torchserve` command: that one leaves a pid file that a second
server trips over, returns 0 where Java is missing, and hides the server's exit status
(ts/model_server.py). docs/decisions/0003-guard.md says who ends what.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType

import yaml

from marwright.archive.policy import POLICY_NAME, Policy, admit, find_policy
from marwright.archive.reader import Archive, read_manifest
from marwright.client import Client, Endpoint
from marwright.errors import (
    ArchiveError,
    ClientError,
    MarwrightError,
    NotReadyError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from marwright.server.eager_batches import write_eager_model
from marwright.server.java import find_java
from marwright.server.ports import Ports
from marwright.server.properties import DEFAULTS, render_properties
from marwright.server.worker_log import read_failures, read_tail
from marwright.storage import translate_os_errors

__all__ = ["list_archives", "TorchServe"]

GRACE_SECONDS = 10.0
"""How long the server may take to stop by itself."""
POLL_SECONDS = 0.05
NO_FOLDER = Path()
"""The run folder of a server that was not started yet."""
LONGEST_FOLDER = 80
"""Characters: worker sockets lie below it, and a Unix socket's path ends at 107."""
PORT_TRIES = 3
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SPIN_COUNT = "30000"
"""How long a thread of torch's stays awake for its next piece of work: a tenth of GNU OpenMP's own.

Where other work had the cores, a batch then took 2.8 ms instead of 45; elsewhere as long as before.
"""
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


class TorchServe:
    """One TorchServe process tree; use it in a `with` block.

    Example:
        with TorchServe(Path("model_store"), models=["cnn.mar"]) as server:
            print(server.client.predict("cnn", Path("seven.png")).json())

    `models` are file names in the store, loaded at start. `properties` override the defaults of
    marwright.server.properties; `ports` None means free ones. `policy` says which archives may be
    loaded and registered; a policy file in the store does so too. With `eager_batches` a worker
    takes the requests that wait and begins, and maxBatchDelay counts microseconds
    (marwright.server.eager_batches). `timeout` is the deadline in
    seconds for the whole start. Entering returns once every model has its workers READY, and raises
    a ServerError that says why not otherwise; leaving ends the process group and removes the
    private run folder (mode 0700) that holds tokens, sockets, temporary files and, without `logs`,
    the log.
    """

    def __init__(
        self,
        store: Path,
        *,
        models: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
        ports: Ports | None = None,
        policy: Policy | None = None,
        eager_batches: bool = True,
        timeout: float = 120.0,
        logs: Path | None = None,
    ) -> None:
        self.store = store.resolve()
        self.models = tuple(models)
        self.properties = {**DEFAULTS, **(properties or {})}
        self.eager_batches = eager_batches
        self.timeout = timeout
        self._wanted_ports = ports
        self._logs = logs
        self._guard: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._expected = self._read_archives()
        self.policy = find_policy(self.store, policy)
        self.run_folder = NO_FOLDER
        self.ready_seconds = 0.0
        """From the start of the process to the last worker READY."""

    def __enter__(self) -> TorchServe:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def client(self) -> Client:
        """A client of this server; closed with it."""
        if self._client is None:
            raise ServerError("the server is not running", remedy="call start() first")
        return self._client

    @property
    def endpoint(self) -> Endpoint:
        """Where the server answers."""
        return self.client.endpoint

    @property
    def log_file(self) -> Path:
        """The server's log; workers' output is in it."""
        return (self._logs or self.run_folder / "logs").resolve() / "server.log"

    @property
    def exit_status(self) -> int | None:
        """The server's exit status where it ended by itself; None while it runs."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.run_folder / "exit_status").read_text(encoding="ascii"))
        return None if self._guard is None or self._guard.poll() is None else 1

    def start(self) -> None:
        """Start the server and wait for its models; see the class for what is raised."""
        if self._guard is not None:
            raise ServerError("the server is running", remedy="stop() it first")
        for file in self.models:  # now, not when the object was made: the store may change
            admit(self.store / file, self.policy)
        for attempt in range(1, PORT_TRIES + 1):
            ports = self._wanted_ports or Ports.find_free()
            ports.check_free()
            try:
                self._launch(ports)
                self._wait_until_ready(self._expected, time.monotonic() + self.timeout)
                return
            except PortTakenError:
                # Between finding a free port and the server's bind another process took it.
                self.stop()
                if self._wanted_ports or attempt == PORT_TRIES:
                    raise
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the whole process group and remove the run folder; safe to call twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        guard, self._guard = self._guard, None
        if guard is not None:
            if guard.stdin is not None:
                guard.stdin.close()  # the guard now ends the group
            try:
                guard.wait(timeout=GRACE_SECONDS + 10)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()
        if self.run_folder != NO_FOLDER:
            self._end_orphans()
            shutil.rmtree(self.run_folder, ignore_errors=True)

    def _end_orphans(self) -> None:
        """End a server whose guard was killed; a guard that ends in order removes the file."""
        with contextlib.suppress(OSError, ValueError):
            group = int((self.run_folder / "server_pid").read_text(encoding="ascii"))
            os.killpg(group, signal.SIGKILL)

    def wait(self) -> int:
        """Block until the server ends by itself; return its exit status."""
        while (status := self.exit_status) is None:
            time.sleep(0.2)
        return status

    def _read_archives(self) -> set[tuple[str, str]]:
        """Return (name, version) of every archive to load; refuse broken ones and doubles."""
        if not self.store.is_dir():
            raise ServerError(
                f"there is no store {self.store}", remedy="create it, or pass another --store"
            )
        expected: dict[tuple[str, str], str] = {}
        for file in self.models:
            manifest = read_manifest(self.store / file)
            key = manifest.name, manifest.version
            if key in expected:
                raise ServerError(
                    f"{expected[key]} and {file} are both {key[0]} {key[1]}",
                    remedy="pack one of them with another --version",
                )
            expected[key] = file
        return set(expected)

    def _launch(self, ports: Ports) -> None:
        """Fill the run folder and start the guard, which starts the server."""
        java = find_java()
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise ServerError(
                "TorchServe is not installed", remedy="install it: pip install 'torchserve==0.12.0'"
            )
        package = Path(spec.origin).parent
        with translate_os_errors("make the server's run folder"):
            self.run_folder = _make_run_folder()
            for name in ("tmp", "workflows"):
                (self.run_folder / name).mkdir()
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
            configuration = self.run_folder / "config.properties"
            configuration.write_text(self._render(ports), encoding="utf-8")
            output = (self.run_folder / "output.log").open("wb")
        command = [
            str(java.path),
            f"-Dmodel_server_home={package.parent}",
            f"-Djava.io.tmpdir={self.run_folder / 'tmp'}",
            f"-Dlog4j.configurationFile={_find_file('log4j2.xml').as_uri()}",
            *self.properties.get("vmargs", "").split(),
            *("-cp", self._class_path(package / "frontend")),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(configuration)),
            "-ncs",  # no snapshots: what is to run is said by whoever starts the server
        ]
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        self._launched = time.monotonic()
        with output:
            self._guard = subprocess.Popen(
                [*guard, str(self.run_folder), str(GRACE_SECONDS), *command],
                cwd=self.run_folder,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we then stop the server in order
            )
        addresses = ports.to_properties()
        tokens_on = self.properties["disable_token_authorization"] != "true"
        endpoint = Endpoint(
            inference_url=addresses["inference_address"],
            management_url=addresses["management_address"],
            metrics_url=addresses["metrics_address"],
            key_file=self.run_folder / "key_file.json" if tokens_on else None,
            model_store=self.store,
            log_file=self.log_file,
            policy=self._write_policy(),
        )
        endpoint.write(self.run_folder / "endpoint.json")
        self._client = Client(endpoint)

    def _class_path(self, frontend: Path) -> str:
        """Return where Java finds the server's classes, and ours before them."""
        folder = self.run_folder / "classes"
        if self.eager_batches and write_eager_model(frontend / "model-server.jar", folder):
            return os.pathsep.join([str(folder), str(frontend / "*")])
        return str(frontend / "*")

    def _write_policy(self) -> Path | None:
        """Write the policy where those who register look for it, and nobody else can change it."""
        if self.policy is None:
            return None
        path = self.run_folder / POLICY_NAME
        self.policy.write(path)
        return path

    def _render(self, ports: Ports) -> str:
        return render_properties(
            {
                "metrics_config": str(_find_file("metrics.yaml")),
                **self.properties,
                **ports.to_properties(),
                "model_store": str(self.store),
                "workflow_store": str(self.run_folder / "workflows"),
                **({"load_models": ",".join(self.models)} if self.models else {}),
            }
        )

    def _environment(self) -> dict[str, str]:
        """Return the environment: temporary files and logs below the run folder."""
        temporary = str(self.run_folder / "tmp")
        logs = str(self.log_file.parent)
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("TS_")},
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary),
            **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
            **self._limit_threads(),
        }

    def _limit_threads(self) -> dict[str, str]:
        """Divide the cores among the workers, before anything in one of them makes threads.

        Two workers with a thread for every core are 19 times slower than with one each. What the
        user's environment says stands.
        """
        workers = sum(_read_workers(self.store / file) for file in self.models)
        threads = str(max(1, _count_cores() // workers if workers else 1))
        limits = dict.fromkeys(THREAD_LIMITS, threads)
        if "OMP_WAIT_POLICY" not in os.environ:
            limits["GOMP_SPINCOUNT"] = SPIN_COUNT
        return {name: value for name, value in limits.items() if name not in os.environ}

    def _wait_until_ready(self, expected: set[tuple[str, str]], deadline: float) -> None:
        """Poll under one deadline: process alive, API up, every model's workers READY."""
        self._poll(self._api_answers, deadline, "the management API to answer")
        waiting = set(expected)

        def all_ready() -> bool:
            for name, version in sorted(waiting):
                if self.client.models.describe(name, version).ready:
                    waiting.discard((name, version))
            return not waiting

        self._poll(all_ready, deadline, "READY workers")
        self.ready_seconds = time.monotonic() - self._launched

    def _api_answers(self) -> bool:
        key_file = self.endpoint.key_file
        if key_file is not None and not key_file.exists():
            return False
        self.client.models.list()
        return True

    def _poll(self, is_true: Callable[[], bool], deadline: float, goal: str) -> None:
        while True:
            self._check_alive()
            self._check_workers()
            try:
                if is_true():
                    return
                doubt = "no worker is READY yet"
            except ClientError as exc:
                doubt = str(exc)
            if time.monotonic() > deadline:
                raise NotReadyError(
                    f"the server did not start within {self.timeout:g} s",
                    expected=goal,
                    found=doubt,
                    remedy="raise --timeout, or see the log's last lines below, if there are any",
                    detail=read_tail(self.log_file),
                )
            time.sleep(POLL_SECONDS)

    def _check_alive(self) -> None:
        status = self.exit_status
        if status is None:
            return
        raise self.describe_death(status)

    def describe_death(self, status: int) -> MarwrightError:
        """Return the error for a server that ended by itself with `status`."""
        tail = read_tail(self.log_file) + "\n" + read_tail(self.run_folder / "output.log")
        if "Address already in use" in tail or "BindException" in tail:
            return PortTakenError(
                "another process took one of the server's ports",
                remedy="start again, or pass --free-ports",
                detail=tail.strip(),
            )
        if status == -signal.SIGKILL:
            return ServerDiedError(
                "the server was killed (SIGKILL)",
                remedy="if nobody did, memory ran out: give it fewer workers or more memory",
                detail=tail.strip(),
            )
        return ServerDiedError(
            f"the server ended with status {status}",
            remedy="its last lines are below",
            detail=tail.strip(),
        )

    def _check_workers(self) -> None:
        for failure in read_failures(self.log_file, offset=self._log_offset):
            raise failure.to_error()


def _count_cores() -> int:
    """Return the cores this process may use: affinity, and a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        quota, period = CPU_LIMIT.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _read_workers(path: Path) -> int:
    """Return how many workers an archive starts with; 1 where it does not say."""
    with (
        contextlib.suppress(ArchiveError, yaml.YAMLError, AttributeError, TypeError, ValueError),
        Archive.open(path) as archive,
    ):
        if archive.manifest.config_file:
            values = yaml.safe_load(archive.read(archive.manifest.config_file))
            return max(1, int(values.get("minWorkers", 1)))
    return 1


def list_archives(store: Path) -> list[str]:
    """Return the file names of a store's archives, the lowest version of a model first.

    TorchServe makes the first version that it loads the default one.
    """
    manifests = {path.name: read_manifest(path) for path in sorted(store.glob("*.mar"))}
    return sorted(
        manifests,
        key=lambda file: (
            manifests[file].name,
            [
                (part.isdigit(), int(part) if part.isdigit() else 0, part)
                for part in re.split(r"[._-]", manifests[file].version)
            ],
        ),
    )


def _make_run_folder() -> Path:
    """Make a private folder (0700) whose path leaves room for a socket's name."""
    base = Path(tempfile.gettempdir()).resolve()
    if len(str(base)) > LONGEST_FOLDER - len("/marwright-12345678"):
        base = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="marwright-", dir=base))


def _find_file(name: str) -> Path:
    """Return a file that comes with this package."""
    return Path(str(resources.files("marwright.server") / name))
