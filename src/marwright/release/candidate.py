"""The archive that is to be released, and all that speaks against it before anything moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.admission import admit, find_policy, read_policy
from marwright.archive.checks.samples import Sample
from marwright.archive.reader import read_manifest
from marwright.errors import ClientError, MarwrightError, ModelNotFoundError, ReleaseError
from marwright.release.target import Target
from marwright.server.samples import read_samples

__all__ = ["Candidate", "examine"]


@dataclass(frozen=True)
class Candidate:
    """One version of a model, beside the one that is the default now."""

    path: Path
    model: str
    version: str
    before: str
    """The version that is the default."""
    workers: int
    """How many the default version has, and the candidate is to have."""
    samples: tuple[tuple[Any, Sample], ...]
    digest: str
    """SHA-256 of the archive's file."""

    @property
    def key(self) -> tuple[str, str]:
        """Model and version."""
        return self.model, self.version


def examine(path: Path, target: Target, *, resuming: bool = False) -> Candidate:
    """Return what is to be released; nothing is moved.

    `resuming`: a release of this archive was interrupted, so that it may have been moved by now.

    Raises:
        ReleaseError: all that speaks against it, at once.
        ArchiveError: the file is no archive.
    """
    if not path.exists() and path.parent == Path() and target.store is not None:
        path = target.store / path
    manifest = read_manifest(path)
    key = manifest.name, manifest.version
    problems = [*_check_archive(path, target), *_check_samples(path, target)]
    before, workers = "", 1
    try:
        for client in target.clients:
            now = client.models.describe(key[0])
            before, workers = before or now.version, now.min_workers
            if now.version == key[1] and not resuming:
                problems.append(f"{key[0]} {key[1]} is the default already")
        if pending := target.list_pending():
            problems.append(f"deploy.yaml is not applied yet: {', '.join(pending)}")
    except ModelNotFoundError:
        names = ", ".join(model.name for model in target.clients[0].models.list()) or "none"
        problems.append(f"no model {key[0]} is served there, but: {names}")
    except ClientError as exc:
        problems.append(str(exc))
    except MarwrightError as exc:
        problems.append(" ".join([str(exc), *exc.detail.split()]))
    if problems:
        raise ReleaseError(
            f"{path.name} cannot be released to {target.name}",
            found=problems[0] if len(problems) == 1 else f"{len(problems)} problems",
            remedy="nothing was moved; mend it, and try again",
            detail="\n".join(problems) if len(problems) > 1 else "",
        )
    samples = tuple(read_samples(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Candidate(path, *key, before, max(1, workers), samples, digest)


def _check_archive(path: Path, target: Target) -> Iterator[str]:
    """Yield why the store's policy refuses it."""
    policy_path = target.clients[0].endpoint.policy
    try:
        found = find_policy(target.store) if target.store and policy_path is None else None
        admit(path, read_policy(policy_path) if policy_path else found)
    except MarwrightError as exc:
        yield " ".join([str(exc), *exc.detail.split()])
    if target.store is None:
        yield "the server's store is not known here: pass --store"


def _check_samples(path: Path, target: Target) -> Iterator[str]:
    """Yield what keeps its samples from being a gate."""
    if not target.settings.samples:
        return
    try:
        samples = read_samples(path)
    except MarwrightError as exc:
        yield str(exc)
        return
    if not samples:
        yield "it carries no sample: pack it with --sample, or set releases.samples: false"
    for _, sample in samples:
        if sample.answer is None and (sample.status or 200) < 400:
            yield f"sample {sample.name} has no recorded answer: pack it again with --preflight"
