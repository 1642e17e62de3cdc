"""The handler's source: what a worker would stumble over, found without running it.

What decides a handler's form is TorchServe's ts/model_loader.py and list_classes_from_module in
ts/utils/util.py: imported by base name as a top-level module; a module-level `handle`, or exactly
one class with `handle` and `initialize`.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from marwright.errors import HandlerError
from marwright.storage import translate_os_errors

__all__ = ["HandlerSource"]

_FALSE_IN_A_WORKER = ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


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
        with translate_os_errors(f"read {path}"):
            found = path.is_file()
        if not found:
            raise HandlerError(
                f"there is no handler file {handler}",
                remedy="pass a path ending in .py, or the name of one of ours: "
                + ", ".join(list_ours()),
            )
        tree = _parse(path)
        problems = [*_check_name(path), *_check_entry_point(tree)]
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
    with translate_os_errors(f"read {path}"):
        source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its author's, not the packer's: "invalid escape"
            return ast.parse(source, filename=str(path))
    except SyntaxError as exc:
        where = f"{path.name}:{exc.lineno}" if exc.lineno else path.name  # none: NUL bytes
        raise HandlerError(
            f"a worker could not load {path.name}",
            found=f"a syntax error at {where}: {exc.msg}",
            remedy="mend the handler and pack again",
        ) from exc
    except ValueError as exc:  # NUL bytes, before Python 3.11.4
        raise HandlerError(f"{path.name} is no Python source", found=str(exc)) from exc


def _module_level(
    tree: ast.Module, *, within: tuple[type[ast.stmt], ...] = (ast.If, ast.Try, ast.With)
) -> Iterator[ast.stmt]:
    """Yield the statements that run at import: also those inside if, try and with."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        statement = pending.pop(0)
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) in _FALSE_IN_A_WORKER:
            pending = statement.orelse + pending
        elif isinstance(statement, within):
            pending = [
                child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)
            ] + pending


def _check_name(path: Path) -> Iterator[str]:
    if "." in path.stem:
        yield f"a dot in the name {path.name!r}, which Python reads as a package"


def _check_entry_point(tree: ast.Module) -> Iterator[str]:
    statements = list(_module_level(tree))
    if any("handle" in _bound_names(item) for item in statements):
        return
    # By name: of two under one name, in `if` and `else`, the module keeps one.
    classes = list(
        {item.name: item for item in statements if isinstance(item, ast.ClassDef)}.values()
    )
    if len(classes) != 1:
        found = ", ".join(f"{item.name} (line {item.lineno})" for item in classes) or "none"
        yield f"{found} where TorchServe expects exactly one class (move others to a sibling file)"
        return
    if classes[0].bases:
        return  # what it inherits is known only by running it
    methods = {name for item in classes[0].body for name in _bound_names(item)}
    for method in ("initialize", "handle"):
        if method not in methods:
            yield f"class {classes[0].name} (line {classes[0].lineno}) without a method {method}"


def _bound_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement defines: a function, an assignment, an import."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in statement.names}
    return set()


def _follow_imports(path: Path, tree: ast.Module) -> tuple[tuple[Path, ...], list[str]]:
    """Return the local modules a handler reaches, and the imports that nothing would satisfy.

    What is imported inside `try` or a function travels too, but may be missing, and so may what
    only such a module imports.
    """
    siblings: dict[Path, bool] = {}  # whether a worker could not start without it
    missing = []
    pending = [(path, tree, True)]
    while pending:
        source, module, needed = pending.pop()
        at_import = {id(item) for item in _module_level(module, within=(ast.If, ast.With))}
        for statement in ast.walk(module):
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            required = needed and id(statement) in at_import
            where = f"{source.name}:{statement.lineno}"
            if required and _is_relative(statement) and source.parent == path.parent:
                missing.append(f"a relative import at {where}, where the worker knows no package")
            for name in _imported_names(statement):
                sibling = _find_sibling(path.parent, name)
                if sibling is None:
                    if required and importlib.util.find_spec(name) is None:
                        missing.append(f"import of {name!r} at {where}, not installed here")
                elif sibling != path and siblings.get(sibling, -1) < required:
                    siblings[sibling] = required
                    files = sorted(sibling.rglob("*.py")) if sibling.is_dir() else [sibling]
                    pending += [(file, _parse(file), required) for file in files]
    return tuple(sorted(siblings)), missing


def _find_sibling(folder: Path, name: str) -> Path | None:
    if (module := folder / f"{name}.py").is_file():
        return module
    if (package := folder / name).is_dir() and any(package.glob("*.py")):
        return package
    return None


def _is_relative(statement: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.level > 0


def _imported_names(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the top-level modules that a statement imports by their full names."""
    if isinstance(statement, ast.Import):
        return [alias.name.split(".")[0] for alias in statement.names]
    if statement.module and not statement.level:
        return [statement.module.split(".")[0]]
    return []
