"""The archive that is to be released, and all that speaks against it before anything moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.admission import admit, find_policy, read_policy
from marwright.archive.checks.samples import Sample
from marwright.archive.digests import digest_stream
from marwright.archive.reader import read_manifest
from marwright.errors import ClientError, MarwrightError, ModelNotFoundError, ReleaseError
from marwright.release.entries import is_listed, read_entry
from marwright.release.history import Line, Place
from marwright.release.target import Target, find_version, list_files
from marwright.server.deployment import ModelEntry
from marwright.server.samples import read_samples
from marwright.storage import translate_os_errors

__all__ = ["Candidate", "digest_file", "examine", "find_archive"]


@dataclass(frozen=True)
class Candidate:
    """One version of a model, beside the one that is the default now."""

    path: Path
    model: str
    version: str
    digest: str
    """SHA-256 of the archive's file."""
    before: str
    """The version that is the default."""
    before_archive: str
    """The file name of that one."""
    workers: int
    """How many the default version has, and the candidate is to have."""
    entry: ModelEntry
    """What deploy.yaml says of the default version but for workers, or of this archive by now."""
    samples: tuple[tuple[Any, Sample], ...]
    present: tuple[Place, ...]
    """Where it is already."""

    @property
    def key(self) -> tuple[str, str]:
        """Model and version."""
        return self.model, self.version

    def to_json(self) -> dict[str, Any]:
        """Return what `--check --json` prints."""
        keys = ("model", "version", "digest", "before", "before_archive", "workers")
        return {"archive": self.path.name, **{key: getattr(self, key) for key in keys}}


def find_archive(path: Path, target: Target) -> Path:
    """Return an archive's place; a bare name may stand for one of the store."""
    if not path.exists() and path.parent == Path() and target.store is not None:
        return target.store / path
    return path


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        StorageError: it cannot be read, or is a folder.
    """
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        return digest_stream(stream)


def examine(path: Path, target: Target, *, begun: Line | None = None) -> Candidate:
    """Return what is to be released; nothing is moved.

    `begun`: a release of this archive was interrupted, so that it may have been moved by now.

    Raises:
        ReleaseError: all that speaks against it, at once.
        ArchiveError: the file is no archive.
    """
    manifest = read_manifest(path)
    key = manifest.name, manifest.version
    problems = [
        *_check_archive(path, target),
        *_check_samples(path, target),
        *_check_servers(path, key, target, begun),
        *_check_deployment(key, target, begun),
    ]
    if problems:
        raise ReleaseError(
            f"{path.name} cannot be released to {target.name}",
            found=problems[0] if len(problems) == 1 else f"{len(problems)} problems",
            remedy="nothing was moved; mend it, and try again",
            detail="\n".join(problems) if len(problems) > 1 else "",
        )
    client = target.clients[0]
    now = client.models.describe(key[0])
    before = begun.before if begun else now.version
    before_archive = list_files(client, key[0]).get(before, "")
    return Candidate(
        path,
        *key,
        digest=digest_file(path),
        before=before,
        before_archive=before_archive,
        workers=max(1, now.min_workers),
        entry=read_entry(target, path.name, like=before_archive),
        samples=tuple(read_samples(path)),
        present=tuple(_list_places(path, key, target)),
    )


def _check_archive(path: Path, target: Target) -> Iterator[str]:
    """Yield why the store cannot take it."""
    store, policy = target.store, target.clients[0].endpoint.policy
    if store is None:
        yield "the server's store is not known here: pass --store"
        return
    try:
        admit(path, read_policy(policy) if policy else find_policy(store))
    except MarwrightError as exc:
        yield " ".join([str(exc), *exc.detail.split()])
    stored = store / path.name
    if stored.exists() and digest_file(stored) != digest_file(path):
        yield f"the store holds another {path.name}: give this archive a file name of its own"


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
        yield "it carries no sample: name some in its model.yaml, or set releases.samples: false"
    for _, sample in samples:
        if sample.answer is None and (sample.status or 200) < 400:
            yield (
                f"sample {sample.name} has no recorded answer: say it in model.yaml,"
                " or set releases.samples: false"
            )


def _check_servers(
    path: Path, key: tuple[str, str], target: Target, begun: Line | None
) -> Iterator[str]:
    """Yield what the servers have against it, each problem once."""
    problems: dict[str, None] = {}
    away = target.replicas - len(target.clients)
    if away > 0:
        problems[f"of {target.replicas} replicas {away} is away: marwright status"] = None
    for client in target.clients:
        try:
            if client.models.describe(key[0]).version == key[1] and begun is None:
                problems[f"{' '.join(key)} is the default already"] = None
            found = find_version(client, *key)
            if found is not None and (file := found.archive.rpartition("/")[2]) != path.name:
                problems[f"{' '.join(key)} is registered already, from {file}"] = None
        except ModelNotFoundError:
            names = ", ".join(model.name for model in client.models.list()) or "none"
            problems[f"no model {key[0]} is served there, but: {names}"] = None
        except ClientError as exc:
            problems[str(exc)] = None
    yield from problems


def _check_deployment(key: tuple[str, str], target: Target, begun: Line | None) -> Iterator[str]:
    """Yield what deploy.yaml says and the servers are not; but for what is being released."""
    try:
        pending = [
            f"{step['kind']} {step['name']} {step['version']}"
            for step in target.list_pending()
            if (step["name"], step["version"]) != key
            and not (begun is not None and step["name"] == key[0])
        ]
    except MarwrightError as exc:
        yield " ".join([str(exc), *exc.detail.split()])
        return
    if pending:
        yield f"deploy.yaml is not applied yet: {', '.join(pending)}"


def _list_places(path: Path, key: tuple[str, str], target: Target) -> Iterator[Place]:
    if target.store is not None and (target.store / path.name).exists():
        yield "store"
    if find_version(target.clients[0], *key) is not None:
        yield "servers"
    if is_listed(target, path.name):
        yield "deploy.yaml"
