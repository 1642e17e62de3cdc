"""The splits of a site's traffic: set while it serves, kept for whoever adopts it, observed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from marwright.errors import UsageError
from marwright.gateway.files import SiteFiles
from marwright.gateway.observation import Observation
from marwright.gateway.traffic import Split, Traffic

__all__ = ["Splits"]


class Splits:
    """What a site's endpoints are asked of its traffic; from any thread.

    `use` brings the traffic into use; `lock` is held by whoever changes the gateway.
    """

    def __init__(self, use: Callable[[], None], *, lock: AbstractContextManager[Any]) -> None:
        self.traffic = Traffic()
        self._use = use
        self._lock = lock
        self._files: SiteFiles | None = None
        self._observation = Observation()
        self.answers = {"/observed": self.tell, "/traffic": self.direct}

    def take(self, files: SiteFiles) -> None:
        """Take the splits that a killed site has left."""
        self._files = files
        self.traffic = files.read_traffic()
        for split in self.traffic.splits:
            self._observation.watch(split)

    @contextlib.contextmanager
    def observe_gateway(self, folder: Path) -> Iterator[None]:
        """Look at what the gateway of a run folder answers until the block ends."""
        with contextlib.ExitStack() as stack:
            self._observation.open(folder, stack)
            yield

    def look(self) -> None:
        """Take what the gateway has logged."""
        self._observation.read()

    def direct(self, asked: Any) -> dict[str, Any]:
        """Set a model's split, or with {"model": NAME} alone take it away; return all splits.

        `asked` None changes nothing. It is in use once this returns, and outlives the site's own
        death.

        Raises:
            UsageError: it is no split.
        """
        if asked is not None:
            model = _read_model(asked)
            split = _read_split(asked) if len(asked) > 1 else None
            if split is not None:
                self._observation.watch(split)
            self._set(model, split)
        return dataclasses.asdict(self.traffic)

    def _set(self, model: str, split: Split | None) -> None:
        assert self._files is not None  # they were taken before anybody asks
        with self._lock:
            before = self.traffic
            traffic = before.without(model)
            self.traffic = traffic.with_split(split) if split is not None else traffic
            try:
                self._use()
            except BaseException:
                self.traffic = before
                raise
            self._files.write_traffic(self.traffic)

    def tell(self, asked: Any) -> dict[str, Any]:
        """Return what both versions of a model's split answered since it was first set.

        `asked` {"model": NAME, "since": COUNT} leaves out what earlier calls had; with "captured"
        the copied requests are handed over too.
        """
        model = _read_model(asked)
        return self._observation.tell(model, asked.get("since"), bool(asked.get("captured")))


def _read_model(asked: Any) -> str:
    """Return which model is meant; raises UsageError where none is named."""
    if not isinstance(asked, dict) or not isinstance(asked.get("model"), str):
        raise UsageError("no model is named", expected='{"model": NAME, ...}')
    return str(asked["model"])


def _read_split(asked: dict[str, Any]) -> Split:
    """Return the split that is meant; raises UsageError where it is none."""
    try:
        return Split(**asked)
    except TypeError as exc:
        raise UsageError("no such split is possible", found=str(exc)) from exc
