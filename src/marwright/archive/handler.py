"""The handler's source: what a worker would stumble over, found without running it.

What decides a handler's form is TorchServe's ts/model_loader.py and list_classes_from_module in
ts/utils/util.py: imported by base name as a top-level module; a module-level `handle`, or exactly
one class with `handle` and `initialize`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from marwright.errors import HandlerError

__all__ = ["HandlerSource"]


@dataclass(frozen=True)
class HandlerSource:
    """A handler file and the local modules it imports, each of which travels with it."""

    path: Path
    siblings: tuple[Path, ...] = field(default=())
    """Modules and package folders beside the handler that it reaches by imports."""

    @classmethod
    def find(cls, handler: str) -> HandlerSource:
        """Read a handler given as a path, or by the name of one that comes with marwright.

        Raises:
            HandlerError: no such file, a syntax error, no or two classes, a missing import; all of
                a file's problems are named at once.
        """
        path = Path(handler) if handler.endswith(".py") else _find_ours(handler)
        if not path.is_file():
            raise HandlerError(
                f"there is no handler file {handler}",
                remedy="pass a path ending in .py, or the name of one of ours: "
                + ", ".join(list_ours()),
            )
        tree = _parse(path)
        problems = list(_check_entry_point(tree))
        siblings, missing = _follow_imports(path, tree)
        if problems := problems + missing:
            raise HandlerError(
                f"a worker could not load {path.name}",
                found="; ".join(problems),
                remedy="mend the handler and pack again",
            )
        return cls(path, siblings)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name inside the archive, file) of the handler and all that travels with it."""
        folder = self.path.parent
        for path in (self.path, *self.siblings):
            members = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            for member in members:
                yield member.relative_to(folder).as_posix(), member


def list_ours() -> list[str]:
    """Return the names of the handlers that come with marwright."""
    return sorted(
        entry.name.removesuffix(".py")
        for entry in resources.files("marwright.handlers").iterdir()
        if entry.name.endswith(".py") and "def handle(" in entry.read_text(encoding="utf-8")
    )


def _find_ours(name: str) -> Path:
    return Path(str(resources.files("marwright.handlers") / f"{name}.py"))


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as exc:
        raise HandlerError(
            f"a worker could not load {path.name}",
            found=f"a syntax error at {path.name}:{exc.lineno}: {exc.msg}",
            remedy="mend the handler and pack again",
        ) from exc
    except ValueError as exc:  # NUL bytes, undecodable source
        raise HandlerError(f"{path.name} is no Python source", found=str(exc)) from exc


def _module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run at import: also those inside if, try and with."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        statement = pending.pop(0)
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            pending = [
                child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)
            ] + pending


def _check_entry_point(tree: ast.Module) -> Iterator[str]:
    statements = list(_module_level(tree))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if any(isinstance(item, functions) and item.name == "handle" for item in statements):
        return
    classes = [item for item in statements if isinstance(item, ast.ClassDef)]
    if len(classes) != 1:
        found = ", ".join(f"{item.name} (line {item.lineno})" for item in classes) or "none"
        yield f"{found} where TorchServe expects exactly one class (move others to a sibling file)"
        return
    if classes[0].bases:
        return  # what it inherits is known only by running it
    methods = {item.name for item in classes[0].body if isinstance(item, functions)}
    for method in ("initialize", "handle"):
        if method not in methods:
            yield f"class {classes[0].name} (line {classes[0].lineno}) without a method {method}"


def _follow_imports(path: Path, tree: ast.Module) -> tuple[tuple[Path, ...], list[str]]:
    """Return the local modules a handler reaches, and the imports that nothing would satisfy."""
    siblings: dict[Path, None] = {}
    missing = []
    pending = [(path, tree)]
    while pending:
        source, module = pending.pop()
        for name, line in _imported_names(module):
            sibling = _find_sibling(path.parent, name)
            if sibling is None:
                if importlib.util.find_spec(name) is None:
                    missing.append(
                        f"import of {name!r} at {source.name}:{line}, not installed here"
                    )
            elif sibling != path and sibling not in siblings:
                siblings[sibling] = None
                files = sorted(sibling.rglob("*.py")) if sibling.is_dir() else [sibling]
                pending += [(file, _parse(file)) for file in files]
    return tuple(sorted(siblings)), missing


def _find_sibling(folder: Path, name: str) -> Path | None:
    if (module := folder / f"{name}.py").is_file():
        return module
    if (package := folder / name).is_dir() and any(package.glob("*.py")):
        return package
    return None


def _imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (top-level module, line) of imports at import time; those inside `try` are optional."""
    optional = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for child in ast.walk(node)
    }
    for statement in _module_level(tree):
        if id(statement) in optional:
            continue
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.name.split(".")[0], statement.lineno
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            yield statement.module.split(".")[0], statement.lineno
