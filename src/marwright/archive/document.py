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
MAX_BYTES = 1 << 20
MAX_ALIASES = 100
"""A document of a few lines may name itself a billion times (CVE-2003-1564)."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a document."""

    line: int | None
    """Counted from 1; None where the document as a whole is meant."""
    where: str
    """Keys down to the value: `settings.batchSize`."""
    found: str

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
        pending = [(self._root, "")]
        while pending:
            node, where = pending.pop()
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
            found: dict[tuple[str | int, ...], list[str]] = {}
            words = {
                _explain(model, error) for error in exc.errors() if error["type"] == "literal_error"
            }
            for error in exc.errors():
                keys = self._existing(error["loc"], whole=error["type"] == "missing")
                found.setdefault(keys, []).append(_explain(model, error))
            for keys in _list_outer(found):  # it is a mapping, so that the word was not meant
                found[keys] = [text for text in found[keys] if text not in words]
            # Several for one value: it fits none of the forms that it may have.
            return None, problems + [
                self.problem(keys, ", or ".join(messages))
                for keys, messages in found.items()
                if messages
            ]
        return checked, problems

    def _existing(self, keys: Sequence[str | int], *, whole: bool) -> tuple[str | int, ...]:
        """Return the keys that the document has; pydantic names also the form that it tried."""
        if whole:
            return tuple(keys)
        node, existing = self._root, []
        for key in keys:
            if (child := _child(node, key)) is not None:
                node = child[1]
                existing.append(key)
        return tuple(existing)

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
        raise self.error(
            f"{self.path} cannot be used",
            found=f"{len(lines)} problems"
            if len(lines) > 1
            else f"{f'line {first.line}: ' if first.line else ''}{first}",
            remedy=remedy,
            detail="\n".join(lines) if len(lines) > 1 else "",
        )


def validate(model: type[Model], values: Mapping[str, Any], *, source: str) -> Model:
    """Return values as a model; `source` names in errors where they come from.

    Raises:
        ArchiveError: unknown keys, wrong types, impossible values; all of them at once.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as exc:
        problems = [
            f"{'.'.join(map(str, error['loc']))}: {_explain(model, error)}"
            for error in exc.errors()
        ]
        raise ArchiveError(f"{source} cannot be used", found="; ".join(problems)) from exc


def _load(path: Path, text: str, error: type[MarwrightError]) -> tuple[yaml.Node | None, Any]:
    """Return the document's nodes, which know their lines, and its values."""
    try:
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        if aliases > MAX_ALIASES:
            raise error(f"{path} has too many aliases", expected=f"at most {MAX_ALIASES}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) if node is not None else {}
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        reason = getattr(exc, "problem", None) or str(exc) or type(exc).__name__
        where = f"line {mark.line + 1}: " if mark else ""
        raise error(
            f"cannot read {path}", expected="YAML", found=f"{where}{' '.join(reason.split())}"
        ) from exc
    return node, values


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


def _list_outer(found: Collection[tuple[str | int, ...]]) -> list[tuple[str | int, ...]]:
    """Return the keys below which others are."""
    return [
        keys
        for keys in found
        if any(len(other) > len(keys) and other[: len(keys)] == keys for other in found)
    ]


def _explain(model: type[BaseModel], error: Any) -> str:
    """Return pydantic's message, with the key that an unknown one is nearest to."""
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] != "extra_forbidden":
        return message
    known = _known_keys(model, error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return "no such key" + (
        f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
    )


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
