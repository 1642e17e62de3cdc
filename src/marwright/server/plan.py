"""The way from a server's state to the wanted one: steps, in an order that keeps models answering.

New versions come first and wait for their workers, then defaults move, and only then goes what is
not wanted. What TorchServe 0.12 cannot change in place is registered anew: that interrupts the
version, which the plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from marwright.client import Client, ModelVersion
from marwright.errors import ConfigurationError, MarwrightError, ModelNotFoundError
from marwright.server.registration import start_version
from marwright.server.state import Key, State, list_differences
from marwright.server.wanted import Wanted

__all__ = ["carry_out", "make_plan", "Plan", "Stage", "Step"]

_WORKER_SETTINGS = {"minWorkers", "maxWorkers"}
"""What TorchServe changes in place."""
Kind = Literal["register", "re-register", "scale", "default", "unregister"]


class Stage(Protocol):
    """Where a server's archives are made ready; see staging.Staging."""

    def try_stage(self, wanted: Wanted) -> contextlib.AbstractContextManager[str]:
        """Bring a version's archive in and yield its file name, unless the block fails."""

    def unstage(self, file: str) -> None:
        """Take one out."""

    def is_current(self, wanted: Wanted, *, besides: Collection[str] = ()) -> bool:
        """Whether what is there is what is wanted, `besides` some settings."""


@dataclass(frozen=True)
class Step:
    """One thing to be done to one version."""

    kind: Kind
    name: str
    version: str
    before: str = ""
    """What changes, as it is."""
    after: str = ""
    """What changes, as it is to be."""
    interrupts: bool = False
    """Whether requests for this version fail meanwhile."""
    meanwhile: str = ""
    """The version that is the default while the default itself is registered anew."""
    wanted: Wanted | None = None
    live: ModelVersion | None = None

    @property
    def key(self) -> Key:
        """Model and version."""
        return self.name, self.version

    def to_json(self) -> dict[str, Any]:
        """Return the step as `marwright apply --json` prints it."""
        keys = ("kind", "name", "version", "before", "after", "interrupts", "meanwhile")
        return {key: getattr(self, key) for key in keys}

    def describe(self) -> str:
        """Return the step in one line."""
        change = " -> ".join(filter(None, (self.before, self.after)))
        text = f"{self.kind} {self.name} {self.version}" + (f": {change}" if change else "")
        if self.meanwhile:
            text += f" ({self.meanwhile} is the default meanwhile)"
        return f"{text} (interrupts it)" if self.interrupts else text


@dataclass(frozen=True)
class Plan:
    """Steps in their order; none where the server is as wanted."""

    steps: tuple[Step, ...]

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.steps)

    def describe(self) -> str:
        """Return the plan, a line a step."""
        return "\n".join(step.describe() for step in self.steps) or "nothing to do"


def make_plan(wanted: Sequence[Wanted], state: State, staging: Stage | None) -> Plan:
    """Return what has to be done to a server.

    Without a staging the server reads a store of its own, which is not changed: archives are
    registered by their file names, with the settings that they bring.

    Raises:
        ConfigurationError: it would take settings that such a server cannot be given.
    """
    keys = {item.key for item in wanted}
    new = [_register(item) for item in wanted if item.key not in state.versions]
    old = [(item, state.versions[item.key]) for item in wanted if item.key in state.versions]
    stale = {item.key: _find_changes(item, live, staging) for item, live in old}
    renewed = [_renew(item, live, stale[item.key]) for item, live in old if stale[item.key]]
    scaled = [step for item, live in old if not stale[item.key] for step in _scale(item, live)]
    if staging is None:
        _refuse_settings([*new, *renewed])
    defaults = [
        Step(
            "default", *item.key, before=state.defaults[item.name], after=item.version, wanted=item
        )
        for item in wanted
        if item.default and state.defaults.get(item.name, item.version) != item.version
    ]
    before = [step for step in renewed if state.defaults[step.name] != step.version]
    last = [_choose_meanwhile(step, wanted, state) for step in renewed if step not in before]
    gone = sorted(
        (
            Step("unregister", *key, before=_count(live.min_workers), interrupts=bool(live.workers))
            for key, live in state.versions.items()
            if key not in keys
        ),
        # A default version goes only once it is the last one.
        key=lambda step: state.defaults[step.name] == step.version,
    )
    up = [step for step in scaled if step.live and step.wanted and _is_up(step)]
    down = [step for step in scaled if step not in up]
    return Plan((*new, *up, *before, *defaults, *last, *down, *gone))


def carry_out(
    plan: Plan,
    client: Client,
    staging: Stage | None,
    *,
    report: Callable[[Step], None] = lambda step: None,
) -> None:
    """Do the steps of a plan; `report` hears of each that is done.

    A step that fails leaves the server as it was before that step, and ends the work.

    Raises:
        ModelLoadError: a worker died while loading; `detail` is its traceback.
        ArchiveError: the policy refuses an archive.
        ClientError: the server did not do it.
    """
    for step in plan.steps:
        _DO[step.kind](step, client, staging)
        report(step)


def _register(item: Wanted) -> Step:
    after = f"{item.path.name}, {_count(item.workers)}"
    return Step("register", *item.key, after=after, wanted=item)


def _renew(item: Wanted, live: ModelVersion, changes: Sequence[tuple[str, str]]) -> Step:
    before = ", ".join(text for text, _ in changes if text)
    after = ", ".join(text for _, text in changes)
    busy = bool(live.workers)
    return Step("re-register", *item.key, before, after, interrupts=busy, wanted=item, live=live)


def _scale(item: Wanted, live: ModelVersion) -> Iterator[Step]:
    """Yield the step that gives a version its number of workers, where it has another one."""
    least, most = item.workers, int(item.settings["maxWorkers"]) if item.workers else 0
    same = live.min_workers == least and (not least or live.max_workers == most)
    if same and least <= len(live.workers) <= most:
        return
    before = _count(len(live.workers), live.max_workers)
    yield Step("scale", *item.key, before, _count(least, most), wanted=item, live=live)


def _is_up(step: Step) -> bool:
    assert step.wanted is not None  # a step of _scale
    assert step.live is not None
    return step.wanted.workers > len(step.live.workers)


def _find_changes(item: Wanted, live: ModelVersion, staging: Stage | None) -> list[tuple[str, str]]:
    """Return what cannot be changed in place, as pairs of words: before and after."""
    shown = [
        (f"{what} {was}", f"{what} {meant}")
        for what, was, meant in list_differences(item, live)
        if what not in _WORKER_SETTINGS
    ]
    if shown or staging is None or staging.is_current(item, besides=_WORKER_SETTINGS):
        return shown
    return [("", "archive or settings changed")]


def _refuse_settings(steps: Sequence[Step]) -> None:
    """Refuse settings that only a rewritten archive brings, where the store is not ours."""
    lines = [
        f"{step.name} {step.version}: {key} {value}"
        for step in steps
        if step.wanted
        for key, value in step.wanted.changes.items()
        if key not in _WORKER_SETTINGS
    ]
    if lines:
        raise ConfigurationError(
            "this server's store is its own, and its archives keep their settings",
            found=f"{len(lines)} settings of deploy.yaml that differ from them",
            remedy="pack them into the archives, or serve them with marwright serve",
            detail="\n".join(lines),
        )


def _choose_meanwhile(step: Step, wanted: Sequence[Wanted], state: State) -> Step:
    """Return the step with the version that is the default while the default is away.

    TorchServe does not unregister a default version beside others. One with workers is best.
    """
    if any(item.default and item.key == step.key for item in wanted):
        workers = {
            version.version: version.ready_workers for version in state.list_versions(step.name)
        }
        workers |= {item.version: item.workers for item in wanted if item.name == step.name}
        others = [version for version in workers if version != step.version]
        best = max(others, key=lambda version: workers[version], default="")
        return replace(step, meanwhile=best)
    return step  # its default has moved by then


def _count(least: int, most: int | None = None) -> str:
    """Return a number of workers in words."""
    number = f"{least} to {most}" if most is not None and most > least else str(least)
    return f"{number} worker{'' if number == '1' else 's'}"


def _do_register(step: Step, client: Client, staging: Stage | None) -> None:
    item = step.wanted
    assert item is not None  # make_plan gives each such step one
    with _try_stage(item, staging) as file:
        _start(item, client, file)


def _do_renew(step: Step, client: Client, staging: Stage | None) -> None:
    item, live = step.wanted, step.live
    assert item is not None  # make_plan gives each such step both
    assert live is not None
    try:
        with _try_stage(item, staging) as file:
            if step.meanwhile:
                client.models.set_default(step.name, step.meanwhile, force=True)
            client.models.unregister(*step.key)
            _start(item, client, file)
    except (MarwrightError, KeyboardInterrupt):
        with contextlib.suppress(MarwrightError):  # the first error is the one that counts
            _restore(step, live, client)
        raise
    if step.meanwhile:
        client.models.set_default(*step.key, force=True)
    old = live.archive.rpartition("/")[2]
    if staging is not None and old != file:
        staging.unstage(old)


def _restore(step: Step, live: ModelVersion, client: Client) -> None:
    """Register again what was there, and make it the default again if it was."""
    try:
        client.models.describe(*step.key)
    except ModelNotFoundError:
        start_version(client, live.archive, step.key, live.min_workers)
        if live.max_workers > live.min_workers > 0:
            _scale_back(live, client)
    if step.meanwhile:
        client.models.set_default(*step.key, force=True)


def _scale_back(live: ModelVersion, client: Client) -> None:
    most = live.max_workers if live.min_workers else 0
    client.models.scale(live.name, live.min_workers, version=live.version, max_workers=most)


@contextlib.contextmanager
def _try_stage(item: Wanted, staging: Stage | None) -> Iterator[str]:
    if staging is None:
        yield item.path.name
    else:
        with staging.try_stage(item) as file:
            yield file


def _start(item: Wanted, client: Client, file: str) -> None:
    """Register a version and wait for its workers, in the numbers that are wanted."""
    started = start_version(client, file, item.key, item.workers)
    if any(_scale(item, started)):
        _set_workers(item, client)


def _set_workers(item: Wanted, client: Client) -> None:
    # With a maximum above 0, TorchServe 0.12 stops no worker of a version that is to have none.
    most = int(item.settings["maxWorkers"]) if item.workers else 0
    client.models.scale(item.name, item.workers, version=item.version, max_workers=most)


def _do_scale(step: Step, client: Client, staging: Stage | None) -> None:
    item, live = step.wanted, step.live
    assert item is not None  # make_plan gives each such step both
    assert live is not None
    try:  # the staged archive keeps its numbers: they count only when it is registered
        _set_workers(item, client)
    except (MarwrightError, KeyboardInterrupt):
        with contextlib.suppress(MarwrightError):
            _scale_back(live, client)
        raise


def _do_default(step: Step, client: Client, staging: Stage | None) -> None:
    idle = bool(step.wanted and not step.wanted.workers)
    client.models.set_default(*step.key, force=idle)


def _do_unregister(step: Step, client: Client, staging: Stage | None) -> None:
    file = client.models.describe(*step.key).archive.rpartition("/")[2]
    client.models.unregister(*step.key)
    if staging is not None:
        staging.unstage(file)


_DO: dict[Kind, Callable[[Step, Client, Stage | None], None]] = {
    "register": _do_register,
    "re-register": _do_renew,
    "scale": _do_scale,
    "default": _do_default,
    "unregister": _do_unregister,
}
