"""Packing: a run, a spec, or torch-model-archiver's arguments become one archive.

Each way first becomes a Draft. What follows is the same for all: checks that run nothing, a
preflight in a process of its own, and only then the file.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from marwright.archive.archiver import Arguments
from marwright.archive.checks.findings import Finding, refuse
from marwright.archive.digests import digest_stream
from marwright.archive.draft import Draft
from marwright.archive.handler import find_ours
from marwright.archive.member import Member, Stretch
from marwright.archive.provenance import make_provenance
from marwright.archive.run import CLASSES_NAME, REFERENCE_NAME, Choice, Run
from marwright.archive.settings import ModelSettings
from marwright.archive.spec import Spec
from marwright.archive.writer import suffix_of, write_archive
from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["pack_arguments", "pack_run", "pack_spec", "Packed", "Preflight"]

_log = logging.getLogger(__name__)

CLASSIFIER = "image_classifier"
"""Our handler that answers labels with probabilities, as a run's samples record them."""
TENSOR = "tensor"
"""Our handler of arrays, such as the rows of a table."""
SAMPLE_TYPES = {".png": "image/png", ".json": "application/json"}
PROBABILITIES = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
}
COPIED_BYTES = 1 << 20
"""Larger files are linked into the staged folder, not copied."""


@dataclass(frozen=True)
class Preflight:
    """How an archive is tried before it is written."""

    samples: tuple[Path, ...] = ()
    """Requests besides those that the archive itself carries."""
    timeout: float = 120.0
    """Seconds until a handler that hangs is a finding."""


@dataclass(frozen=True)
class Packed:
    """An archive that was written."""

    path: Path
    name: str
    version: str
    size_bytes: int
    root_digest: str
    """Over all members: the same for the same content, in whatever format."""
    findings: tuple[Finding, ...]
    """What the checks found, none of it grave."""
    figures: dict[str, Any]
    """The preflight's: load seconds, peak memory, seconds a request; empty without one."""

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, read when it is asked for; empty for a folder."""
        if self.path.is_dir():
            return ""
        with translate_os_errors(f"read {self.path}"), self.path.open("rb") as stream:
            return digest_stream(stream)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as `--json` prints them."""
        return {
            "path": str(self.path),
            "name": self.name,
            "version": self.version,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "root_digest": self.root_digest,
            "findings": [finding.to_json() for finding in self.findings],
            "figures": self.figures,
        }


def pack_run(
    run: Run,
    *,
    out: Path,
    name: str = "cnn",
    version: str = "1.0",
    handler: str | None = None,
    settings: Mapping[str, Any] | None = None,
    optimised: bool = False,
    force: bool = False,
    preflight: Preflight | None = Preflight(),
) -> Packed:
    """Pack a run's model with its classes, samples and a handler.

    The handler is image_classifier, or tensor for a table, where none is named. With `optimised`
    the file that optimising chose is packed, where it did. `out` is the store folder, or the
    `.mar` file itself. `settings` override ModelSettings. See pack_spec for what is raised.
    """
    values = dict(settings or {})
    own = values.get("handler") or {}
    if isinstance(own, Mapping):  # else ModelSettings says what is wrong with it
        values["handler"] = {**_describe_inputs(run), **own}
    choice = run.read_choice() if optimised else None
    spec = _make_spec(
        run,
        choice,
        name=name,
        version=version,
        handler=handler or (TENSOR if run.is_table else CLASSIFIER),
        settings=ModelSettings.create(values, source="the model's settings"),
    )
    from marwright.archive.description import describe  # 0.1 s that only a pack needs

    draft = Draft.from_spec(spec, Path())
    if reference := run.reference_path:
        draft = draft.extend(Member(REFERENCE_NAME, reference))
    if choice is not None:
        optimised_to = {"variant": choice.name, "why": choice.why}
        run = replace(run, report={**run.report, "optimised": optimised_to})
        note = (
            f"packing {choice.name}, which marwright optimize chose; --as-trained packs the other"
        )
        draft = replace(draft, notes=(*draft.notes, note))
    model = run.config.get("model")
    draft = describe(
        draft,
        spec,
        report=run.report,
        provenance=make_provenance(run=run),
        task="classification",
        architecture=model if isinstance(model, str) else None,
    )
    return pack_draft(draft, out=out, force=force, preflight=preflight)


def _describe_inputs(run: Run) -> dict[str, Any]:
    """Return the handler's settings that say what the run's model takes."""
    if not run.is_table:
        return {"image_size": list(run.image_size)}
    return {"inputs": [{"name": "inputs", "shape": [len(run.columns)], "datatype": "FP32"}]}


def _make_spec(run: Run, choice: Choice | None, **values: Any) -> Spec:
    """Return the spec that a run amounts to, with what was chosen in place of the trained model."""
    if choice is not None:
        values["backend"] = choice.backend
        values["files"] = [str(path) for path in choice.companions]
    is_ours = values["handler"] == CLASSIFIER
    if is_ours:  # another handler may take and answer something else
        values["input"] = {"content_types": ["image/png", "image/jpeg", "image/webp"]}
        values["output"] = {"content_types": ["application/json"], "schema": PROBABILITIES}
    samples = [
        {
            "file": str(sample.path),
            "content_type": SAMPLE_TYPES[sample.path.suffix],
            "answer": {sample.prediction: sample.probability}
            if is_ours and choice is None  # an optimised one may be a little less or more sure
            else None,
        }
        for sample in run.samples
    ]
    if "dataset" in run.config:
        digest = run.config.get("data_digest")
        values["dataset"] = {"name": run.config["dataset"], "digest": digest}
    return Spec.create(
        model=str(choice.path if choice else run.model_path),
        labels=str(run.path / CLASSES_NAME),
        samples=samples,
        **values,
    )


def pack_spec(
    spec: Spec,
    *,
    folder: Path,
    out: Path,
    path: Path | None = None,
    force: bool = False,
    preflight: Preflight | None = Preflight(),
) -> Packed:
    """Pack what a spec names; its relative paths start in `folder`.

    `path` is the spec's own file, for the provenance. Everything is checked before the first byte
    is written.

    Raises:
        HandlerError: no worker could load the handler.
        ArchiveError: what the checks or the preflight found, a missing file, two files of one name,
            or `out` exists and `force` is false.
        StorageError: the archive cannot be written; nothing half-written is left.
    """
    from marwright.archive.description import describe

    draft = Draft.from_spec(spec, folder)
    report = _read_report(spec, folder)
    # marwright's own handlers are named by its version, wherever it is installed.
    ours = find_ours()
    sources = [
        member.source
        for member in draft.members
        if isinstance(member.source, Path) and member.source.parent != ours
    ]
    provenance = make_provenance(report=report or None, spec_path=path, sources=sources)
    draft = describe(draft, spec, report=report, provenance=provenance)
    return pack_draft(draft, out=out, force=force, preflight=preflight)


def pack_arguments(
    arguments: Arguments,
    *,
    force: bool = False,
    preflight: Preflight | None = Preflight(),
) -> Packed:
    """Pack what torch-model-archiver would, from its own arguments; see pack_spec.

    The archive carries nothing but what that tool puts into it, so no samples, provenance or bill
    of materials either.
    """
    draft = Draft.from_arguments(arguments)
    return pack_draft(draft, out=arguments.target, force=force, preflight=preflight)


def pack_draft(draft: Draft, *, out: Path, force: bool, preflight: Preflight | None) -> Packed:
    """Check a draft, try it, and write it."""
    target = _find_target(draft, out)
    _check_replaceable(target, draft, force=force)
    for note in draft.notes:
        _log.warning(note)
    findings, figures = _check(draft, preflight)
    refuse(findings, target)
    written = write_archive(target, draft.finish(), format=draft.format, top=draft.manifest.name)
    return Packed(
        path=target,
        name=draft.manifest.name,
        version=draft.manifest.version,
        size_bytes=written.size_bytes,
        root_digest=written.root_digest,
        findings=tuple(findings),
        figures=figures,
    )


def _find_target(draft: Draft, out: Path) -> Path:
    suffix = suffix_of(draft.format)
    is_file = out.name.endswith(suffix) if suffix else out.name == draft.manifest.name
    return out if is_file else out / f"{draft.manifest.name}{suffix}"


def _check_replaceable(target: Path, draft: Draft, *, force: bool) -> None:
    with translate_os_errors(f"write {target}"):
        if force or not os.path.lexists(target):
            return
    name, suffix = draft.manifest.name, suffix_of(draft.format)
    other = target.with_name(f"{name}-{draft.manifest.version}{suffix}")
    keep = f", or --out {other} to keep both" if other != target and draft.format == "zip" else ""
    raise ArchiveError(f"{target} exists", remedy=f"pass --force to replace it{keep}")


def _read_report(spec: Spec, folder: Path) -> dict[str, Any]:
    if spec.report is None:
        return {}
    path = folder / spec.report
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ArchiveError(f"cannot read {path}", expected="JSON", found=str(exc)) from exc
    if not isinstance(report, dict):
        raise ArchiveError(f"cannot read {path}", expected="a JSON object")
    return report


def _check(draft: Draft, preflight: Preflight | None) -> tuple[list[Finding], dict[str, Any]]:
    """Check the draft as it will lie before a worker; try it unless that is not wanted."""
    from marwright.archive.checks import scan
    from marwright.archive.checks.source import check_source

    findings = scan(draft.open())
    with stage(draft.finish(), loads=preflight is not None) as folder:
        findings += check_source(folder, draft.manifest, python=draft.python)
        refuse(findings, draft.manifest.name)
        if preflight is None or draft.manifest.runtime == "LSP":
            return findings, {}
        from marwright.archive.checks.preflight import run_preflight

        report = run_preflight(
            folder, draft.manifest, samples=preflight.samples, timeout=preflight.timeout
        )
        return [*findings, *report.findings], report.figures


@contextmanager
def stage(members: Sequence[Member], *, loads: bool = True) -> Iterator[Path]:
    """Lay members out in a temporary folder, as a worker sees them; large files are links.

    Large ones inside another archive are left empty where nothing `loads` them.
    """
    with tempfile.TemporaryDirectory(prefix="marwright-pack-") as name:
        folder = Path(name)
        for member in members:
            target = folder / member.name
            with translate_os_errors(f"read {member.origin}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                source = member.source
                if isinstance(source, Path) and source.stat().st_size > COPIED_BYTES:
                    target.symlink_to(source.resolve())
                elif isinstance(source, Stretch) and source.size_bytes > COPIED_BYTES and not loads:
                    target.touch()
                else:
                    with member.open() as origin, target.open("xb") as copy:
                        shutil.copyfileobj(origin, copy)
        yield folder
