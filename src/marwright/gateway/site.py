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
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from marwright.client import Endpoint
from marwright.errors import (
    MarwrightError,
    NotReadyError,
    PortTakenError,
    ServerDiedError,
    UsageError,
)
from marwright.gateway.configuration import Settings
from marwright.gateway.control import Control
from marwright.gateway.files import SiteFiles
from marwright.gateway.gateway import Gateway
from marwright.gateway.measures import SiteMeasures
from marwright.gateway.overview import SiteStatus, describe_replicas, join_versions
from marwright.gateway.replica import Replica, end_left
from marwright.gateway.splits import Splits
from marwright.server.change import Change, list_changes
from marwright.server.deployment import Deployment
from marwright.server.launch import count_cores
from marwright.server.metrics.exposition import Exposition
from marwright.server.nginx import find_nginx
from marwright.server.ports import is_free
from marwright.server.registry import announce
from marwright.server.sections import GatewaySettings
from marwright.server.supervision.boot import warn_of_certificate, warn_of_root
from marwright.server.supervision.health import Health, open_health
from marwright.server.supervision.inspection import look_anew, restart_server
from marwright.server.supervision.jobs import Jobs
from marwright.server.supervision.journal import LOG_NAME, keep_journal
from marwright.server.supervision.notify import notify_systemd
from marwright.server.supervision.signals import ignore_signals, take_signals
from marwright.server.supervision.source import Source
from marwright.server.supervision.status import RestartStatus
from marwright.server.supervision.tenure import Tenure
from marwright.server.wanted import list_wanted

__all__ = ["Site"]

_log = logging.getLogger(__name__)

RESTART_SECONDS = 180.0
"""How long one replica may take to be ready again."""
POLL_SECONDS = 0.1
SERVING = "READY=1\nSTATUS=serving"
GATEWAY_KEYS = ("gateway", "replicas", "tls")
"""Of a deployment, what the gateway takes while it serves, and no replica hears of."""


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
        self._status = SiteStatus(pid=os.getpid(), since=self._since, config=str(self.path or ""))
        self._jobs = Jobs()
        self._files: SiteFiles | None = None
        self._replicas: list[Replica] = []
        self._gateway: Gateway | None = None
        self._control = Control()
        self._measures = SiteMeasures()
        self._obstacle = ""
        """Why the gateway could not be mended at the last look."""
        self._lock = threading.RLock()
        """Held by whoever changes the gateway, for seconds."""
        self._splits = Splits(self._change_gateway, lock=self._lock)
        self._status_lock = threading.Lock()
        self._work = threading.Lock()
        """Held by whoever changes the replicas, one after the other; for minutes."""
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
            self._health = stack.enter_context(self._open_health())
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
        replica, and a last one of the gateway: what of the deployment it takes. Raises what
        Replica.apply raises; then the replicas after it are as they were.
        """
        return self._bring(self._source.read(self.deployment), **(asked or {}))

    def _bring(self, fresh: Deployment, *, dry_run: bool = False) -> list[dict[str, Any]]:
        key, rows = self._found.replica_key, []
        with self._work:
            for replica in self._replicas:
                change = (replica.plan if dry_run else replica.apply)(fresh, key=key)
                rows.append(_describe(replica.name, change))
            taken = self._compare(fresh)
            if not dry_run:
                self._take(fresh)
        return [*rows, {"server": self._tenure.name, "plan": [], "restart": [], "taken": taken}]

    def is_current(self) -> bool:
        """Whether `apply` had nothing to do."""
        try:
            rows = self.apply({"dry_run": True})
        except MarwrightError:
            return False
        return not any(row["plan"] or row["restart"] or row.get("taken") for row in rows)

    def look(self, _: Any) -> dict[str, Any]:
        """Have the replicas look at their servers now; return the status."""
        for replica in self._replicas[:]:
            if record := replica.record:
                look_anew(record)
            replica.ask()
        self._note()
        return self._status.to_json()

    def _open_health(self) -> Health:
        return open_health(
            lambda: self._status,
            self.deployment.ports,
            last=self._tenure.find_health_port(),
            key=self._tenure.key,
            scrape=self._scrape,
            answers={
                "/apply": self.apply,
                "/current": lambda _: {"current": self.is_current()},
                "/look": self.look,
                **self._splits.answers,
                **self._control.answers,
            },
        )

    def _scrape(self) -> Exposition:
        gateway = self._gateway
        return self._measures.scrape(
            self._status,
            self._replicas[:],
            self._splits.traffic.splits,
            run_folder=self._found.folder,
            gateway_runs=gateway is not None and gateway.exit_status is None,
        )

    @property
    def _found(self) -> SiteFiles:
        """The files, which are there before anybody asks."""
        if self._files is None:
            raise NotReadyError("the site has not begun yet")
        return self._files

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Adopt what is there, start what is not, and let others find it."""
        began = time.monotonic()
        warn_of_root()
        warn_of_certificate(self.deployment)
        self._files = files = SiteFiles.take(self._tenure.list_left())
        if not files.adopted:
            self._check_port()
        self._open_journal(files.folder)
        self._tenure.note(files.folder)
        self._splits.take(files)
        self._fit(self.deployment)
        self._wait_for_replica()
        self._begin_gateway()
        stack.enter_context(self._splits.observe_gateway(files.folder))
        stack.enter_context(self._control.open(files.folder, self._tenure.name))
        endpoint = Endpoint.read(files.folder / "endpoint.json")
        self._tenure.settle(files.folder, endpoint.inference_url, self._health.url)
        stack.enter_context(announce(self._tenure.name, files.folder))
        self._update(phase="serving")
        self._look()
        _log.info("serving %s at %s", self._tenure.name, endpoint.inference_url)
        if self._serving:
            seconds = time.monotonic() - began
            self._serving(endpoint, self._tenure.name, seconds, files.adopted)
        notify_systemd(SERVING)

    def _check_port(self) -> None:
        """Raise PortTakenError before replicas are started in vain."""
        gateway = self.deployment.gateway or GatewaySettings()
        if not is_free(gateway.port):
            raise PortTakenError(
                f"the gateway's port {gateway.port} is taken",
                remedy="stop what listens there, or choose another: gateway.port in deploy.yaml",
            )

    def _open_journal(self, folder: Path) -> None:
        settings = self.deployment.logging
        path = (settings.folder or folder / "logs").resolve() / LOG_NAME
        self._update(log=str(path))
        self._journal.open(path, file_bytes=settings.file_bytes, files=settings.files)

    def _fit(self, deployment: Deployment) -> list[Replica]:
        """Adopt or start as many replicas as are wanted; return those that are too many."""
        folder, key = self._found.folder, self._found.replica_key
        for number in range(len(self._replicas) + 1, deployment.replicas + 1):
            replica = Replica(self._tenure.name, number, folder / f"replica-{number}")
            replica.write(deployment, key=key)
            self._replicas.append(replica)
            if not replica.adopt():
                replica.start(threads=self._threads, linger=self._linger)
        for left in folder.glob("replica-*"):
            if left not in {replica.folder for replica in self._replicas}:
                end_left(left)  # of a killed site that had more
        surplus = self._replicas[deployment.replicas :]
        self._replicas = self._replicas[: deployment.replicas]
        return surplus

    @property
    def _threads(self) -> int:
        """How many threads a worker may have, where all replicas share the cores."""
        workers = sum(item.workers for item in list_wanted(self.deployment, refused={}))
        return max(1, count_cores() // max(1, workers * self.deployment.replicas))

    def _wait_for_replica(self) -> None:
        """Wait until one replica is ready.

        Raises:
            ServerDiedError: all have given up; says why, in the first one's words.
            NotReadyError: the time is over.
        """
        deadline = time.monotonic() + self.deployment.supervision.start_timeout + 60
        while not any(replica.is_ready for replica in self._replicas):
            for replica in self._replicas:
                replica.ask()
            if all(replica.has_ended for replica in self._replicas):
                error = self._replicas[0].explain()
                raise ServerDiedError(
                    "no replica could be started",
                    found=str(error),
                    remedy="" if error.remedy else "mend what the first one says",
                    detail=error.detail,
                )
            if time.monotonic() > deadline:
                raise NotReadyError(
                    "no replica got ready in time",
                    found="; ".join(self._replicas[0].list_problems()),
                    remedy="raise supervision.start_timeout",
                )
            time.sleep(POLL_SECONDS)

    def _begin_gateway(self) -> None:
        with self._lock:
            with contextlib.suppress(ServerDiedError):
                self._gateway = Gateway.adopt(self._found.folder)
            self._gateway = self._gateway or self._start_gateway()
            self._mend_gateway()

    def _start_gateway(self) -> Gateway:
        return Gateway.start(self._found.folder, self._make_settings(), linger=self._linger)

    def _list_endpoints(self) -> list[Endpoint]:
        return [point for replica in self._replicas if (point := replica.endpoint) is not None]

    def _make_settings(self) -> Settings:
        """Return what the gateway is to be now."""
        return self._found.make_settings(
            self.deployment,
            self._list_endpoints(),
            self._splits.traffic,
            health_url=self._health.url,
            key=self._tenure.key,
        )

    def _publish(self) -> None:
        """Say where clients find the gateway, as it is now."""
        first = self._list_endpoints()[0]
        endpoint = self._found.write_endpoint(self.deployment, first, health_url=self._health.url)
        self._update(address=endpoint.inference_url)

    def _look(self) -> None:
        """Look at everything once, and mend what has ended."""
        for replica in self._replicas[:]:
            replica.ask()
            if replica.is_due(self.deployment.supervision.longest_pause):
                replica.start(threads=self._threads, linger=self._linger)
        self._splits.look()
        try:
            with self._lock:
                self._mend_gateway()
            self._obstacle = ""
        except (MarwrightError, OSError) as exc:  # tried again at the next look
            if str(exc) != self._obstacle:
                _log.error("%s", exc, extra={"detail": getattr(exc, "detail", "")})
            self._obstacle = str(exc)
        self._note()

    def _mend_gateway(self) -> None:
        """Start nginx again where it has ended, and let it know where the replicas are."""
        assert self._gateway is not None  # it was begun with
        if self._status.phase == "stopping" or not self._list_endpoints():
            return  # it waits for them
        if self._gateway.exit_status is not None:
            _log.error("nginx has ended; starting it again")
            self._gateway.stop(keep_folder=True)
            self._gateway = self._start_gateway()
            self._update(restarts=self._status.restarts + 1)
        self._gateway.rotate()
        self._gateway.change(self._make_settings())
        self._publish()

    def _note(self) -> None:
        """Say in the status how all of it is."""
        ready = any(replica.is_ready for replica in self._replicas)
        problems = [*([] if ready else ["no replica is ready"]), self._obstacle]
        self._update(
            replicas=describe_replicas(self._replicas),
            models=join_versions(self._replicas),
            problems=tuple(filter(None, problems)),
            started=self._status.started or ready,
        )

    def _change_gateway(self) -> None:
        assert self._gateway is not None  # splits are set after it has begun
        self._gateway.change(self._make_settings())

    def _obey(self, seconds: float) -> None:
        """Do what signals asked for, or wait."""
        try:
            wish = self._wishes.get(timeout=seconds)
        except queue.Empty:
            return
        self._jobs.start(self._reload if wish == "reload" else self._restart)

    def _reload(self) -> None:
        """Take the configuration as it is now, as far as running servers can."""
        notify_systemd("RELOADING=1")
        try:
            for row in self.apply(None):
                if row["restart"]:
                    keys = ", ".join(row["restart"])
                    _log.warning("changed, but taken only by marwright restart: %s", keys)
        finally:
            notify_systemd(SERVING)

    def _restart(self) -> None:
        """Start one replica after the other again; the others answer meanwhile."""
        number = self._status.restart.count + 1
        self._update(restart=RestartStatus(number, "running"))
        notify_systemd("STATUS=restarting")
        began = time.monotonic()
        try:
            fresh = self._source.read(self.deployment)
            with self._work:
                for replica in self._replicas:
                    self._restart_replica(replica, fresh)
                self._take(fresh)
        except MarwrightError as exc:
            problem = "; ".join([str(exc), *exc.detail.splitlines()])
            self._update(restart=RestartStatus(number, "failed", problem=problem))
            _log.error("%s", exc, extra={"detail": exc.detail})
        else:
            seconds = round(time.monotonic() - began, 2)
            self._update(restart=RestartStatus(number, "done", seconds))
        finally:
            notify_systemd(SERVING)

    def _restart_replica(self, replica: Replica, fresh: Deployment) -> None:
        """Start one replica's server again, while another one answers.

        Raises:
            NotReadyError: no other one does.
            MarwrightError: it did not start so, and is as it was where that works.
        """
        others = [other for other in self._replicas if other is not replica]
        deadline = time.monotonic() + RESTART_SECONDS
        while others and not any(other.is_ready for other in others):
            if time.monotonic() > deadline or self._status.phase == "stopping":
                raise NotReadyError(
                    f"{replica.name} is not started again: no other replica is ready",
                    remedy=f"see why: marwright status {self._tenure.name}",
                )
            time.sleep(POLL_SECONDS)
        replica.write(fresh, key=self._found.replica_key)
        if (record := replica.record) is None:
            return  # it has ended, and is started with this anyway
        try:
            restart_server(record, timeout=RESTART_SECONDS)
        except MarwrightError:
            replica.write(self.deployment, key=self._found.replica_key)
            raise

    def _compare(self, fresh: Deployment) -> list[str]:
        """Return what the gateway would take of a deployment: "gateway.port: 8000 -> 8001"."""
        return list_changes(
            *(
                one.model_dump(mode="json", include=set(GATEWAY_KEYS))
                for one in (self.deployment, fresh)
            )
        )

    def _take(self, fresh: Deployment) -> None:
        """Obey another deployment; the gateway goes first to where it is to be.

        Raises:
            UsageError: it is of no site.
            MarwrightError: the gateway cannot be so; all is as it was.
        """
        if fresh.gateway is None:
            raise UsageError(
                "a site keeps its gateway", remedy="marwright stop, and then marwright serve"
            )
        with self._lock:
            before = self.deployment
            self.deployment = fresh.model_copy(update={"name": before.name})
            try:
                self._mend_gateway()
            except MarwrightError:
                self.deployment = before
                raise
            surplus = self._fit(self.deployment)
            if surplus:
                self._mend_gateway()
        _stop_all(surplus)

    def _stop(self) -> None:
        """End the gateway first: it lets its requests be answered."""
        with ignore_signals():
            self._update(phase="stopping")
            notify_systemd("STOPPING=1")
            with self._lock:
                if self._gateway is not None:
                    self._gateway.stop(keep_folder=True)
            _stop_all(self._replicas)
            if self._files is not None:
                shutil.rmtree(self._files.folder, ignore_errors=True)

    def _update(self, **changes: Any) -> None:
        with self._status_lock:  # jobs and requests have threads of their own
            self._status = dataclasses.replace(self._status, **changes)


def _stop_all(replicas: list[Replica]) -> None:
    """End replicas, all at once."""
    if replicas:
        with ThreadPoolExecutor(len(replicas)) as pool:
            list(pool.map(Replica.stop, replicas))


def _describe(server: str, change: Change) -> dict[str, Any]:
    steps = [step.to_json() for step in change.plan.steps]
    return {"server": server, "plan": steps, "restart": list(change.restart)}
