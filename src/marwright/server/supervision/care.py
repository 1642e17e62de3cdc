"""Care for the workers of one running server: how they are, and what is to be done about it."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from marwright.client import Client, ModelVersion
from marwright.errors import ClientError, MarwrightError
from marwright.server.deployment import Deployment
from marwright.server.launch import RUNNING_NAME
from marwright.server.plan import Step, carry_out, make_plan
from marwright.server.registration import start_version
from marwright.server.state import State, compare, read_state
from marwright.server.supervision.census import Census
from marwright.server.supervision.probe import Probe
from marwright.server.supervision.status import VersionStatus, describe_versions
from marwright.server.supervision.usage import read_resident
from marwright.server.torchserve import TorchServe
from marwright.server.wanted import Wanted, list_wanted
from marwright.server.worker_log import read_failures
from marwright.storage import hold_path

__all__ = ["Care", "View"]

_log = logging.getLogger(__name__)

LOG_SECONDS = 5.0
"""Between two readings of the log for why workers die."""
RETRY_SECONDS = 300
"""How long TorchServe starts a dead worker again, where the archive does not say."""
RENEW_SECONDS = 60.0
"""Between two renewals of one version's workers: one that is large at once would never end."""

Key = tuple[str, str]


@dataclass(frozen=True)
class View:
    """What one look found."""

    models: tuple[VersionStatus, ...]
    differences: tuple[str, ...]
    job: Callable[[], None] | None
    """What is to be done, and takes its time."""


class Care:
    """Looks at a server's versions; belongs to one start of it.

    `census` hears of workers that it ends itself.
    """

    def __init__(self, client: Client, server: TorchServe, census: Census) -> None:
        self._client = client
        self._server = server
        self._census = census
        self._offsets: dict[Key, int] = {}
        """Where in the log a version was last as the server is told to have it."""
        self._size = _size(server.log_file)
        """The log's at the look before."""
        self._looked = 0.0
        self._stamp = 0
        self._obstacle = ""
        self._failures: dict[Key, MarwrightError] = dict(server.failed)
        self._said: set[Key] = set(self._failures)
        for key, error in [*server.failed.items(), *server.refused.items()]:
            name = key if isinstance(key, str) else " ".join(key)
            _log.error("%s: %s", name, error, extra={"detail": error.detail})
        self._failing_since: dict[Key, float] = {}
        self._renewed: dict[Key, float] = {}

    def look(self, state: State, probe: Probe, memory_limit: int | None) -> View:
        """Return how each wanted version is, and the most urgent thing to do.

        `memory_limit` in bytes holds for workers of which deploy.yaml does not say another.
        """
        server = self._server
        wanted = list(server.wanted)
        live = {item.key: state.versions[item.key] for item in wanted if item.key in state.versions}
        ready = [i for i in wanted if i.key in live and live[i.key].ready_workers >= i.workers]
        # What was scaled down or unregistered by hand is not as wanted, and yet not broken.
        failing = [item for item in wanted if not _is_as_told(item, live.get(item.key))]
        self._read_failures(wanted, failing)
        probe.ask(self._client, server.staging.folder, [item for item in ready if item.workers])
        pids = [w.pid for version in live.values() for w in version.workers if w.pid > 0]
        memory = {pid: read_resident(pid) for pid in pids}
        models = describe_versions(
            wanted,
            state,
            failures=self._failures,
            refused=server.refused,
            probe=probe,
            memory=memory,
        )
        job = self._find_given_up(failing, state) or self._find_heavy(
            ready, state, memory, memory_limit
        )
        return View(models, tuple(compare(wanted, state)), job)

    def apply(self, deployment: Deployment) -> None:
        """Bring the server's models to what a deployment says.

        Raises what plan.carry_out raises; what was done before stays done.
        """
        server = self._server
        wanted = list_wanted(deployment)
        with hold_path(server.run_folder / "change"):  # marwright apply holds it too
            plan = make_plan(wanted, read_state(server.client), server.staging)
            server.wanted = wanted
            server.refused.clear()
            carry_out(plan, server.client, server.staging, report=_say_done)
        if plan:
            _log.info("the models are as the configuration says")

    def follow(self, deployment: Deployment) -> Deployment:
        """Return the deployment with what `marwright apply` has set meanwhile.

        What cannot be read is tried again at the next look.
        """
        path = self._server.run_folder / RUNNING_NAME
        stamp = path.stat().st_mtime_ns
        self._stamp = self._stamp or stamp
        if stamp == self._stamp:
            return deployment
        try:
            running = Deployment.model_validate_json(path.read_text(encoding="utf-8"))
            part = {"models": running.models, "supervision": running.supervision}
            fresh = deployment.model_copy(update=part)
            self._server.wanted = list_wanted(fresh)
        except (MarwrightError, OSError, ValueError) as exc:
            if str(exc) != self._obstacle:
                _log.warning("what marwright apply has set cannot be taken yet: %s", exc)
            self._obstacle = str(exc)
            return deployment
        self._stamp, self._obstacle = stamp, ""
        _log.info("the models are those that marwright apply has set")
        return fresh

    def restore(self, before: State) -> None:
        """Give a server that was started again the versions, workers and defaults it had before.

        What the configuration says it has by now; this is for what was changed by hand since.
        """
        now = read_state(self._client)
        for version in before.versions.values():
            try:
                self._restore_version(version, now)
            except MarwrightError as exc:
                text = f"{version.name} {version.version} is not as it was before: {exc}"
                _log.error("%s", text, extra={"detail": exc.detail})
        now = read_state(self._client)
        for name, default in before.defaults.items():
            if name in now.defaults and now.defaults[name] != default:
                with contextlib.suppress(ClientError):  # that one could not be loaded
                    self._client.models.set_default(name, default)
                    _log.info("made the default again: %s %s", name, default)

    def _restore_version(self, before: ModelVersion, now: State) -> None:
        key = before.name, before.version
        file, workers = Path(before.archive).name, before.min_workers
        staging = self._server.staging
        if key not in now.versions and (staging.folder / file).exists():
            staging.check(file)  # it may have been altered since it was registered
            start_version(self._client, file, key, workers)
            _log.info("registered again: %s %s", *key)
        elif key in now.versions and now.versions[key].min_workers != workers:
            most = before.max_workers if workers else 0
            self._client.models.scale(key[0], workers, version=key[1], max_workers=most)
            _log.info("scaled again: %s %s to %d", *key, workers)

    def _read_failures(self, wanted: list[Wanted], failing: list[Wanted]) -> None:
        """Find why workers die, in the log; say each version's reason once.

        Only what was logged since a version had its workers is about those that it lacks now.
        """
        keys = {item.key for item in failing}
        for item in wanted:
            if item.key not in keys:
                self._failures.pop(item.key, None)
                self._said.discard(item.key)
                self._offsets[item.key] = self._size
        self._size = _size(self._server.log_file)
        now = time.monotonic()
        if not keys or now - self._looked < LOG_SECONDS:
            return
        self._looked = now
        begins = {key: self._offsets.get(key, self._server.log_offset) for key in keys}
        for offset in sorted(set(begins.values())):
            for failure in read_failures(self._server.log_file, offset=offset):
                key = failure.model, failure.version
                if begins.get(key) == offset:
                    self._note(key, failure.to_error())

    def _note(self, key: Key, error: MarwrightError) -> None:
        self._failures[key] = error
        if key not in self._said:
            self._said.add(key)
            _log.error("%s", error, extra={"detail": error.detail})

    def _find_given_up(self, failing: list[Wanted], state: State) -> Callable[[], None] | None:
        """Return what starts the workers again of a version that TorchServe has given up."""
        now = time.monotonic()
        keys = {item.key for item in failing}
        self._failing_since = {
            key: since for key, since in self._failing_since.items() if key in keys
        }
        for item in failing:
            since = self._failing_since.setdefault(item.key, now)
            patience = float(item.settings.get("maxRetryTimeoutInSec") or RETRY_SECONDS) + 30
            version = state.versions.get(item.key)
            # Scaling to no worker ends those that serve too, so that one is enough to wait.
            if version is not None and not version.ready_workers and now - since > patience:
                self._failing_since[item.key] = now
                return functools.partial(self._scale_anew, item)
        return None

    def _scale_anew(self, item: Wanted) -> None:
        _log.warning("%s %s has no worker for long; starting them anew", *item.key)
        most = int(item.settings["maxWorkers"])
        self._client.models.scale(item.name, 0, version=item.version)
        self._client.models.scale(item.name, item.workers, version=item.version, max_workers=most)

    def _find_heavy(
        self, ready: list[Wanted], state: State, memory: dict[int, int], memory_limit: int | None
    ) -> Callable[[], None] | None:
        """Return what renews the worker that is furthest above its limit."""
        heavy: list[tuple[int, Wanted, int]] = []
        for item in ready:
            limit = item.entry.memory_limit or memory_limit
            if not limit or time.monotonic() - self._renewed.get(item.key, -1e9) < RENEW_SECONDS:
                continue
            for worker in state.versions[item.key].workers:
                excess = memory.get(worker.pid, 0) - limit
                if worker.ready and excess > 0:
                    heavy.append((excess, item, worker.pid))
        if not heavy:
            return None
        excess, item, pid = max(heavy, key=lambda entry: entry[0])
        return functools.partial(self._renew, item, pid, memory[pid], memory[pid] - excess)

    def _renew(self, item: Wanted, pid: int, resident: int, limit: int) -> None:
        from marwright.server.renewal import renew

        _log.info(
            "renewing worker %d of %s %s: %d MiB, limit %d MiB",
            pid,
            *item.key,
            resident >> 20,
            limit >> 20,
        )
        try:
            with self._census.expect_ends(item.key):
                how = renew(self._client, item.name, item.version, pid)
            _log.info("renewed worker %d of %s %s, %s", pid, *item.key, how)
        finally:
            self._renewed[item.key] = time.monotonic()


def _is_as_told(item: Wanted, live: ModelVersion | None) -> bool:
    """Whether a version has the workers that it is to have, or fewer because somebody said so."""
    return live is not None and live.ready_workers >= min(item.workers, live.min_workers)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _say_done(step: Step) -> None:
    _log.info("%s", step.describe())
