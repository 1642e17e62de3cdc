"""Python source as a tree, and what of it runs at import; nothing is run here."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from marwright.storage import translate_os_errors

__all__ = ["bound_names", "module_level", "parse_source", "read_source", "walk"]

MAX_SOURCE_BYTES = 2 << 20
"""Longer ones are data; parsing takes a hundred times their size in memory."""

_BLOCKS: tuple[type[ast.AST], ...] = (ast.If, ast.With, ast.Try)
if sys.version_info >= (3, 11):
    _BLOCKS = (*_BLOCKS, ast.TryStar)


def read_source(path: Path) -> bytes:
    """Return a module's source; nothing of an extension module, and little more than is parsed."""
    if path.suffix != ".py":
        return b""  # an extension module
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        return stream.read(MAX_SOURCE_BYTES + 1)


def parse_source(
    source: bytes, python: tuple[int, int] | None
) -> tuple[ast.Module, str, int | None]:
    """Return the tree, or an empty one with the problem and its line."""
    empty = ast.Module(body=[], type_ignores=[])
    if len(source) > MAX_SOURCE_BYTES:
        return empty, f"more than {MAX_SOURCE_BYTES:,} bytes of source", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its author's, not the packer's: "invalid escape"
            return ast.parse(source, feature_version=python), "", None
    except SyntaxError as exc:
        return empty, str(exc.msg), exc.lineno
    except ValueError as exc:  # NUL bytes, before Python 3.11.4
        return empty, str(exc), None
    except (RecursionError, MemoryError):
        return empty, "nested too deeply", None


def module_level(
    tree: ast.Module, *, within: tuple[type[ast.AST], ...] = _BLOCKS
) -> Iterator[ast.stmt]:
    """Yield the statements that run at import: also those inside if, try and with."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        statement = pending.pop(0)
        yield statement
        if isinstance(statement, ast.If) and _is_false_in_a_worker(statement.test):
            pending = statement.orelse + pending
        elif isinstance(statement, within):
            pending = [*_child_statements(statement), *pending]


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that a worker may run: not what stands below `if TYPE_CHECKING`."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and _is_false_in_a_worker(node.test):
            children = list(node.orelse)
        pending += reversed(children)


def bound_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement defines; `*` for an import of everything."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return {statement.target.id} if isinstance(statement.target, ast.Name) else set()
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in statement.names}
    return set()


def _child_statements(statement: ast.stmt) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler):
            yield from child.body


def _is_false_in_a_worker(test: ast.expr) -> bool:
    """Whether it is `TYPE_CHECKING`, `typing.TYPE_CHECKING` or `__name__ == "__main__"`."""
    if isinstance(test, ast.Name):
        return test.id == "TYPE_CHECKING"
    if isinstance(test, ast.Attribute):
        return test.attr == "TYPE_CHECKING"
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
        sides = [test.left, *test.comparators]
        names = {side.id for side in sides if isinstance(side, ast.Name)}
        values = {side.value for side in sides if isinstance(side, ast.Constant)}
        return names == {"__name__"} and values == {"__main__"}
    return False
