"""model-config.yaml and the requirements file, as TorchServe reads them at registration."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.modules import Module
from marwright.archive.checks.requirements import Requirement, Requirements, installed_version
from marwright.archive.checks.syntax import walk
from marwright.archive.manifest import Manifest
from marwright.archive.settings import ModelSettings, SettingProblem
from marwright.storage import translate_os_errors

__all__ = ["check_configuration", "read_settings", "RULES"]

UNREADABLE = Rule(
    "C401", Severity.ERROR, "the model's settings cannot be read", "write them as a YAML mapping"
)
UNKNOWN = Rule(
    "C402",
    Severity.WARNING,
    "a setting that TorchServe does not know, and the handler does not mention",
    "correct the name, or remove the setting",
)
IMPOSSIBLE = Rule(
    "C403", Severity.ERROR, "a setting that TorchServe cannot use", "correct the setting"
)
TORCH = Rule(
    "C411",
    Severity.WARNING,
    "a requirement on torch itself",
    "leave it out: at registration pip would download torch again beside the server's own",
)
SWITCHED_OFF = Rule(
    "C412",
    Severity.NOTE,
    "TorchServe installs no requirements by default",
    "set install_py_dep_per_model=true in config.properties, or install them for the server",
)
UNREADABLE_REQUIREMENT = Rule(
    "C413",
    Severity.WARNING,
    "a requirement that pip cannot read",
    "write it as pip does: name==version",
)
OTHER_VERSION = Rule(
    "C414",
    Severity.WARNING,
    "this machine has another version than the requirement asks for",
    "install the asked version here, so that what is tried is what will run",
)
RULES = (
    UNREADABLE,
    UNKNOWN,
    IMPOSSIBLE,
    TORCH,
    SWITCHED_OFF,
    UNREADABLE_REQUIREMENT,
    OTHER_VERSION,
)

_IGNORED = "is ignored"
MAX_BYTES = 1 << 20
MAX_ALIASES = 32
"""Of one YAML file: each may repeat what the one before repeats, and so fill the memory."""
MAX_DEPTH = 64
"""Of nested mappings and lists."""
_TORCH = frozenset(
    ["torch", "torchvision", "torchaudio", "torchtext", "torchserve", "triton", "pytorch-triton"]
)


class _Unreadable(Exception):
    """Settings that are no mapping; the message says why."""


def check_configuration(
    folder: Path, manifest: Manifest, *, sources: Iterable[Module] = ()
) -> list[Finding]:
    """Return what is wrong with the settings and requirements of an unpacked archive.

    `sources` are the handler's modules: a key that one of them mentions is the handler's own.
    """
    requirements = Requirements.read(folder, manifest.requirements_file)
    return [
        *_check_settings(folder, manifest.config_file, sources),
        *_check_requirements(requirements),
    ]


def read_settings(folder: Path, member: str | None) -> dict[Any, Any]:
    """Return the settings of an unpacked archive as they stand; empty where they are unreadable."""
    try:
        return _read_settings(folder / member)[0] if member else {}
    except _Unreadable:
        return {}


def _check_settings(
    folder: Path, member: str | None, sources: Iterable[Module]
) -> Iterator[Finding]:
    if not member or not (folder / member).is_file():
        return
    try:
        values, lines = _read_settings(folder / member)
    except _Unreadable as exc:
        yield UNREADABLE.at(str(exc), member=member)
        return
    mentioned = _mentioned_texts(sources)
    values.pop("handler", None)  # the handler's own
    for problem in [*_find_ignored(values), *ModelSettings.find_problems(values, strict=True)]:
        key = problem.key.split(".")[0]
        if problem.is_unknown and key in mentioned:
            continue
        rule = UNKNOWN if problem.is_unknown else IMPOSSIBLE
        yield rule.at(
            str(problem),
            member=member,
            line=lines.get(key),
            severity=Severity.WARNING if problem.message.startswith(_IGNORED) else None,
        )


def _find_ignored(values: dict[Any, Any]) -> Iterator[SettingProblem]:
    """Yield what TorchServe puts its default in place of; take it out of `values`."""
    workers = values.get("minWorkers")
    if "maxWorkers" not in values and type(workers) is int and workers > 1:
        values.pop("minWorkers")
        yield SettingProblem("minWorkers", f"{_IGNORED} without maxWorkers")
    if values.get("maxBatchDelay") == 0:
        values.pop("maxBatchDelay")
        yield SettingProblem("maxBatchDelay", f"{_IGNORED} where it is 0, for 100 ms")


def _read_settings(path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    """Return a YAML file's mapping, and the lines of its keys."""
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        text = stream.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _Unreadable(f"more than {MAX_BYTES:,} bytes")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_bombs(text, loader)
        values = yaml.load(text, Loader=loader)  # a safe one: plain values only
        root = yaml.compose(text, Loader=loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as exc:
        raise _Unreadable(" ".join(str(exc).split())[:200]) from exc
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise _Unreadable(f"{found} instead of a mapping")
    assert isinstance(root, yaml.MappingNode)  # what gave a dict
    return values, {str(key.value): key.start_mark.line + 1 for key, _ in root.value}


def _refuse_bombs(text: bytes, loader: Any) -> None:
    """Raise for a file that is small, and would take much time or memory to read."""
    aliases = depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > MAX_ALIASES or depth > MAX_DEPTH:
            raise _Unreadable(f"more than {MAX_ALIASES} aliases, or {MAX_DEPTH} levels")


def _mentioned_texts(sources: Iterable[Module]) -> set[str]:
    """Return the texts that stand in a handler's modules."""
    found = set()
    for module in sources:
        for node in walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def _check_requirements(requirements: Requirements) -> Iterator[Finding]:
    if not requirements.items:
        return
    names = ", ".join(item.text for item in requirements.items[:8])
    yield SWITCHED_OFF.at(f"{names} would not be installed", member=requirements.member)
    for item in requirements.items:
        if item.name in _TORCH or item.name.startswith("nvidia-"):
            yield TORCH.at(item.text, member=requirements.member, line=item.line)
        elif item.name:
            yield from _check_version(requirements.member, item)


def _check_version(member: str, item: Requirement) -> Iterator[Finding]:
    from packaging.requirements import InvalidRequirement
    from packaging.requirements import Requirement as Parsed

    try:
        # pip's own options may follow a requirement; its hashes do.
        parsed = Parsed(item.text.split(" --")[0])
    except InvalidRequirement as exc:
        reason = str(exc).splitlines()[0]
        yield UNREADABLE_REQUIREMENT.at(f"{item.text}: {reason}", member=member, line=item.line)
        return
    version = installed_version(item.name)
    if version is None or (parsed.marker is not None and not parsed.marker.evaluate()):
        return
    if not parsed.specifier.contains(version, prereleases=True):
        found = f"{item.name} {version}, where {item.text} is asked for"
        yield OTHER_VERSION.at(found, member=member, line=item.line)
