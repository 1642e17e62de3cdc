"""TorchServe, started and stopped as one thing.

Java is started directly, not by the `torchserve` command: that one leaves a pid file that a second
server trips over, returns 0 where Java is missing, and hides the server's exit status
(ts/model_server.py). docs/decisions/0003-guard.md says who ends what.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from marwright.archive.admission import find_policy
from marwright.archive.policy import Policy
from marwright.client import Client, Endpoint
from marwright.errors import (
    ClientError,
    MarwrightError,
    ModelLoadError,
    ModelNotFoundError,
    NotReadyError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from marwright.server.deployment import Deployment
from marwright.server.launch import RUNNING_NAME, STAGING, Launch, clear_run_folder, make_run_folder
from marwright.server.ports import Ports
from marwright.server.process import Process
from marwright.server.properties import read_properties
from marwright.server.readback import compare_properties
from marwright.server.staging import Staging
from marwright.server.state import compare, read_state
from marwright.server.wanted import Wanted, list_wanted
from marwright.server.worker_log import read_failures, read_tail
from marwright.storage import translate_os_errors

__all__ = ["TorchServe"]

GRACE_SECONDS = 10.0
"""How long the server may take to stop by itself."""
POLL_SECONDS = 0.05
NO_FOLDER = Path()
"""The run folder of a server that was not started yet."""
PORT_TRIES = 3


class TorchServe:
    """One TorchServe process tree; use it in a `with` block.

    Example:
        with TorchServe(Path("model_store"), models=["cnn.mar"]) as server:
            print(server.client.predict("cnn", Path("seven.png")).json())

    `models` are file names in the store, loaded at start. `properties` are keys of
    config.properties that are to differ from marwright's; `ports` None means free ones. `policy`
    says which archives may be loaded and registered; a policy file in the store does so too. With
    `eager_batches` a worker takes the requests that wait and begins, and maxBatchDelay counts
    microseconds (marwright.server.frontend). `timeout` is the deadline in seconds for the
    whole start. All this and more stands in a deployment: see `deploy`. Entering returns once every
    model has its workers READY, and raises a ServerError that says why not otherwise; leaving ends
    the process group and removes the private run folder (mode 0700) that holds tokens, sockets,
    temporary files and, without `logs`, the log.
    """

    linger = 0.0
    """Seconds that the server outlives this process, to be adopted by another."""
    health_url = ""
    """Where its supervisor answers, if it has one."""
    log_offset = 0
    """Bytes of the log that are older than the last start."""

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
        deployment = Deployment.model_validate(
            {
                "store": store.resolve(),
                "models": [{"archive": file} for file in models],
                "properties": dict(properties or {}),
                "eager_batches": eager_batches,
                "logging": {"folder": logs and logs.resolve()},
                "supervision": {"start_timeout": timeout},
            }
        )
        self._set_up(deployment, policy=policy, ports=ports)

    @classmethod
    def deploy(cls, deployment: Deployment, *, partial: bool = False) -> TorchServe:
        """Return the server that a deployment describes, not started yet.

        With `partial`, what cannot be loaded does not keep the rest from being served: `refused`
        and `failed` name it.
        """
        server = cls.__new__(cls)
        ports = None if deployment.ports == "free" else Ports.from_deployment(deployment)
        server._set_up(deployment, ports=ports, partial=partial)
        return server

    def _set_up(
        self,
        deployment: Deployment,
        *,
        policy: Policy | None = None,
        ports: Ports | None = None,
        partial: bool = False,
        run_folder: Path = NO_FOLDER,
    ) -> None:
        self.deployment = deployment
        self.store = deployment.store.resolve()
        self.timeout = deployment.supervision.start_timeout
        self.partial = partial
        self._wanted_ports = ports
        if run_folder == NO_FOLDER:
            self._process: Process | None = None
            self._client: Client | None = None
        if not self.store.is_dir():
            raise ServerError(
                f"there is no store {self.store}", remedy="create it, or pass another --store"
            )
        self.policy = find_policy(self.store, policy or deployment.read_policy())
        self.refused: dict[str, MarwrightError] = {}
        """Archives that were not loaded, by file name."""
        self.failed: dict[tuple[str, str], ModelLoadError] = {}
        """Versions whose workers ended while they loaded, by model and version."""
        self.wanted = list_wanted(deployment, refused=self.refused if partial else None)
        self.run_folder = run_folder
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
        folder = self.deployment.logging.folder or self.run_folder / "logs"
        return folder.resolve() / "server.log"

    @property
    def staging(self) -> Staging:
        """The archives as TorchServe reads them."""
        return Staging(self.run_folder / STAGING, self.policy)

    @property
    def exit_status(self) -> int | None:
        """The server's exit status where it ended by itself; None while it runs."""
        return None if self._process is None else self._process.exit_status

    def start(self) -> None:
        """Start the server and wait for its models; see the class for what is raised."""
        if self._process is not None:
            raise ServerError("the server is running", remedy="stop() it first")
        for attempt in range(1, PORT_TRIES + 1):
            ports = self._wanted_ports or Ports.find_free()
            try:
                self._start(ports)
                return
            except PortTakenError:
                # Between finding a free port and the server's bind another process took it.
                self.stop()
                if self._wanted_ports or attempt == PORT_TRIES:
                    raise
            except BaseException:
                self.stop()
                raise

    def restart(self, deployment: Deployment) -> None:
        """Start again in the same run folder, with free ports at the same ones, after ending it.

        Raises what `start` raises; then nothing runs, and the run folder waits for another try.
        """
        self._end(keep_folder=True)
        ports = None if self._client is None else Ports.from_properties(self._read_properties())
        self._set_up(deployment, run_folder=self.run_folder, partial=self.partial)
        if deployment.ports != "free":
            ports = Ports.from_deployment(deployment)
        try:
            self._start(ports or Ports.find_free())
        except BaseException:
            self._end(keep_folder=True)
            raise

    @classmethod
    def adopt(cls, run_folder: Path) -> TorchServe:
        """Take over a running server whose supervisor died; it is not interrupted.

        Raises:
            ServerDiedError: it is gone, or was ended here since its run folder cannot be read.
            ServerError: it is held by another.
        """
        process = Process.adopt(run_folder, grace=GRACE_SECONDS)
        server = cls.__new__(cls)
        try:
            with translate_os_errors(f"read {run_folder}"):
                text = (run_folder / RUNNING_NAME).read_text(encoding="utf-8")
            deployment = Deployment.model_validate_json(text)
            server._set_up(deployment, run_folder=run_folder, partial=True)
            server._client = Client(Endpoint.read(run_folder / "endpoint.json"))
            server._wanted_ports = Ports.from_properties(server._read_properties())
        except (MarwrightError, ValueError) as exc:
            process.end()
            raise ServerDiedError(
                f"the server in {run_folder} cannot be adopted, and was ended",
                found="; ".join(str(exc).splitlines()[:3]),
            ) from exc
        server._process = process
        return server

    def stop(self) -> None:
        """End the whole process group and remove the run folder; safe to call twice."""
        self._end(keep_folder=False)

    def _end(self, *, keep_folder: bool) -> None:
        if self._client is not None:
            self._client.close()
            if not keep_folder:
                self._client = None
        process, self._process = self._process, None
        if process is not None:
            process.end(keep_folder=keep_folder)
        elif self.run_folder != NO_FOLDER and not keep_folder:
            shutil.rmtree(self.run_folder, ignore_errors=True)

    def _start(self, ports: Ports) -> None:
        ports.check_free()
        self._launch(ports)
        self._wait_until_ready(time.monotonic() + self.timeout)

    def _read_properties(self) -> dict[str, str]:
        """Return what the running server was started with."""
        return read_properties(self.run_folder / "config.properties")

    def wait(self) -> int:
        """Block until the server ends by itself; return its exit status."""
        while (status := self.exit_status) is None:
            time.sleep(0.2)
        return status

    def _stage(self) -> dict[tuple[str, str], str]:
        """Bring the wanted archives where TorchServe reads them; return their names there."""
        staging, files = self.staging, {}
        for item in self.wanted:
            try:
                files[item.key] = staging.stage(item)
            except MarwrightError as exc:
                if not self.partial:
                    raise
                self.refused[item.path.name] = exc
                staging.unstage(item.path.name)  # what an earlier start brought in
        return files

    def _launch(self, ports: Ports) -> None:
        """Fill the run folder and start the guard, which starts the server."""
        with translate_os_errors("make the server's run folder"):
            if self.run_folder == NO_FOLDER or not self.run_folder.exists():
                self.run_folder = make_run_folder()
            clear_run_folder(self.run_folder)
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            self.log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
        launch = Launch(
            deployment=self.deployment,
            policy=self.policy,
            wanted=self.wanted,
            files=self._stage(),
            run_folder=self.run_folder,
            log_file=self.log_file,
        )
        properties = launch.write_properties(ports)
        endpoint = replace(launch.make_endpoint(properties), health_url=self.health_url)
        command = launch.make_command(properties, key_file=endpoint.supervisor_key)
        self._launched = time.monotonic()
        self._process = Process.start(
            self.run_folder,
            command,
            environment=launch.make_environment(),
            grace=GRACE_SECONDS,
            linger=self.linger,
        )
        self._client = Client(endpoint)
        endpoint.write(self.run_folder / "endpoint.json")

    def _wait_until_ready(self, deadline: float) -> None:
        """Poll under one deadline: process alive, API up, every model's workers READY."""
        self._poll(self._api_answers, deadline, "the management API to answer")
        self._register_idle()
        waiting = [item for item in self.wanted if item.path.name not in self.refused]

        def all_ready() -> bool:
            waiting[:] = [item for item in waiting if not self._is_settled(item)]
            return not waiting

        try:
            self._poll(all_ready, deadline, "READY workers")
        except NotReadyError:
            if not self.partial:  # else the others serve, and the supervisor watches these
                raise
        self.ready_seconds = time.monotonic() - self._launched
        differences = compare_properties(self.log_file, self._read_properties())
        if not self.partial:  # else those of the models are the supervisor's to mend
            wanted = [item for item in self.wanted if item.path.name not in self.refused]
            # `properties` may have told TorchServe to load others too.
            differences += compare(wanted, read_state(self.client), others=False)
        if differences:
            raise ServerError(
                "the server does not run as it was configured",
                found=differences[0],
                remedy="this is a mistake of marwright's, or of another version of TorchServe",
                detail="\n".join(differences),
            )

    def _register_idle(self) -> None:
        """Register the versions without workers: at its start TorchServe gives each one at least.

        An archive says in vain that it wants none, unless its maxWorkers is 0: TorchServe then
        takes the registration's own number (ModelConfig, ApiUtils.handleRegister).
        """
        for item in self.wanted:
            if item.workers or item.path.name in self.refused:
                continue
            try:
                self.client.models.register(item.path.name, workers=0, synchronous=False)
                if item.default:
                    self.client.models.set_default(item.name, item.version, force=True)
            except MarwrightError as exc:
                if not self.partial:
                    raise
                self.refused[item.path.name] = exc

    def _is_settled(self, item: Wanted) -> bool:
        """Whether a version has what it is to have, or never will."""
        if item.key in self.failed:
            return True
        try:
            described = self.client.models.describe(*item.key)
        except ModelNotFoundError as exc:
            # It loads them all before it opens its ports.
            error = ServerError(
                f"TorchServe did not load {item.path.name}",
                remedy="look into it: marwright check FILE.mar; the log's last lines are below",
                detail=read_tail(self.log_file),
            )
            if not self.partial:
                raise error from exc
            self.refused[item.path.name] = error
            return True
        return described.ready_workers >= item.workers

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
        for failure in read_failures(self.log_file, offset=self.log_offset):
            error = failure.to_error()
            if not self.partial:
                raise error
            self.failed[failure.model, failure.version] = error
