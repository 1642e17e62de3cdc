"""What each key of a deploy.yaml does, which value it has, where from, and what becomes of it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from marwright.archive.document import Document
from marwright.archive.reader import Archive
from marwright.archive.summary import read_settings
from marwright.errors import ArchiveError, UsageError
from marwright.server.deployment import SETTINGS, Deployment, ModelEntry
from marwright.server.keys import FIXED_KEYS, KEYS
from marwright.server.memory import compute_direct_memory, compute_heap
from marwright.server.rendering import render_deployment, render_java_options
from marwright.server.wanted import find_setting

__all__ = ["explain", "Explanation", "list_explanations"]

_JAVA = {
    "jvm.heap": "-Xmx",
    "jvm.direct_memory": "-XX:MaxDirectMemorySize=",
    "access.gateway_key": "-Dmarwright.gateway.key.file=",
    "access.paths_denied": "-Dmarwright.deny=",
    "limits.request_seconds": "-Dmarwright.request.seconds=",
    "limits.connections": "-Dmarwright.max.connections=",
    "limits.retry_after": "-Dmarwright.retry.after=",
    "logging.requests": "-Dmarwright.log.requests=",
    "logging.level": "-Dmarwright.log.level=",
    "logging.file_bytes": "-Dmarwright.log.size=",
    "logging.files": "-Dmarwright.log.rotated=",
}
"""Keys, and how the option of Java begins that they become."""
_ENTRY = re.compile(r"^models(\[\])?\.")


@dataclass(frozen=True)
class Explanation:
    """One key."""

    key: str
    does: str
    takes: str
    """Type and range in words."""
    default: str
    value: str
    origin: str
    """deploy.yaml:LINE, the archive's model-config.yaml, default, or computed."""
    becomes: tuple[str, ...] = ()
    """Lines of config.properties, options of Java, settings of a model."""


def explain(key: str, deployment: Deployment, document: Document | None = None) -> Explanation:
    """Explain a key of deploy.yaml, by dots, or one of TorchServe's.

    Models are named by their place or archive: models.0.workers, models.cnn.mar.workers; what is
    said of all of them: models[].workers, or models.workers.

    Raises:
        UsageError: there is no such key; it names the nearest.
    """
    known = {item.key: item for item in list_explanations(deployment, document)}
    if found := known.get(_place_model(key, deployment)) or known.get(key):
        return found
    entries = {item.key: item for item in _list_entries(known)}
    if found := entries.get(_ENTRY.sub("models[].", key)):
        return found
    if key in KEYS:
        return _explain_torchserve(key, deployment, document)
    general = [name for name in known if not re.match(r"models\.\d", name)]
    near = _find_nearest(key, [*general, *entries, *KEYS])
    raise UsageError(
        f"there is no key {key}",
        remedy=f"did you mean {' or '.join(near)}?"
        if near
        else "marwright config show lists all of them",
    )


def _find_nearest(key: str, names: list[str]) -> list[str]:
    """Return the keys that may have been meant, three at most."""
    last = {name.rpartition(".")[2]: name for name in names}
    own = key.rpartition(".")[2]
    return (
        [name for name in names if name.endswith(f".{key}")]
        or difflib.get_close_matches(key, names, n=3)
        or [last[part] for part in difflib.get_close_matches(own, last, n=3)]
    )[:3]


def list_explanations(
    deployment: Deployment, document: Document | None = None
) -> list[Explanation]:
    """Explain every key of deploy.yaml, those of each model's entry among them."""
    schema = Deployment.model_json_schema()
    rendering = _Rendering(deployment)
    found = []
    for key, does, takes, stated in _list_keys(schema, schema, ""):
        parts = key.split(".")
        default, value = _read(Deployment(), parts), _read(deployment, parts)
        if default is None:  # its group is off by default
            default = stated
        origin = _find_origin(parts, document)
        if key in rendering.computed and value == "auto":
            value, origin = f"auto, {rendering.computed[key]:,} bytes", "computed"
        becomes = tuple(rendering.list_lines(key))
        found.append(Explanation(key, does, takes, _word(default), _word(value), origin, becomes))
    for number, entry in enumerate(deployment.models or ()):
        found += _list_entry(number, entry, deployment, document, schema)
    return found


class _Rendering:
    """What a deployment becomes, key by key."""

    def __init__(self, deployment: Deployment) -> None:
        queues = deployment.limits.queue * max(1, len(deployment.models or ()))
        self.properties = render_deployment(deployment)
        self.options = render_java_options(deployment, queues=queues, key_file=None)
        self.computed = {
            "jvm.heap": compute_heap(deployment, queues),
            "jvm.direct_memory": compute_direct_memory(deployment),
        }

    def list_lines(self, key: str) -> Iterator[str]:
        """Yield the lines of config.properties and the options of Java that a key becomes."""
        group, _, name = key.partition(".")
        if group == "ports" and name:
            yield from self._list_properties([f"{name}_address", f"{name}_port"])
        elif group == "properties" and name:
            yield from self._list_properties([name])
        else:
            yield from self._list_properties([of for of, word in FIXED_KEYS.items() if word == key])
        if start := _JAVA.get(key):
            yield from (option for option in self.options if option.startswith(start))

    def _list_properties(self, names: list[str]) -> Iterator[str]:
        yield from (f"{name}={self.properties[name]}" for name in names if name in self.properties)


def _list_keys(
    schema: Mapping[str, Any], node: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (key, what it does, what it takes, default), groups of keys by their members."""
    for name, field in node.get("properties", {}).items():
        key = f"{prefix}{name}"
        inner = _find_group(schema, field)
        if inner is not None and name != "handler":
            if "anyOf" in field:  # a word may stand for the whole group
                yield key, field.get("description", ""), _describe(schema, field), None
            yield from _list_keys(schema, inner, f"{key}.")
        else:
            does = field.get("description", "").replace("\n", " ")
            yield key, does, _describe(schema, field), field.get("default")


def _find_group(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of the group of keys that a field holds, if it holds one."""
    for form in (field, *field.get("allOf", ()), *field.get("anyOf", ())):
        if reference := form.get("$ref"):
            group: Mapping[str, Any] = schema["$defs"][reference.rpartition("/")[2]]
            return group
    return None


def _describe(schema: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    """Return in words what a field takes."""
    if forms := field.get("anyOf"):
        kinds = [form.get("type") for form in forms]
        if "integer" in kinds and "string" in kinds:  # parse_size reads both
            forms = [form for form in forms if form.get("type") not in ("integer", "string")]
            return " or ".join(
                ["bytes, or a size such as 2 MiB", *(_describe(schema, form) for form in forms)]
            )
        return " or ".join(dict.fromkeys(_describe(schema, form) for form in forms))
    if "$ref" in field or "allOf" in field:
        return "a mapping"
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"a list of {_describe(schema, field.get('items', {})).removeprefix('a ')}s"
    names = {"integer": "whole number", "boolean": "true or false", "null": "nothing"}
    names |= {"string": "text", "object": "a mapping", "number": "number"}
    name = "path" if field.get("format") == "path" else names.get(field.get("type", ""), "anything")
    low, high = field.get("minimum"), field.get("maximum")
    if low is None:
        return name if high is None else f"{name}, {high:,} at most"
    return f"{name}, {low:,} to {high:,}" if high is not None else f"{name} from {low:,}"


def _read(value: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(value, BaseModel):
            value = getattr(value, part, None)
        else:
            return None  # a word stands for the whole group
    return value


def _word(value: Any) -> str:
    """Return a value as YAML's reader would write it; "" for nothing."""
    if value is None or isinstance(value, BaseModel):
        return ""
    if isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
        return ", ".join(getattr(item, "archive", str(item)) for item in value)
    if isinstance(value, (bool, list, dict)):
        return json.dumps(value)
    return str(value)


def _find_origin(parts: list[str], document: Document | None) -> str:
    values: Any = document.values if document else {}
    for part in parts:
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            # A model's entry may be a text alone: its archive.
            if not (isinstance(values, str) and part == "archive"):
                return "default"
    keys = [int(part) if part.isdigit() else part for part in parts]
    assert document is not None  # else there were no values
    return f"{document.path.name}:{document.line(keys)}"


def _list_entry(
    number: int,
    entry: ModelEntry,
    deployment: Deployment,
    document: Document | None,
    schema: Mapping[str, Any],
) -> Iterator[Explanation]:
    """Explain the keys of one model's entry."""
    own: Mapping[str, Any] = {}
    try:
        with Archive.open(deployment.store / entry.archive) as archive:
            own = read_settings(archive)
    except (ArchiveError, OSError):
        pass  # missing: `config check` says so
    for name, does, takes, _ in _list_keys(schema, schema["$defs"]["ModelEntry"], ""):
        key = f"models.{number}.{name}"
        value: Any = getattr(entry, name)
        origin = _find_origin(key.split("."), document)
        setting = SETTINGS.get(name, "")
        if value is None and (said := find_setting(own, setting)) is not None:
            value, origin = said, f"model-config.yaml of {entry.archive}"
        becomes = (f"{setting}: {_word(value)}",) if setting and value is not None else ()
        field = ModelEntry.model_fields[name]
        default = "" if field.is_required() else _word(field.default)
        shown = f"{does} Of {entry.archive}."
        yield Explanation(
            key,
            shown,
            takes,
            default,
            _word(value),
            origin,
            becomes,
        )


def _list_entries(known: Mapping[str, Explanation]) -> Iterator[Explanation]:
    """Explain the keys of an entry as such, `models[].workers`, with what all entries say."""
    schema = Deployment.model_json_schema()
    for name, does, takes, _ in _list_keys(schema, schema["$defs"]["ModelEntry"], ""):
        said = {
            key.removesuffix(f".{name}"): item
            for key, item in known.items()
            if re.fullmatch(rf"models\.\d+\.{name}", key)
        }
        field = ModelEntry.model_fields[name]
        yield Explanation(
            f"models[].{name}",
            does,
            takes,
            "" if field.is_required() else _word(field.default),
            ", ".join(f"{key}: {item.value}" for key, item in said.items() if item.value),
            ", ".join(dict.fromkeys(item.origin for item in said.values())) or "default",
            (SETTINGS[name],) if name in SETTINGS else (),
        )


def _place_model(key: str, deployment: Deployment) -> str:
    """Return models.cnn.mar.workers as models.0.workers."""
    for number, entry in enumerate(deployment.models or ()):
        prefix = f"models.{entry.archive}."
        if key.startswith(prefix):
            return f"models.{number}.{key.removeprefix(prefix)}"
    return key


def _explain_torchserve(key: str, deployment: Deployment, document: Document | None) -> Explanation:
    """Explain a key of config.properties."""
    known = KEYS[key]
    properties = render_deployment(deployment)
    if key in deployment.properties:
        origin = _find_origin(["properties", key], document)
    elif key in FIXED_KEYS:
        word = FIXED_KEYS[key]
        origin = word if " " in word else f"{word} of deploy.yaml"
    else:
        origin = "marwright" if key in properties else "default"
    value = properties.get(key, "" if known.fixed else known.default)
    becomes = (f"{key}={value}",) if key in properties else ()
    return Explanation(key, known.does, known.kind, known.default, value, origin, becomes)
