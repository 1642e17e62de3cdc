"""What of a prediction log has been collected, and which parts count.

What is added and what is removed at once stands in one small file, the ledger, together with how
far the spool has been collected. Its rename is the moment at which all of it has happened: files
that it adds are whole under a hidden name before, and take their own name after it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from marwright.errors import StorageError
from marwright.monitor.parts import PLACE, hide
from marwright.monitor.spool import open_plain
from marwright.storage import translate_os_errors, write_file

__all__ = ["Ledger", "LEDGER_NAME"]

LEDGER_NAME = "collected.json"


@dataclass(frozen=True)
class Ledger:
    """What has been collected, and the change that was made last."""

    generation: int = 0
    """How many changes there were: whoever reads the same one before and after saw none."""
    offsets: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """For each spool file its head, and how many bytes of it are collected."""
    adds: tuple[str, ...] = ()
    """Parts that have taken their names since, or are about to."""
    removes: tuple[str, ...] = ()
    """Parts that have gone since, or are about to."""

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """Return a log's ledger; one of nothing where there is none.

        Raises:
            StorageError: it is not one of ours.
        """
        path = folder / LEDGER_NAME
        with translate_os_errors(f"read {path}"):
            stream = open_plain(path)
            if stream is None:
                return cls()
            with stream:
                text = stream.read()
        try:
            item = json.loads(text)
            offsets = {name: (str(head), int(end)) for name, (head, end) in item["offsets"].items()}
            adds, removes = tuple(item["adds"]), tuple(item["removes"])
            if not all(PLACE.fullmatch(place) for place in (*adds, *removes)):
                raise ValueError("a place outside the log")
            return cls(int(item["generation"]), offsets, adds, removes)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StorageError(
                f"{path} cannot be used",
                found=f"{type(exc).__name__}: {exc}",
                remedy="remove it; what the spool holds may be kept twice then",
            ) from exc

    def advance(
        self,
        *,
        offsets: Mapping[str, tuple[str, int]] | None = None,
        adds: Iterable[str] = (),
        removes: Iterable[str] = (),
    ) -> Ledger:
        """Return the ledger after one more change."""
        return replace(
            self,
            generation=self.generation + 1,
            offsets=self.offsets if offsets is None else offsets,
            adds=tuple(adds),
            removes=tuple(removes),
        )

    def commit(self, folder: Path) -> Ledger:
        """Make the change, whole or not at all."""
        try:
            with write_file(folder / LEDGER_NAME) as stream:
                facts = ("generation", "offsets", "adds", "removes")
                stream.write(json.dumps({key: getattr(self, key) for key in facts}).encode())
        except BaseException:
            self.discard(folder)
            raise
        self.settle(folder)
        return self

    def discard(self, folder: Path) -> None:
        """Remove what was to be added, unless it counts already: a signal may come at any time."""
        if Ledger.read(folder).generation < self.generation:
            for place in self.adds:
                hide(folder / place).unlink(missing_ok=True)

    def settle(self, folder: Path) -> None:
        """Bring the folder to what the ledger says; after a kill, what was left to be done."""
        with translate_os_errors(f"write {folder}"):
            for place in self.adds:
                with contextlib.suppress(FileNotFoundError):
                    hide(folder / place).rename(folder / place)
            for place in self.removes:
                (folder / place).unlink(missing_ok=True)
