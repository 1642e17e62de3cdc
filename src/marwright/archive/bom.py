"""The bill of materials of an archive: model, data set and requirements, as CycloneDX 1.6 JSON.

cyclonedx-python-lib 11 writes everything but the model card and the kind of data, for which it has
no classes; these two are put into the document it renders, and tests hold the whole against the
schema. 1.6 and not 1.7: it says all of this, and older readers refuse 1.7.

Importing this takes 0.2 s, so import it where a bill is written.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from marwright import __version__
from marwright.archive.member import BOM_NAME
from marwright.errors import ArchiveError

__all__ = ["BOM_NAME", "DataSet", "make_bom", "parse_requirements"]

MODEL_REF = "model"
DATA_REF = "data-set"
# The serial number is derived from the content: one content, one number.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6.schema.json")
_SHA256 = re.compile("[0-9a-f]{64}")
# Options that bring packages of which the line itself says nothing.
_HIDES_PACKAGES = re.compile(r"-[re]|--(requirement|editable)\b")


@dataclass(frozen=True)
class DataSet:
    """What a model was trained with."""

    name: str
    digest: str | None = None
    """Of its content; a SHA-256 in hex becomes the component's hash, anything else a property."""
    licence: str | None = None


def make_bom(
    *,
    name: str,
    version: str,
    weights_sha256: str | None = None,
    licence: str | None = None,
    description: str | None = None,
    task: str | None = None,
    architecture: str | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    data_set: DataSet | None = None,
    report: Mapping[str, Any] | None = None,
    requirements: Iterable[Requirement] = (),
    created: int | None = None,
) -> bytes:
    """Return the file's bytes; the same arguments give the same ones.

    `licence` is an SPDX id, an SPDX expression, or a name. `inputs` and `outputs` name formats,
    such as image/png. `report` is a run's report.json. `created` is in epoch seconds,
    SOURCE_DATE_EPOCH where that is set; without it the document states no time.
    """
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=MODEL_REF,
        name=name,
        version=version,
        description=description,
        licenses=_make_licences(licence),
        hashes=_make_hashes(weights_sha256),
        properties=_list_properties(report or {}),
    )
    parts = [*_list_libraries(requirements), *([_make_data(data_set)] if data_set else [])]
    maker = Component(type=ComponentType.APPLICATION, name="marwright", version=__version__)
    bom = Bom(
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[maker])),
        components=parts,
    )
    bom.register_dependency(model, parts)
    card = _make_card(
        parameters={
            "task": task,
            "modelArchitecture": architecture,
            "datasets": [{"ref": DATA_REF}] if data_set else [],
            "inputs": [{"format": form} for form in inputs],
            "outputs": [{"format": form} for form in outputs],
        },
        metrics=list(_list_metrics(report or {})),
    )
    return _render(bom, card=card, created=created)


def parse_requirements(lines: Iterable[str], *, source: str) -> list[Requirement]:
    """Read the lines of a requirements file; `source` names it in errors.

    pip's options, such as an index or hashes, say nothing of what is required and are passed over.

    Raises:
        ArchiveError: lines that name no package, or another file to read; all of them at once.
    """
    found, problems = [], []
    for number, line in _join_lines(lines):
        if line.startswith("-") and not _HIDES_PACKAGES.match(line):
            continue
        try:
            found.append(Requirement(re.split(r"\s-", line)[0]))
        except InvalidRequirement:
            problems.append(f"line {number}: {line!r}")
    if problems:
        raise ArchiveError(
            f"{source} has lines that name no package",
            expected="a package a line, such as numpy==2.4.6, or NAME @ URL",
            found="; ".join(problems),
            remedy="name the packages themselves",
        )
    return found


def _join_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield (number, text) without comments and empty lines; a backslash continues a line."""
    begun, text = 1, ""
    for number, line in enumerate([*lines, ""], start=1):
        text += line.rstrip("\r\n")
        if text.endswith("\\"):
            text = text[:-1]
            continue
        if stripped := re.sub(r"(^|\s+)#.*", "", text).strip():
            yield begun, stripped
        begun, text = number + 1, ""


def _list_libraries(requirements: Iterable[Requirement]) -> list[Component]:
    """Return one component a package and version, with every line that asks for it."""
    found: dict[str, Component] = {}
    for requirement in requirements:
        name, version = canonicalize_name(requirement.name), _find_version(requirement)
        # A package from an address is not the index's of that name. The address itself may hold a
        # password or a path, so it stays out.
        purl = None if requirement.url else PackageURL("pypi", name=name, version=version)
        ref = str(purl) if purl else f"address:{name}"
        library = found.setdefault(
            ref,
            Component(
                type=ComponentType.LIBRARY, bom_ref=ref, name=name, version=version, purl=purl
            ),
        )
        library.properties.add(
            Property(name="marwright:requirement", value=_describe_requirement(requirement))
        )
    return list(found.values())


def _find_version(requirement: Requirement) -> str | None:
    """Return the one version that a requirement allows; None where it allows several."""
    for specifier in sorted(requirement.specifier, key=str):
        if specifier.operator in ("==", "===") and not specifier.version.endswith(".*"):
            return specifier.version
    return None


def _describe_requirement(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    wanted = " @ an address" if requirement.url else str(requirement.specifier)
    marker = f" ; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}{extras}{wanted}{marker}"


def _make_data(data_set: DataSet) -> Component:
    digest = data_set.digest or ""
    known = bool(_SHA256.fullmatch(digest))
    return Component(
        type=ComponentType.DATA,
        bom_ref=DATA_REF,
        name=data_set.name,
        licenses=_make_licences(data_set.licence),
        hashes=_make_hashes(digest if known else None),
        properties=[] if known or not digest else [Property(name="marwright:digest", value=digest)],
    )


def _make_licences(licence: str | None) -> list[License]:
    """Return an SPDX id, an SPDX expression, or a name: the first that the text is."""
    text = (licence or "").strip()
    return [LicenseFactory().make_from_string(text)] if text else []


def _make_hashes(sha256: str | None) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []


def _list_properties(report: Mapping[str, Any]) -> Iterator[Property]:
    """Yield what CycloneDX has no field for: how to train this model again."""
    git, versions = (_take_mapping(report, key) for key in ("git", "versions"))
    values = {
        "seed": report.get("seed"),
        "parameters": report.get("parameters"),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        **{f"version:{package}": found for package, found in versions.items()},
    }
    for name, value in values.items():
        if isinstance(value, (str, int)):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            yield Property(name=f"marwright:training:{name}", value=shown)


def _list_metrics(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a report's accuracies by part of the data, and its ratios by class."""
    parts = {"accuracy": "test", "train_accuracy": "train", "validation_accuracy": "validation"}
    ratios = [("accuracy", part, report.get(key)) for key, part in parts.items()]
    for label, values in sorted(_take_mapping(report, "classes").items()):
        if isinstance(values, Mapping):
            ratios += [(kind, label, values.get(kind)) for kind in ("precision", "recall")]
    for kind, part, value in ratios:
        if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
            yield {"type": kind, "slice": part, "value": str(value)}


def _take_mapping(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of a report, empty where that is absent or of another kind."""
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


def _make_card(
    *, parameters: Mapping[str, Any], metrics: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Return a model card that holds what is known."""
    card: dict[str, Any] = {}
    if known := {key: value for key, value in parameters.items() if value}:
        card["modelParameters"] = known
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _render(bom: Bom, *, card: Mapping[str, Any], created: int | None) -> bytes:
    """Return the document's bytes; its serial number and time depend on its content only."""
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["serialNumber"], document["metadata"]["timestamp"]
    if card:
        document["metadata"]["component"]["modelCard"] = card
    for component in document.get("components", []):
        if component["type"] == "data":
            component["data"] = [{"type": "dataset", "name": component["name"]}]
    if created is not None:
        moment = datetime.fromtimestamp(created, tz=timezone.utc)
        document["metadata"]["timestamp"] = moment.isoformat()
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = uuid.uuid5(_NAMESPACE, content).urn
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
