"""The site: a gateway and the servers behind it, kept as one deployment says.

Each server has a supervisor of its own (replica.py), in a process that outlives a killed site for a
while, as the gateway does; the next `marwright serve` of the same deployment adopts them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from marwright.client import Endpoint
from marwright.errors import MarwrightError, NotReadyError, ServerDiedError
from marwright.gateway.configuration import Settings
from marwright.gateway.gateway import Gateway
from marwright.gateway.observation import Observation
from marwright.gateway.replica import Replica, derive
from marwright.gateway.traffic import Split, Traffic
from marwright.server.certificate import Certificate, make_certificate
from marwright.server.change import Change
from marwright.server.deployment import Deployment, GatewaySettings, TlsFiles
from marwright.server.launch import count_cores, make_run_folder
from marwright.server.nginx import find_nginx
from marwright.server.registry import announce
from marwright.server.supervision.boot import warn_of_certificate, warn_of_root
from marwright.server.supervision.health import open_health
from marwright.server.supervision.inspection import restart_server
from marwright.server.supervision.jobs import Jobs
from marwright.server.supervision.journal import LOG_NAME, keep_journal
from marwright.server.supervision.notify import notify_systemd
from marwright.server.supervision.signals import ignore_signals, take_signals
from marwright.server.supervision.source import Source
from marwright.server.supervision.status import RestartStatus, Status, VersionStatus
from marwright.server.supervision.tenure import Tenure
from marwright.server.wanted import list_wanted
from marwright.storage import translate_os_errors, write_file

__all__ = ["Site"]

_log = logging.getLogger(__name__)

GATEWAY = "gateway"
TRAFFIC = "traffic.json"
TOKENS = "tokens"
REPLICA_KEY = "replica_key"
RESTART_SECONDS = 180.0
POLL_SECONDS = 0.1
SERVING = "READY=1\nSTATUS=serving"


class Site:
    """Runs one gateway and its replicas; `run` returns only by an exception.

    The arguments are those of a Supervisor.
    """

    def __init__(
        self,
        deployment: Deployment,
        path: Path | None = None,
        *,
        reread: Callable[[], Deployment] | None = None,
        tell: Callable[[str], None] | None = None,
        serving: Callable[[Endpoint, str, float, bool], None] | None = None,
    ) -> None:
        self.deployment = deployment
        self.path = path.resolve() if path else None
        self._source = Source(deployment, reread)
        self._tell = tell
        self._serving = serving
        self._wishes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._status = Status(pid=os.getpid(), since=self._since, config=str(self.path or ""))
        self._jobs = Jobs()
        self._replicas: list[Replica] = []
        self._gateway: Gateway | None = None
        self._traffic = Traffic()
        self._observation = Observation()
        self._lock = threading.RLock()
        """Held by whoever changes the gateway or the replicas."""
        self._linger = deployment.supervision.linger_seconds

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; then stop all of it in order.

        Raises:
            KeyboardInterrupt, SystemExit: it was told to stop, and has.
            ServerError: there is no nginx; another supervisor has this configuration; nothing of it
                could be started.
        """
        find_nginx()
        with keep_journal(self._tell) as self._journal, contextlib.ExitStack() as stack:
            stack.enter_context(take_signals(self._wishes))
            self._tenure = stack.enter_context(Tenure(self.deployment, self.path, self._since))
            self._health = stack.enter_context(
                open_health(
                    lambda: self._status,
                    self.deployment.ports,
                    last=self._tenure.find_health_port(),
                    key=self._tenure.key,
                    answers={
                        "/apply": self.apply,
                        "/current": lambda _: {"current": self.is_current()},
                        "/observed": self.observe,
                        "/traffic": self.direct,
                    },
                )
            )
            self._update(name=self._tenure.name, health_url=self._health.url)
            stack.callback(self._jobs.close)
            stack.callback(self._stop)
            try:
                self._begin(stack)
                while True:
                    self._look()
                    self._obey(self.deployment.supervision.check_seconds)
            except MarwrightError as exc:
                _log.critical("%s", exc, extra={"detail": exc.detail})
                raise

    def apply(self, asked: Any) -> list[dict[str, Any]]:
        """Bring each replica to what the deployment now says, one after the other.

        `asked` {"dry_run": true} only plans. Returns the steps and what takes a restart, a row a
        replica. Raises what replica.apply raises; then the replicas after it are as they were.
        """
        with self._lock:
            return self._apply(Replica.plan if (asked or {}).get("dry_run") else Replica.apply)

    def _apply(self, do: Callable[[Replica], Change]) -> list[dict[str, Any]]:
        fresh = self._source.read(self.deployment)
        self._write_replicas(fresh)
        rows = []
        for replica in self._replicas:
            change = do(replica)
            steps = [step.to_json() for step in change.plan.steps]
            rows.append({"server": replica.name, "plan": steps, "restart": list(change.restart)})
        if do is Replica.apply:
            self._take(fresh)
        return rows

    def is_current(self) -> bool:
        """Whether `apply` had nothing to do."""
        try:
            rows = self.apply({"dry_run": True})
        except MarwrightError:
            return False
        return not any(row["plan"] or row["restart"] for row in rows)

    def direct(self, asked: Any) -> dict[str, Any]:
        """Set a model's split, or with {"model": NAME} alone take it away; return all splits.

        `asked` None changes nothing. It is in use once this returns, and outlives the site's own
        death.
        """
        if asked is not None:
            traffic = self._traffic.without(asked["model"])
            if len(asked) > 1:
                split = Split(**asked)
                traffic = traffic.with_split(split)
                self._observation.watch(split)
            self._change(traffic)
        return dataclasses.asdict(self._traffic)

    def observe(self, asked: Any) -> dict[str, Any]:
        """Return what both versions of a model's split answered since it was first set.

        `asked` {"model": NAME, "since": COUNT} leaves out what earlier calls had; with "captured"
        the copied requests are handed over too.
        """
        return self._observation.tell(**asked)

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Adopt what is there, start what is not, and let others find it."""
        began = time.monotonic()
        warn_of_root()
        warn_of_certificate(self.deployment)
        left = next(self._tenure.list_left(), None)
        adopted = left is not None and (left / TRAFFIC).exists()
        self._folder = left if left is not None and adopted else make_run_folder()
        self._make_files()
        self._open_journal()
        self._tenure.note(self._folder)
        self._replicas = [
            Replica(self._tenure.name, number, self._folder / f"replica-{number}")
            for number in range(1, self.deployment.replicas + 1)
        ]
        self._write_replicas(self.deployment)
        for replica in self._replicas:
            if not replica.adopt():
                replica.start(threads=self._threads, linger=self._linger)
        self._wait_for_replica()
        self._begin_gateway()
        self._observation.open(self._folder / GATEWAY, stack)
        endpoint = self._write_endpoint()
        self._tenure.settle(self._folder, endpoint.inference_url, self._health.url)
        stack.enter_context(announce(self._tenure.name, self._folder))
        self._update(address=endpoint.inference_url, phase="serving")
        self._look()
        _log.info("serving %s at %s", self._tenure.name, endpoint.inference_url)
        if self._serving:
            self._serving(endpoint, self._tenure.name, time.monotonic() - began, adopted)
        notify_systemd(SERVING)

    def _make_files(self) -> None:
        """Make what the parts share: secrets, a certificate, the traffic as it was."""
        self._replica_key = self._folder / REPLICA_KEY
        with translate_os_errors(f"write {self._folder}"):
            for path in (self._replica_key, self._folder / TOKENS):
                if not path.exists():
                    path.touch(mode=0o600)
                    path.write_text(secrets.token_urlsafe(32), encoding="ascii")
        if (self._folder / TRAFFIC).exists():
            self._traffic = Traffic.read(self._folder / TRAFFIC)
            for split in self._traffic.splits:
                self._observation.watch(split)
        else:
            self._traffic.write(self._folder / TRAFFIC)

    def _open_journal(self) -> None:
        settings = self.deployment.logging
        folder = settings.folder or self._folder / "logs"
        self._update(log=str(folder / LOG_NAME))
        self._journal.open(
            folder.resolve() / LOG_NAME, file_bytes=settings.file_bytes, files=settings.files
        )

    def _write_replicas(self, deployment: Deployment) -> None:
        key = self._replica_key if deployment.access.tokens else None
        for replica in self._replicas:
            replica.write(derive(deployment, gateway_key=key))

    @property
    def _threads(self) -> int:
        """How many threads a worker may have, where all replicas share the cores."""
        workers = sum(item.workers for item in list_wanted(self.deployment, refused={}))
        return max(1, count_cores() // max(1, workers * self.deployment.replicas))

    def _wait_for_replica(self) -> None:
        """Wait until one replica is ready.

        Raises:
            ServerDiedError: all have given up; says why.
            NotReadyError: the time is over.
        """
        deadline = time.monotonic() + self.deployment.supervision.start_timeout + 60
        while not any(replica.is_ready for replica in self._replicas):
            for replica in self._replicas:
                replica.ask()
            if all(replica.has_ended for replica in self._replicas):
                raise ServerDiedError(
                    "no replica could be started",
                    remedy="mend what the first one says",
                    detail=self._replicas[0].read_end(),
                )
            if time.monotonic() > deadline:
                raise NotReadyError(
                    "no replica got ready in time",
                    remedy="raise supervision.start_timeout",
                    detail=self._replicas[0].read_end(),
                )
            time.sleep(POLL_SECONDS)

    def _begin_gateway(self) -> None:
        folder = self._folder / GATEWAY
        try:
            self._gateway = Gateway.adopt(folder)
            self._gateway.change(self._make_settings())
        except ServerDiedError:
            self._gateway = Gateway.start(folder, self._make_settings(), linger=self._linger)

    def _make_settings(self) -> Settings:
        """Return what the gateway is to be now."""
        deployment, gateway = self.deployment, self.deployment.gateway or GatewaySettings()
        endpoints = [replica.endpoint for replica in self._replicas]
        urls = tuple(endpoint.inference_url for endpoint in endpoints if endpoint)
        tokens = deployment.access.tokens
        limits = deployment.limits
        certificate = self._find_certificate()
        return Settings(
            port=gateway.port,
            host=gateway.host,
            replicas=urls,
            certificate=certificate.certificate if certificate else None,
            key=certificate.key if certificate else None,
            replica_token=self._replica_key.read_text("ascii") if tokens else None,
            client_tokens=(gateway.tokens or self._folder / TOKENS) if tokens else None,
            request_bytes=limits.request_bytes,
            request_seconds=limits.request_seconds,
            connections=limits.connections,
            retry_after=limits.retry_after,
            traffic=self._traffic,
        )

    def _find_certificate(self) -> Certificate | None:
        tls = self.deployment.tls
        if isinstance(tls, TlsFiles):
            return Certificate(tls.certificate, tls.key)
        if tls is None:
            return None
        folder = self._folder / "tls"
        made = Certificate(folder / "certificate.pem", folder / "key.pem")
        return made if made.certificate.exists() else make_certificate(folder)

    def _write_endpoint(self) -> Endpoint:
        """Say where clients find the gateway; the rest is the first replica's that has it."""
        gateway = self.deployment.gateway or GatewaySettings()
        first = next(filter(None, (replica.endpoint for replica in self._replicas)))
        certificate = self._find_certificate()
        token = self._folder / "token"
        if self.deployment.access.tokens:
            text = (gateway.tokens or self._folder / TOKENS).read_text(encoding="utf-8")
            with write_file(token) as stream:
                stream.write(text.split()[0].encode())
            token.chmod(0o600)
        endpoint = dataclasses.replace(
            first,
            inference_url=f"{'https' if certificate else 'http'}://{gateway.host}:{gateway.port}",
            grpc_inference="",
            grpc_management="",
            gateway_token=token if self.deployment.access.tokens else None,
            certificate=certificate.certificate if certificate else None,
            health_url=self._health.url,
        )
        endpoint.write(self._folder / "endpoint.json")
        return endpoint

    def _look(self) -> None:
        """Look at everything once, and mend what has ended."""
        settings = self.deployment.supervision
        for replica in self._replicas:
            replica.ask()
            replica.mend(
                threads=self._threads, linger=self._linger, longest_pause=settings.longest_pause
            )
        self._observation.read()
        with self._lock:
            self._mend_gateway()
        self._note()

    def _mend_gateway(self) -> None:
        """Start nginx again where it has ended, and let it know where the replicas are."""
        assert self._gateway is not None  # it was begun with
        if not any(replica.endpoint for replica in self._replicas):
            return  # it waits for them
        if self._gateway.exit_status is not None:
            _log.error("nginx has ended; starting it again")
            self._gateway.stop(keep_folder=True)
            folder = self._folder / GATEWAY
            self._gateway = Gateway.start(folder, self._make_settings(), linger=self._linger)
        self._gateway.rotate()
        self._gateway.change(self._make_settings())

    def _note(self) -> None:
        """Say in the status how the replicas are, all together."""
        ready = [replica for replica in self._replicas if replica.is_ready]
        differences = [
            f"{replica.name}: {text}"
            for replica in self._replicas
            for text in replica.list_problems()
        ]
        rows: dict[tuple[str, str], VersionStatus] = {}
        for replica in self._replicas:
            for item in replica.status.get("models", ()):
                row = VersionStatus(**item)
                rows[row.name, row.version] = _join(rows.get((row.name, row.version)), row)
        if ready:  # which answers for the others
            rows = {key: dataclasses.replace(row, problem="") for key, row in rows.items()}
        self._update(
            models=tuple(rows.values()),
            problems=() if ready else ("no replica is ready",),
            differences=tuple(differences),
            started=self._status.started or bool(ready),
        )

    def _change(self, traffic: Traffic) -> None:
        """Bring another traffic into use, and keep it for whoever adopts this site."""
        assert self._gateway is not None  # control begins after it
        with self._lock:
            before, self._traffic = self._traffic, traffic
            try:
                self._gateway.change(self._make_settings())
            except MarwrightError:
                self._traffic = before
                raise
            traffic.write(self._folder / TRAFFIC)

    def _obey(self, seconds: float) -> None:
        """Do what signals asked for, or wait."""
        try:
            wish = self._wishes.get(timeout=seconds)
        except queue.Empty:
            return
        if wish == "reload":
            self._jobs.start(self._reload)
        else:
            self._jobs.start(self._restart)

    def _reload(self) -> None:
        for row in self.apply(None):
            if row["restart"]:
                keys = ", ".join(row["restart"])
                _log.warning("changed, but taken only by marwright restart: %s", keys)

    def _restart(self) -> None:
        """Start one replica after the other again; the others answer meanwhile."""
        number = self._status.restart.count + 1
        self._update(restart=RestartStatus(number, "running"))
        began = time.monotonic()
        try:
            fresh = self._source.read(self.deployment)
            self._write_replicas(fresh)
            for replica in self._replicas:
                if record := replica.record:
                    restart_server(record, timeout=RESTART_SECONDS)
            self._take(fresh)
        except MarwrightError as exc:
            self._update(restart=RestartStatus(number, "failed", problem=str(exc)))
            _log.error("%s", exc, extra={"detail": exc.detail})
            return
        seconds = round(time.monotonic() - began, 2)
        self._update(restart=RestartStatus(number, "done", seconds))

    def _take(self, fresh: Deployment) -> None:
        """Obey another deployment, as far as that takes no other site."""
        keep = {"replicas": self.deployment.replicas, "name": self.deployment.name}
        self.deployment = fresh.model_copy(update=keep)

    def _stop(self) -> None:
        """End the gateway first: it lets its requests be answered."""
        with ignore_signals():
            self._update(phase="stopping")
            notify_systemd("STOPPING=1")
            if self._gateway is not None:
                self._gateway.stop()
            for replica in self._replicas:
                replica.stop()
            if self._replicas:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _update(self, **changes: Any) -> None:
        self._status = dataclasses.replace(self._status, **changes)


def _join(one: VersionStatus | None, other: VersionStatus) -> VersionStatus:
    """Return one row for the same version in two replicas."""
    if one is None:
        return other
    return dataclasses.replace(
        one,
        workers=one.workers + other.workers,
        ready_workers=one.ready_workers + other.ready_workers,
        memory_bytes=one.memory_bytes + other.memory_bytes,
        problem=one.problem or other.problem,
        detail=one.detail or other.detail,
    )
