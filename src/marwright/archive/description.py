"""What an archive says of its origin: provenance, and the bill of materials made of its members."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from packaging.requirements import Requirement

from marwright.archive.bom import BOM_NAME, DataSet, make_bom, parse_requirements
from marwright.archive.digests import digest_stream
from marwright.archive.draft import Draft
from marwright.archive.member import Member, Stretch
from marwright.archive.provenance import PROVENANCE_NAME, Provenance
from marwright.archive.spec import Port, Spec
from marwright.archive.writer import read_epoch
from marwright.storage import translate_os_errors

__all__ = ["describe"]


def describe(
    draft: Draft,
    spec: Spec,
    *,
    report: Mapping[str, Any],
    provenance: Provenance,
    task: str | None = None,
    architecture: str | None = None,
) -> Draft:
    """Return the draft with provenance and bill of materials; the weights are read once for it."""
    members = {member.name: member for member in draft.members}
    manifest = draft.manifest
    weights = members.get(manifest.serialized_file or "")
    bill = make_bom(
        name=manifest.name,
        version=manifest.version,
        weights_sha256=_digest(weights) if weights else None,
        licence=spec.licence,
        description=spec.description,
        task=task,
        architecture=architecture,
        inputs=_list_formats(spec.input),
        outputs=_list_formats(spec.output),
        data_set=_describe_data(spec),
        report=report,
        requirements=_list_requirements(members.get(manifest.requirements_file or "")),
        created=read_epoch() if "SOURCE_DATE_EPOCH" in os.environ else None,
    )
    return draft.extend(Member(PROVENANCE_NAME, provenance.to_json()), Member(BOM_NAME, bill))


def _describe_data(spec: Spec) -> DataSet | None:
    if spec.dataset is None:
        return None
    return DataSet(spec.dataset.name, spec.dataset.digest, spec.dataset.licence)


def _list_formats(port: Port | None) -> list[str]:
    return list(port.content_types) if port else []


def _digest(member: Member) -> str:
    if isinstance(member.source, Stretch) and member.source.sha256:
        return member.source.sha256  # stated by the archive that it comes from
    with translate_os_errors(f"read {member.origin}"), member.open() as stream:
        return digest_stream(stream)


def _list_requirements(member: Member | None) -> list[Requirement]:
    if member is None:
        return []
    with translate_os_errors(f"read {member.origin}"), member.open() as stream:
        text = stream.read().decode("utf-8", "replace")
    return parse_requirements(text.splitlines(), source=member.origin)
