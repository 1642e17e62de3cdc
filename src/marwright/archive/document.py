"""YAML documents that a person wrote: every problem at once, each with its line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from marwright.errors import ArchiveError, MarwrightError
from marwright.storage import translate_os_errors

__all__ = ["Document", "Problem", "validate"]

Model = TypeVar("Model", bound=BaseModel)
Keys = tuple[str | int, ...]
MAX_BYTES = 1 << 20
MAX_REPEATED = 100_000
"""Values that aliases may add: a few lines can come to a billion of them (CVE-2003-1564)."""
FOUND_LENGTH = 40
"""Characters of a wrong value that are shown."""

_KINDS = {
    "true or false": ("bool_parsing", "bool_type"),
    "a whole number, such as 4": ("int_from_float", "int_parsing", "int_type"),
    "a number, such as 0.5": ("float_parsing", "float_type"),
    "a text, such as cnn, or '8080' in quotes": ("string_type",),
    "a path, such as folder/file": ("path_type",),
    "a list, such as [a, b]": ("list_type", "tuple_type"),
    "a mapping, such as {{key: value}}": ("dict_type", "model_type"),
    "{expected}": ("literal_error",),
    "at least {ge}": ("greater_than_equal",),
    "at most {le}": ("less_than_equal",),
    "more than {gt}": ("greater_than",),
    "less than {lt}": ("less_than",),
    "a multiple of {multiple_of}": ("multiple_of",),
    "a text of the form {pattern}": ("string_pattern_mismatch",),
}
_EXPECTED = {kind: words for words, kinds in _KINDS.items() for kind in kinds}
"""What a field takes, by the type of pydantic's error."""
_SYNTAX = {
    "found character '\\t' that": "a tab stands here: write blanks, YAML takes no tabs",
    "expected <block end>, but found '<scalar>'": "text follows a value that has ended",
    "expected <block end>": "the line is indented unlike the lines that it belongs to",
    "expected '<document start>'": "the line is indented unlike the lines that it belongs to",
    "mapping values are not allowed here": "a second ':' stands here: indent the line like the ones"
    " that it belongs to, or put a text that holds ': ' in quotes",
}
"""How problems of YAML's reader begin, and what is meant by them."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a document."""

    line: int | None
    """Counted from 1; None where the document as a whole is meant."""
    where: str
    """Keys down to the value: `settings.batchSize`."""
    found: str
    """What is wrong; after a semicolon, what to do about it."""

    def __str__(self) -> str:
        """Return `where: found`, or what there is of it."""
        return f"{self.where}: {self.found}" if self.where else self.found


class Document:
    """A YAML file with the place of each of its values."""

    def __init__(
        self, path: Path, text: str, *, error: type[MarwrightError] = ArchiveError
    ) -> None:
        self.path = path
        self.error = error
        self._root, self.values = _load(path, text, error)

    @classmethod
    def read(cls, path: Path, *, error: type[MarwrightError] = ArchiveError) -> Document:
        """Read a file.

        Raises:
            `error`: it is no YAML, or holds anything but a mapping.
        """
        with translate_os_errors(f"read {path}"):
            content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise error(f"{path} is too long", expected=f"at most {MAX_BYTES:,} bytes")
        try:
            text = content.decode("utf-8-sig")
        except ValueError as exc:
            raise error(f"cannot read {path}", expected="UTF-8 text", found=str(exc)) from exc
        document = cls(path, text, error=error)
        if not isinstance(document.values, dict):
            found = type(document.values).__name__
            raise error(f"cannot read {path}", expected="a mapping", found=found)
        return document

    def line(self, keys: Sequence[str | int]) -> int | None:
        """Return the line of a value, or of the innermost one above it that is there."""
        node: Any = self._root
        line = None
        for key in keys:
            child = _child(node, key)
            if child is None:
                break
            line, node = child
        return line

    def problem(self, keys: Sequence[str | int], found: str) -> Problem:
        """Return a problem at the place of a value."""
        return Problem(self.line(keys), ".".join(map(str, keys)), found)

    def list_doubles(self) -> list[Problem]:
        """Return the keys that stand twice in one mapping, of which YAML would keep the last."""
        problems = []
        pending, visited = [(self._root, "")], set()
        while pending:
            node, where = pending.pop()
            if id(node) in visited:
                continue  # an alias
            visited.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                pending += [(item, f"{where}{n}.") for n, item in enumerate(node.value)]
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            seen: dict[str, int] = {}
            for key, value in pairs:
                name = str(key.value)
                line = key.start_mark.line + 1
                if name in seen:
                    problems.append(
                        Problem(line, where + name, f"stands twice, first in line {seen[name]}")
                    )
                seen[name] = line
                pending.append((value, f"{where}{name}."))
        return problems

    def validate(self, model: type[Model]) -> tuple[Model | None, list[Problem]]:
        """Return the values as a model, or None and what is wrong with them."""
        problems = self.list_doubles()
        try:
            checked = model.model_validate(self.values, context={"folder": self.path.parent})
        except ValidationError as exc:
            found = _explain(model, self.values, exc)
            return None, problems + [self.problem(keys, text) for keys, text in found]
        return checked, problems

    def refuse(self, problems: Sequence[Problem], *, remedy: str) -> None:
        """Raise the document's error with all the problems, by line, where there are any."""
        if not problems:
            return
        ordered = sorted(problems, key=lambda problem: (problem.line or 0, problem.where))
        lines = [
            f"{self.path}{f':{problem.line}' if problem.line else ''}: {problem}"
            for problem in ordered
        ]
        first = ordered[0]
        found, _, own = str(first).partition("; ")
        if len(lines) > 1:
            found, own = f"{len(lines)} problems", ""
        elif first.line:
            found = f"line {first.line}: {found}"
        raise self.error(
            f"{self.path} cannot be used",
            found=found,
            remedy=own or remedy,
            detail="\n".join(lines) if len(lines) > 1 else "",
        )


def validate(
    model: type[Model],
    values: Mapping[str, Any],
    *,
    source: str,
    error: type[MarwrightError] = ArchiveError,
) -> Model:
    """Return values as a model; `source` names in errors where they come from.

    Raises:
        `error`: unknown keys, wrong types, impossible values; all of them at once.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as exc:
        problems = [
            f"{'.'.join(map(str, keys))}: {text}" for keys, text in _explain(model, values, exc)
        ]
        raise error(f"{source} cannot be used", found="; ".join(problems)) from exc


def _load(path: Path, text: str, error: type[MarwrightError]) -> tuple[yaml.Node | None, Any]:
    """Return the document's nodes, which know their lines, and its values."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        sizes: dict[int, int] = {}
        is_small = node is None or _measure(node, sizes) - len(sizes) <= MAX_REPEATED
        values = yaml.safe_load(text) if node is not None and is_small else {}
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        found = f"{where}{_explain_syntax(exc)}"
        raise error(f"cannot read {path}", expected="YAML", found=found) from exc
    if not is_small:
        expected = f"at most {MAX_REPEATED:,} values repeated by them"
        raise error(f"{path} has too many aliases", expected=expected)
    return node, values


def _measure(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many nodes a node comes to once its aliases are written out; each is visited once.

    `sizes` are those of the nodes that were measured before, by id.

    Raises:
        YAMLError: a node holds itself.
    """
    if id(node) not in sizes:
        sizes[id(node)] = 0  # until it is measured
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        sizes[id(node)] = 1 + sum(_measure(child, sizes) for child in children)
    elif not sizes[id(node)]:
        raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
    return sizes[id(node)]


def _explain_syntax(exc: Exception) -> str:
    """Return what is wrong with a text that is no YAML, in one line."""
    if isinstance(exc, RecursionError):
        return "too many levels"
    reason = getattr(exc, "problem", None) or str(exc) or type(exc).__name__
    for start, meaning in _SYNTAX.items():
        if reason.startswith(start):
            return meaning
    return " ".join(reason.split())


def _child(node: Any, key: str | int) -> tuple[int, Any] | None:
    """Return (line, node) of a mapping's or sequence's member."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if str(name.value) == str(key):
                return name.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        value = node.value[key]
        return value.start_mark.line + 1, value
    return None


def _list_outer(found: Collection[Keys]) -> list[Keys]:
    """Return the keys below which others are."""
    return [
        keys
        for keys in found
        if any(len(other) > len(keys) and other[: len(keys)] == keys for other in found)
    ]


def _explain(model: type[BaseModel], values: Any, exc: ValidationError) -> list[tuple[Keys, str]]:
    """Return what is wrong with each value, by its keys."""
    found: dict[Keys, list[Any]] = {}
    for error in exc.errors():
        keys = error["loc"] if error["type"] == "missing" else _find_existing(values, error["loc"])
        found.setdefault(keys, []).append(error)
    for keys in _list_outer(found):  # it has the form that goes further, not another one
        found[keys] = [error for error in found[keys] if error["type"] not in _EXPECTED]
    return [(keys, _word(model, errors)) for keys, errors in found.items() if errors]


def _find_existing(values: Any, keys: Keys) -> Keys:
    """Return the keys that stand in the values; pydantic names also the form that it tried."""
    existing = []
    for key in keys:
        members = dict(enumerate(values)) if isinstance(values, list) else values
        if isinstance(members, Mapping) and key in members:
            values = members[key]
            existing.append(key)
    return tuple(existing)


def _word(model: type[BaseModel], errors: Sequence[Any]) -> str:
    """Return what is wrong with one value; several errors are those of the forms it may have."""
    expected, messages = [], []
    for error in errors:
        if error["type"] in _EXPECTED:
            expected.append(_EXPECTED[error["type"]].format(**error.get("ctx", {})))
        elif error["type"] == "extra_forbidden":
            messages.append(_explain_unknown(model, error["loc"]))
        elif error["type"] == "missing":
            messages.append("is missing")
        else:
            message = str(error["msg"]).removeprefix("Value error, ")
            messages.append(message[:1].lower() + message[1:])
    if messages:
        return ", or ".join([*messages, *expected])
    return f"expected {', or '.join(expected)}, found {_show(errors[0]['input'])}"


def _explain_unknown(model: type[BaseModel], keys: Sequence[str | int]) -> str:
    """Return what is said of an unknown key, with the one that it is nearest to."""
    known = _known_keys(model, keys[:-1])
    near = difflib.get_close_matches(str(keys[-1]), known, n=1)
    return "no such key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")


def _show(value: Any) -> str:
    """Return a wrong value as YAML has it, or what it is where that is long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= FOUND_LENGTH else f"{text[:FOUND_LENGTH]}..."


def _known_keys(model: type[BaseModel], keys: Sequence[str | int]) -> list[str]:
    """Return the keys of the model that stands at a place inside another."""
    current: Any = model
    for key in keys:
        field = next(
            (
                item
                for name, item in getattr(current, "model_fields", {}).items()
                if key in (name, item.alias)
            ),
            None,
        )
        if field is not None:
            current = _innermost_model(field.annotation) or current
    return sorted(item.alias or name for name, item in current.model_fields.items())


def _innermost_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if (found := _innermost_model(part)) is not None:
            return found
    return None
