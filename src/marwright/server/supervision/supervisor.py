"""The supervisor: keeps one server as its deployment says, until it is told to stop.

It starts the server, or adopts the one that a killed supervisor left to its guard; watches process,
API, workers and memory; starts it again where it fails, and gives up loudly where that does not
help. SIGHUP reads the configuration again, SIGUSR1 starts the server again; `/look` of its
endpoints has it look at the server at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from marwright.client import Client, Endpoint, Retries
from marwright.errors import ClientError, JavaError, MarwrightError, ServerError
from marwright.server.change import prepare_change
from marwright.server.deployment import Deployment
from marwright.server.process import read_server_pid
from marwright.server.registry import announce
from marwright.server.sections import LoggingSettings
from marwright.server.state import State, read_state
from marwright.server.supervision.attempts import Attempts
from marwright.server.supervision.boot import adopt, boot, warn_of_certificate, warn_of_root
from marwright.server.supervision.care import Care
from marwright.server.supervision.health import open_health
from marwright.server.supervision.jobs import Jobs
from marwright.server.supervision.journal import LOG_NAME, keep_journal
from marwright.server.supervision.measures import Measures
from marwright.server.supervision.notify import notify_systemd
from marwright.server.supervision.probe import Probe
from marwright.server.supervision.signals import ignore_signals, take_signals
from marwright.server.supervision.source import Source
from marwright.server.supervision.status import (
    UNANSWERED,
    RestartStatus,
    Status,
    forget_versions,
    list_restart_reasons,
)
from marwright.server.supervision.tenure import Tenure
from marwright.server.torchserve import TorchServe

__all__ = ["Supervisor"]

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""How long the management API may take to answer the supervisor."""
RETRIES = Retries(away=0)
"""Whom it watches, a supervisor does not wait for."""
MISSES = 3
"""Checks without an answer after which the server hangs."""
SERVING = "READY=1\nSTATUS=serving"
"""What systemd is told; a status stands until another one takes its place."""
SETTLE_SECONDS = 10.0
"""How long `/look` waits for answers to the samples of new versions."""
SETTLE_PAUSE = 0.05
BUSY_SHARE = 4
"""The pause between two checks is at least so many times what one takes."""


class Supervisor:
    """Runs one server; `run` returns only by an exception.

    `path` is the deploy.yaml, where there is one; `reread` returns the deployment anew and raises
    MarwrightError where it cannot be used. `tell` hears of what happens in a line for people;
    `serving` is called once the server serves: with where, its name, the seconds that it took to
    get ready, and whether it was adopted.
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
        self._server: TorchServe | None = None
        self._wishes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._looks: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        """Who waits for the end of a look that has not begun yet."""
        self._since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._status = Status(pid=os.getpid(), since=self._since, config=str(self.path or ""))
        self._beat = time.monotonic()
        self._patience = deployment.supervision.start_timeout + 60
        self._attempts = Attempts()
        self._jobs = Jobs()
        self._measures = Measures()
        self._connection = contextlib.ExitStack()
        self._seen: State | None = None
        self._misses = 0

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; then stop the server in order.

        Raises:
            KeyboardInterrupt, SystemExit: it was told to stop, and has.
            ServerError: another supervisor has this configuration, the first start failed, or
                further ones did too often.
            MarwrightError: whatever else keeps the server from being started.
        """
        with keep_journal(self._tell) as self._journal, contextlib.ExitStack() as stack:
            stack.enter_context(take_signals(self._wishes))  # until all is cleared away
            if self.deployment.logging.folder:
                self._open_journal(self.deployment.logging.folder, self.deployment.logging)
            self._tenure = stack.enter_context(Tenure(self.deployment, self.path, self._since))
            self._update(name=self._tenure.name)
            self._probe = Probe()
            stack.callback(self._probe.close)
            health = open_health(
                self.read_status,
                self.deployment.ports,
                last=self._tenure.find_health_port(),
                key=self._tenure.key,
                scrape=lambda: self._measures.scrape(self.read_status()),
                answers={
                    "/current": lambda _: {"current": self.is_current()},
                    "/look": lambda _: self.look_anew().to_json(),
                },
            )
            self._health = stack.enter_context(health)
            self._update(health_url=health.url)
            stack.callback(self._jobs.close)
            stack.callback(self._stop)
            try:
                self._begin(stack)
                while True:
                    pause = self._check()
                    self._obey(pause)
            except MarwrightError as exc:
                _log.critical("%s", exc, extra={"detail": exc.detail})
                raise

    def read_status(self) -> Status:
        """Return how things are; from any thread, at once."""
        silence = time.monotonic() - self._beat
        if silence > self._patience and self._status.phase != "stopping":
            problem = f"the supervisor has not looked at the server for {silence:.0f} s"
            return dataclasses.replace(self._status, problems=(problem,))
        return self._status

    def look_anew(self) -> Status:
        """Return how things are now, once each sample has its answer; from any other thread.

        After SETTLE_SECONDS it is what is known by then.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            looked = threading.Event()
            self._looks.put(looked)
            self._wishes.put("look")
            looked.wait(left)
            if not any(model.problem == UNANSWERED for model in self._status.models):
                break
            time.sleep(SETTLE_PAUSE)
        return self.read_status()

    def is_current(self) -> bool:
        """Whether `marwright apply` had nothing to do; looked at now, from any thread."""
        server = self._server
        if self.path is None or server is None or self._status.phase != "serving":
            return False
        try:
            with Client(server.endpoint, timeout=ANSWER_SECONDS, retries=RETRIES) as client:
                change = prepare_change(self.path, client)
        except MarwrightError:
            return False  # which is for the one to hear who asks
        settings = change.deployment.supervision
        return not (change.plan or change.restart) and settings == self.deployment.supervision

    def _begin(self, stack: contextlib.ExitStack) -> None:
        """Adopt the server, or start one, and let others find it."""
        warn_of_root()
        self._server = server = TorchServe.deploy(self.deployment, partial=True)
        adopted = adopt(self._tenure.list_left(), self.deployment)
        if adopted is None:
            self._arm(server, self.deployment)
            boot(server)
        else:
            self._server = server = adopted
            self._arm(server, self.deployment)
            endpoint = dataclasses.replace(server.endpoint, health_url=self._health.url)
            endpoint.write(server.run_folder / "endpoint.json")
        url = server.endpoint.inference_url
        self._update(name=self._tenure.settle(server.run_folder, url, self._health.url))
        stack.enter_context(announce(self._tenure.name, server.run_folder))
        self._connect()
        _log.info("serving %s at %s", self._tenure.name, server.endpoint.inference_url)
        if adopted is not None:
            self._jobs.start(functools.partial(self._care.apply, self.deployment))
        self._check()
        if self._serving:
            self._serving(
                server.endpoint, self._tenure.name, server.ready_seconds, adopted is not None
            )
        notify_systemd(SERVING)

    def _arm(self, server: TorchServe, deployment: Deployment) -> None:
        """Say what a start needs to know of its supervisor, where it can be found again."""
        known = self.path or self._source.is_findable
        server.linger = deployment.supervision.linger_seconds if known else 0.0
        server.health_url = self._health.url

    def _connect(self) -> None:
        """Begin to watch a server that was started just now."""
        server = self._server
        assert server is not None  # whoever calls has started it
        self._open_journal(server.log_file.parent, server.deployment.logging)
        warn_of_certificate(server.deployment)
        self._connection.close()
        client = Client(server.endpoint, timeout=ANSWER_SECONDS, retries=RETRIES)
        self._client = self._connection.enter_context(client)
        scraping = Client(server.endpoint, retries=RETRIES)  # from threads of the endpoints' own
        self._measures.follow(self._connection.enter_context(scraping), server.run_folder)
        self._care = Care(self._client, server, self._measures.census)
        self._probe.forget()
        self._misses = 0
        pid = read_server_pid(server.run_folder)
        self._update(
            phase="starting",  # until it was looked at: what is known of its models is of before
            java_pid=pid[0] if pid else None,
            address=server.endpoint.inference_url,
            log=str(server.log_file),
            problems=(),
        )

    def _open_journal(self, folder: Path, settings: LoggingSettings) -> None:
        self._journal.open(
            folder.resolve() / LOG_NAME, file_bytes=settings.file_bytes, files=settings.files
        )

    def _stop(self) -> None:
        """End the server in order, whatever else is sent meanwhile."""
        with ignore_signals():
            self._update(phase="stopping")
            notify_systemd("STOPPING=1")
            if self._server is not None:
                self._server.stop()
            self._connection.close()

    def _check(self) -> float:
        """Look at everything once; return the seconds until the next look."""
        waiting = [self._looks.get() for _ in range(self._looks.qsize())]
        began = self._beat = time.monotonic()
        self._patience = 60.0 + MISSES * ANSWER_SECONDS
        server = self._server
        assert server is not None  # it was begun with
        if (status := server.exit_status) is not None:
            self._revive(server.describe_death(status))
        else:
            self._look(server)
        for looked in waiting:
            looked.set()
        # A start takes long too, and no pause is for that.
        looked_well = self._status.phase == "serving" and not self._misses
        took = time.monotonic() - began if looked_well else 0.0
        return max(self.deployment.supervision.check_seconds, BUSY_SHARE * took)

    def _look(self, server: TorchServe) -> None:
        """Ask the server how its versions are, and begin what has to be done about it."""
        try:
            state = read_state(self._client)
            self.deployment = self._care.follow(self.deployment)
            view = self._care.look(state, self._probe, self.deployment.supervision.memory_limit)
        except ClientError as exc:
            self._miss(server, exc)
            return
        except (MarwrightError, OSError) as exc:  # an archive that is gone, a disk that is full
            _log.warning("the server cannot be looked at: %s", exc)
            return
        self._misses = 0
        self._measures.take(state)
        self._update(phase="serving", models=view.models, differences=view.differences)
        turned = self._attempts.note(ready=not self._status.not_ready)
        if turned:
            _log.info("every wanted version is ready")
            self._update(started=True)
        elif turned is False:
            _log.warning("not ready: %s", "; ".join(self._status.not_ready))
        if not self._jobs.is_busy:
            self._seen = state
            if view.job:
                self._jobs.start(view.job)

    def _miss(self, server: TorchServe, error: ClientError) -> None:
        """Count a check that got no answer; a server that gives none any more is started again."""
        if server.exit_status is not None:
            return  # the next check sees that too
        self._misses += 1
        _log.warning("no answer from the management API, %d of %d: %s", self._misses, MISSES, error)
        if self._misses >= MISSES:
            self._revive(ServerError("the server hangs: its management API does not answer"))

    def _revive(self, error: MarwrightError) -> None:
        """Start a server again that failed, with growing pauses.

        Raises:
            ServerDiedError: it failed too often; says why, with the last worker's traceback.
        """
        assert self._server is not None  # it was begun with
        settings = self.deployment.supervision
        while (pause := self._attempts.fail(settings)) is not None:
            count = f"{self._attempts.failures} of {settings.restarts}"
            text = f"{error.message}; starting it again in {pause:g} s ({count})"
            _log.error("%s", text, extra={"detail": error.detail})
            self._tell_restarting(problems=(error.message,))
            self._beat, self._patience = time.monotonic(), pause + settings.start_timeout + 60
            time.sleep(pause)  # SIGTERM and Ctrl-C end it
            try:
                self._restart(None)
                return
            except JavaError:
                raise
            except MarwrightError as exc:
                error = exc
        raise self._attempts.explain(error, self._server)

    def _restart(self, deployment: Deployment | None) -> None:
        server = self._server
        assert server is not None  # it was begun with
        before = self._seen if deployment is None else None
        self._tell_restarting(restarts=self._status.restarts + (deployment is None))
        wanted = deployment or self.deployment
        self._arm(server, wanted)
        server.restart(wanted)
        self._connect()
        if before is not None:
            self._jobs.start(functools.partial(self._care.restore, before))

    def _obey(self, seconds: float) -> None:
        """Do what signals asked for, or wait."""
        try:
            wish = self._wishes.get(timeout=seconds)
        except queue.Empty:
            return
        if wish == "look":
            return  # that comes next
        notify_systemd("RELOADING=1" if wish == "reload" else "STATUS=restarting")
        if wish == "reload":
            self._reload()
        else:
            self._restart_as_asked()
        notify_systemd(SERVING)

    def _reload(self) -> None:
        """Take the configuration as it is now, as far as the running server can."""
        assert self._server is not None  # it was begun with
        try:
            fresh = self._source.read(self.deployment)
        except MarwrightError:
            return
        reasons = list_restart_reasons(self._server.deployment, fresh)
        if reasons:
            _log.warning("changed, but taken only by marwright restart: %s", ", ".join(reasons))
        if "store" in reasons or "policy" in reasons:
            return  # the models are meant for those
        part = {"models": fresh.models, "supervision": fresh.supervision}
        self.deployment = self.deployment.model_copy(update=part)
        _log.info("the configuration was read again")
        self._jobs.start(functools.partial(self._care.apply, self.deployment))

    def _restart_as_asked(self) -> None:
        """Start the server again with the configuration as it is now."""
        number = self._status.restart.count + 1
        self._update(restart=RestartStatus(number, "running"))
        try:
            fresh = self._source.read(self.deployment)
        except MarwrightError as exc:
            self._update(restart=RestartStatus(number, "failed", problem=_join(exc)))
            return
        _log.info("starting the server again, as asked")
        self._beat = began = time.monotonic()
        self._patience = fresh.supervision.start_timeout + 60
        try:
            self._restart(fresh)
        except MarwrightError as exc:
            self._update(restart=RestartStatus(number, "failed", problem=_join(exc)))
            self._revive(exc)  # as it was configured before
            return
        self.deployment = fresh
        seconds = round(time.monotonic() - began, 2)
        self._update(restart=RestartStatus(number, "done", seconds))

    def _tell_restarting(self, **changes: Any) -> None:
        models = forget_versions(self._status.models)
        self._update(phase="restarting", java_pid=None, models=models, **changes)

    def _update(self, **changes: Any) -> None:
        self._status = dataclasses.replace(self._status, **changes)


def _join(error: MarwrightError) -> str:
    """Return an error in one line, with what it lists."""
    return "; ".join([str(error), *error.detail.splitlines()])
