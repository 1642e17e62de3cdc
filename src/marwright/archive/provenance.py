"""Provenance: what an archive was made from, as it travels inside it.

It holds inputs only: the same inputs give the same archive on every machine, so nothing of the
machine, the user, the folder or the time may stand here (docs/decisions/0008-provenance.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marwright import __version__
from marwright.archive.member import PROVENANCE_NAME
from marwright.archive.run import Run
from marwright.archive.worktree import WorkTree
from marwright.errors import RunError

__all__ = ["make_provenance", "Provenance", "PROVENANCE_NAME", "Source"]

FORMAT = 1

# How long a training took, and where its files lay, are facts of its machine: trainings of one seed
# differ in nothing else.
_OF_THE_MACHINE = {"data_root", "items_per_second", "seconds", "train_seconds", "unreadable"}


@dataclass(frozen=True)
class Source:
    """The commit that a spec stands at, and the packed files that this commit does not hold."""

    commit: str
    modified: tuple[str, ...]
    """Names relative to the spec's folder."""
    untracked: tuple[str, ...]
    """Likewise."""
    outside: tuple[str, ...]
    """Files of no place in the work tree, by their last names only."""


@dataclass(frozen=True)
class Provenance:
    """What an archive was made from."""

    source: Source | None = None
    """None for a spec that git does not know."""
    training: dict[str, Any] | None = None
    """Config and report: versions, seed, data digest, commit, accuracy."""

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        document = {
            "format": FORMAT,
            "packed_by": {"name": "marwright", "version": __version__},
            "source": asdict(self.source) if self.source else None,
            "training": self.training,
        }
        known = {key: value for key, value in document.items() if value is not None}
        return _dump(known)


def make_provenance(
    *,
    run: Run | None = None,
    report: Mapping[str, Any] | None = None,
    spec_path: Path | None = None,
    sources: Sequence[Path] = (),
) -> Provenance:
    """Gather what a run, or a spec with the report it names, says of its origin.

    `sources` are the files packed for the spec, but for marwright's own, which its version names.

    Raises:
        RunError: the report holds a number that JSON has no word for.
    """
    parts = {"config": run.config, "report": run.report} if run else {"report": report}
    return Provenance(
        source=_find_source(spec_path, sources) if spec_path else None,
        training=_describe_training({key: part for key, part in parts.items() if part}),
    )


def _find_source(spec_path: Path, sources: Sequence[Path]) -> Source | None:
    """Return the commit of a spec; None where that commit holds not one of its files."""
    folder = spec_path.parent.resolve()
    tree = WorkTree.find(folder)
    if tree is None:
        return None
    modified, untracked, outside, held = set(), set(), set(), False
    for path in (spec_path, *sources):
        name = tree.name_of(path)
        if name is None:
            outside.add(path.name)
            continue
        shown = Path(os.path.relpath(tree.root / name, folder)).as_posix()
        if name not in tree.tracked:
            untracked.add(shown)
            continue
        held = True
        if name in tree.changed:
            modified.add(shown)
    if not held:
        return None
    return Source(tree.commit, *(tuple(sorted(names)) for names in (modified, untracked, outside)))


def _describe_training(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    training = {
        name: {key: value for key, value in part.items() if key not in _OF_THE_MACHINE}
        for name, part in parts.items()
    }
    try:
        _dump(training)
    except (ValueError, RecursionError) as exc:
        raise RunError(
            "what is told of the training cannot be packed",
            expected="a report without NaN and infinity, and not nested deeply",
            found=str(exc),
            remedy="train again, or correct the report",
        ) from exc
    return training or None


def _dump(document: object) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
