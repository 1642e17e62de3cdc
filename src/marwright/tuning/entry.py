"""The entry of one archive in a deploy.yaml, changed as text: the rest stays."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marwright.errors import UsageError
from marwright.server.deployment import Deployment
from marwright.storage import translate_os_errors, write_file

__all__ = ["check_entry", "write_entry"]

REWRITTEN = "written anew: its form allowed no smaller change, and comments are lost"


def check_entry(path: Path, archive: Path) -> Deployment | None:
    """Return the deployment at `path`, or None where there is none yet.

    Raises:
        ConfigurationError: it cannot be used as it is.
        UsageError: its store is not the archive's folder.
    """
    if not path.exists():
        return None
    deployment = Deployment.read(path)
    if deployment.store.resolve() != archive.resolve().parent:
        raise UsageError(
            f"{archive} is not in the store of {path}",
            expected=f"an archive in {deployment.store}",
            remedy="name another file: --write FILE, or pass --no-write",
        )
    return deployment


def write_entry(path: Path, archive: Path, values: Mapping[str, int]) -> str:
    """Set keys of an archive's entry, and return what else there is to say of it, or "".

    The file is made where there is none. Of one that is there only these keys change, comments
    included; where its form allows no such change it is written anew, and the result says so.

    Raises:
        ConfigurationError: it could not be used; the file is as it was before.
    """
    deployment = check_entry(path, archive)
    if deployment is None:
        store = os.path.relpath(archive.resolve().parent, path.resolve().parent)
        entry = {"archive": archive.name, **values}
        text = yaml.safe_dump({"store": store, "models": [entry]}, sort_keys=False)
        others = len(list(archive.parent.glob("*.mar"))) - 1
        note = f"other archives of {store} are not served by it" if others else ""
        _replace(path, text, note)
        return note
    with translate_os_errors(f"read {path}"):
        text = path.read_text(encoding="utf-8")
    wanted = _change_values(yaml.safe_load(text) or {}, deployment, archive.name, values)
    changed = _change_text(text, deployment, archive.name, values)
    note = ""
    if not _means(changed, wanted):
        changed, note = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), REWRITTEN
    _replace(path, changed, note)
    return note


def _replace(path: Path, text: str, note: str) -> None:
    """Write the file once it is known that it can be used; paths in it start in its folder."""
    with translate_os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f".{path.name}.", dir=path.parent
        ) as stream:
            stream.write(text)
            stream.flush()
            Deployment.read(Path(stream.name))
    with write_file(path) as target:
        target.write(text.encode())


def _means(text: str, wanted: Any) -> bool:
    try:
        return bool(yaml.safe_load(text) == wanted)
    except yaml.YAMLError:
        return False


def _change_values(
    document: dict[str, Any], deployment: Deployment, archive: str, values: Mapping[str, int]
) -> dict[str, Any]:
    """Return the whole document as it is to be."""
    document = copy.deepcopy(document)
    if document.get("models") is None:
        document["models"] = [entry.archive for entry in deployment.list_entries()]
    for number, entry in enumerate(document["models"]):
        if entry == archive:
            document["models"][number] = {"archive": archive, **values}
            return document
        if isinstance(entry, dict) and entry.get("archive") == archive:
            entry.update(values)
            if isinstance(handler := entry.get("handler"), dict) and "threads" in handler:
                handler["threads"] = values["threads"]  # else it would win
            return document
    document["models"].append({"archive": archive, **values})
    return document


def _change_text(text: str, deployment: Deployment, archive: str, values: Mapping[str, int]) -> str:
    """Return the text with the entry's keys set; see _change_values for what it must then mean."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = _find(root, "models")
    if not isinstance(models, yaml.SequenceNode):
        if models is not None:
            return text  # `models:` without a value
        names = [entry.archive for entry in deployment.list_entries()]
        lines = [
            _render_block(name, values, "  ") if name == archive else f"{name}\n" for name in names
        ]
        end = "" if text.endswith("\n") or not text else "\n"
        return f"{text}{end}models:\n" + "".join(f"- {line}" for line in lines)
    for item in models.value:
        if isinstance(item, yaml.ScalarNode) and item.value == archive:
            return _expand(text, item, archive, values, is_flow=bool(models.flow_style))
        name = _find(item, "archive")
        if isinstance(name, yaml.ScalarNode) and name.value == archive:
            return _update(text, item, name, values)
    return _append(text, models, archive, values)


def _expand(
    text: str, item: yaml.ScalarNode, archive: str, values: Mapping[str, int], *, is_flow: bool
) -> str:
    """Turn an entry that is only a name into a mapping; a comment behind the name stays there."""
    start, end = item.start_mark.index, item.end_mark.index
    if is_flow:
        return text[:start] + _render_flow(archive, values) + text[end:]
    indent = " " * item.start_mark.column
    text = f"{text[:start]}archive: {text[start:end]}{text[end:]}"
    return _insert_lines(text, end + len("archive: "), indent, values)


def _update(
    text: str, item: yaml.MappingNode, name: yaml.ScalarNode, values: Mapping[str, int]
) -> str:
    """Change the keys that an entry has, and add the others behind its archive."""
    missing = {key: value for key, value in values.items() if _find(item, key) is None}
    end = name.end_mark.index
    changes = [(_find(item, key), value) for key, value in values.items()]
    changes.append((_find(_find(item, "handler"), "threads"), values["threads"]))
    spans = [
        (node.start_mark.index, node.end_mark.index, str(value))
        for node, value in changes
        if node is not None
    ]
    if missing and item.flow_style:
        spans.append((end, end, "".join(f", {key}: {value}" for key, value in missing.items())))
    elif missing:
        line = _find_line_end(text, end)
        indent = " " * item.value[0][0].start_mark.column
        spans.append((line, line, "".join(f"\n{indent}{k}: {v}" for k, v in missing.items())))
    for start, stop, new in sorted(spans, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _append(text: str, models: yaml.SequenceNode, archive: str, values: Mapping[str, int]) -> str:
    """Add an entry as the last one."""
    if models.flow_style:
        end = models.end_mark.index - 1  # before the bracket
        comma = ", " if models.value else ""
        return text[:end] + comma + _render_flow(archive, values) + text[end:]
    last: Any = models
    while isinstance(last, yaml.CollectionNode) and last.value and not _is_flow(last):
        last = last.value[-1]
        last = last[1] if isinstance(last, tuple) else last
    end = _find_line_end(text, last.end_mark.index)
    column = " " * models.start_mark.column
    entry = f"{column}- {_render_block(archive, values, f'{column}  ')}".rstrip("\n")
    return f"{text[:end]}\n{entry}{text[end:]}"


def _is_flow(node: yaml.CollectionNode) -> bool:
    return bool(node.flow_style)


def _find(node: Any, key: str) -> Any:
    """Return the node of a mapping's value, or None."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)


def _find_line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    return len(text) if end < 0 else end


def _insert_lines(text: str, index: int, indent: str, values: Mapping[str, int]) -> str:
    """Add keys in lines of their own below the one that holds `index`."""
    end = _find_line_end(text, index)
    lines = "".join(f"\n{indent}{key}: {value}" for key, value in values.items())
    return text[:end] + lines + text[end:]


def _render_block(archive: str, values: Mapping[str, int], indent: str) -> str:
    """Return a mapping in lines; the first goes behind a dash."""
    dumped = yaml.safe_dump({"archive": archive, **values}, sort_keys=False)
    return f"\n{indent}".join(dumped.splitlines()) + "\n"


def _render_flow(archive: str, values: Mapping[str, int]) -> str:
    dumped: str = yaml.safe_dump(
        {"archive": archive, **values}, sort_keys=False, default_flow_style=True, width=10_000
    )
    return dumped.strip()
