"""What a running server has: versions, workers, settings, defaults; and how that differs.

TorchServe tells of a version most of what holds, but not the settings of its handler: that an
archive is the wanted one, with the wanted settings, is known by its staging (plan.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from marwright.client import Client, ModelVersion
from marwright.errors import ModelNotFoundError
from marwright.server.wanted import Wanted

__all__ = ["compare", "list_differences", "read_state", "State"]

Key = tuple[str, str]
CONNECTIONS = 8
"""Questions that are asked at once; a server of 200 models then answers within half a second."""


@dataclass(frozen=True)
class State:
    """The registered versions of a server, and which of them are the defaults."""

    versions: Mapping[Key, ModelVersion]
    """By model and version."""
    defaults: Mapping[str, str]
    """The default version of each model."""

    def list_versions(self, name: str) -> list[ModelVersion]:
        """Return the registered versions of one model."""
        return [version for (model, _), version in self.versions.items() if model == name]


def read_state(client: Client) -> State:
    """Ask a server what it has registered: one question a model, two where it has versions.

    What is unregistered meanwhile is left out.

    Raises:
        ClientError: the server does not answer, or not as TorchServe does.
    """
    names = [summary.name for summary in client.models.list()]
    if not names:
        return State({}, {})
    with ThreadPoolExecutor(min(CONNECTIONS, len(names))) as pool:
        answers = list(pool.map(lambda name: _read_model(client, name), names))
    found = {version.name: default for versions, default in answers for version in versions}
    listed = [version for versions, _ in answers for version in versions]
    return State({(item.name, item.version): item for item in listed}, found)


def _read_model(client: Client, name: str) -> tuple[tuple[ModelVersion, ...], str]:
    """Return a model's versions and its default one."""
    try:
        versions = client.models.versions(name)
        if len(versions) == 1:
            return versions, versions[0].version
        return versions, client.models.describe(name).version
    except ModelNotFoundError:
        return (), ""


def compare(wanted: Iterable[Wanted], state: State, *, others: bool = True) -> list[str]:
    """Return every difference between what is wanted and what the server tells, a line each.

    A worker that is not READY yet is a difference; so are versions besides, unless `others` is off.
    """
    found = []
    items = list(wanted)
    for item in items:
        label = f"{item.name} {item.version}"
        version = state.versions.get(item.key)
        if version is None:
            found.append(f"{label} is not registered")
            continue
        found += [
            f"{label}: {what} is {live}, wanted {meant}"
            for what, live, meant in list_differences(item, version)
        ]
        if version.ready_workers < item.workers:
            found.append(f"{label}: {version.ready_workers} of {item.workers} workers are READY")
        if item.default and state.defaults[item.name] != item.version:
            live = state.defaults[item.name]
            found.append(f"{item.name}: the default is {live}, wanted {item.version}")
    keys = {item.key for item in items}
    unwanted = [key for key in state.versions if others and key not in keys]
    return found + [f"{name} {version} is registered, not wanted" for name, version in unwanted]


def list_differences(item: Wanted, version: ModelVersion) -> Iterator[tuple[str, object, object]]:
    """Yield what of a version's settings differs: setting, live value, wanted value."""
    if version.archive.rpartition("/")[2] != item.path.name:
        yield "archive", version.archive, item.path.name
    shown = {
        "batchSize": version.batch_size,
        "maxBatchDelay": version.max_batch_delay_ms,
        "responseTimeout": version.response_timeout,
        "startupTimeout": version.startup_timeout,
        "jobQueueSize": version.queue_room + version.queue_length,
    }
    for key, live in shown.items():
        # 0: an older TorchServe does not tell it. Nor does every archive say all of them.
        if live and item.settings.get(key) not in (None, live):
            yield key, live, item.settings[key]
    yield from list_worker_differences(item, version)


def list_worker_differences(
    item: Wanted, version: ModelVersion
) -> Iterator[tuple[str, object, object]]:
    """Yield what of a version's numbers of workers differs, as list_differences does."""
    if version.min_workers != item.workers:
        yield "minWorkers", version.min_workers, item.workers
    most = int(item.settings["maxWorkers"])
    if item.workers and version.max_workers != most:  # without workers it says nothing
        yield "maxWorkers", version.max_workers, most
