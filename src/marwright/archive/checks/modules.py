"""The modules that a handler reaches by imports: parsed, never run.

What decides is how a worker imports: the handler by its base name as a top-level module, with the
unpacked archive first on the path (ts/model_loader.py; EnvironmentUtils.getEnvString in Java).
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from marwright.archive.checks.syntax import module_level, parse_source, read_source, walk

__all__ = ["Closure", "find_local", "is_installed", "Missing", "Module"]

TORCHSERVE = "ts"

_EXTENSIONS = tuple(importlib.machinery.EXTENSION_SUFFIXES)


@dataclass(frozen=True)
class Module:
    """One source file that a handler reaches."""

    name: str
    """Full name, such as `package.inner`."""
    path: Path
    member: str
    """Name inside the archive; empty for TorchServe's own modules."""
    tree: ast.Module
    """Empty where `problem` says why."""
    required: bool
    """Whether a worker could not start without it; false for what stands inside `try`."""
    is_local: bool = True
    """Whether it stands in the archive; others are TorchServe's own handlers."""
    problem: str = ""
    """Why it cannot be parsed."""
    problem_line: int | None = None

    @property
    def is_package(self) -> bool:
        """Whether it is a package's `__init__.py`."""
        return self.path.name == "__init__.py"

    @property
    def is_top_level(self) -> bool:
        """Whether it stands in no package."""
        return "." not in self.name and not self.is_package


@dataclass(frozen=True)
class Missing:
    """An import that nothing satisfies, neither inside the archive nor installed here."""

    name: str
    """What is missing, such as `cv2` or `package.absent`."""
    module: Module
    """Who imports it."""
    line: int


@dataclass
class Closure:
    """A handler, all that it reaches inside its folder, and what it misses.

    Example:
        closure = Closure.follow(Path("handler.py"))
        print([module.member for module in closure.modules])
    """

    folder: Path
    modules: list[Module] = field(default_factory=list)
    """The handler first."""
    siblings: list[Path] = field(default_factory=list)
    """Files and package folders beside the handler that it reaches."""
    missing: list[Missing] = field(default_factory=list)
    relative: list[tuple[Module, int]] = field(default_factory=list)
    """Relative imports of modules that stand in no package, with their lines."""

    @classmethod
    def follow(
        cls, handler: Path, *, folder: Path | None = None, python: tuple[int, int] | None = None
    ) -> Closure:
        """Read a handler and the modules it reaches.

        `folder` is where a worker looks for them, the handler's own by default; `python` is the
        version they are written for.

        Raises:
            StorageError: a file that cannot be read.
        """
        closure = cls(folder or handler.parent)
        name = _module_name(closure.folder, handler)
        return closure._follow([_Step(handler, name, True)], python)

    @classmethod
    def follow_torchserve(cls, name: str) -> Closure | None:
        """Read one of TorchServe's own handlers, such as `image_classifier`, or None."""
        folder = _find_torchserve()
        path = folder / "torch_handler" / f"{name}.py" if folder else None
        if path is None or not path.is_file():
            return None
        full_name = f"{TORCHSERVE}.torch_handler.{name}"
        return cls(path.parent)._follow([_Step(path, full_name, True, is_local=False)], None)

    def _follow(self, pending: list[_Step], python: tuple[int, int] | None) -> Closure:
        read: dict[Path, bool] = {}  # whether a worker needs it
        found: dict[Path, Module] = {}
        siblings: dict[Path, None] = {}
        missing: dict[tuple[str, Path], Missing] = {}
        while pending:
            step = pending.pop()
            if read.get(step.path, -1) >= step.required:
                continue  # read before, and then not taken for less needed than now
            read[step.path] = step.required
            module = found[step.path] = self._parse(step, python)
            for needed in _imports(module):
                if needed.is_relative and module.is_local and module.is_top_level:
                    if needed.required:
                        self.relative.append((module, needed.line))
                    continue
                steps, sibling, absent = self._resolve(needed, module)
                pending += steps
                if sibling is not None and module.is_local:
                    siblings[sibling] = None
                if absent and needed.required:
                    missing.setdefault((absent, module.path), Missing(absent, module, needed.line))
        self.modules = list(found.values())
        self.siblings = sorted(siblings.keys() - {self.modules[0].path})
        self.missing = list(missing.values())
        return self

    def _parse(self, step: _Step, python: tuple[int, int] | None) -> Module:
        source = read_source(step.path)
        member = step.path.relative_to(self.folder).as_posix() if step.is_local else ""
        tree, problem, line = parse_source(source, python if step.is_local else None)
        return Module(
            step.name, step.path, member, tree, step.required, step.is_local, problem, line
        )

    def _resolve(self, needed: _Import, importer: Module) -> tuple[list[_Step], Path | None, str]:
        """Return the files an import reads, the sibling that travels for it, and what is absent."""
        top = needed.name.split(".")[0]
        if not importer.is_local or (top == TORCHSERVE and find_local(self.folder, top) is None):
            return self._resolve_installed(needed)
        sibling = find_local(self.folder, top)
        if sibling is None:
            return [], None, "" if is_installed(top) else top
        steps, absent = _steps_to(self.folder, needed)
        if sibling.is_dir():
            # The whole package travels, so that what its other modules import has to as well.
            whole = sorted(sibling.rglob("*.py"))
            steps[:0] = [_Step(path, _module_name(self.folder, path), False) for path in whole]
        return steps, sibling, absent

    def _resolve_installed(self, needed: _Import) -> tuple[list[_Step], Path | None, str]:
        """Follow TorchServe's own handlers, which need modules that TorchServe does not declare."""
        top = needed.name.split(".")[0]
        folder = _find_torchserve()
        if top == TORCHSERVE and folder is not None:
            if not needed.name.startswith(f"{TORCHSERVE}.torch_handler"):
                return [], None, ""
            steps, _ = _steps_to(folder.parent, needed, is_local=False)
            return steps, None, ""
        return [], None, "" if is_installed(top) else top


@dataclass(frozen=True)
class _Step:
    """A file still to be read."""

    path: Path
    name: str
    required: bool
    is_local: bool = True


@dataclass(frozen=True)
class _Import:
    """One module that a statement imports, by its full name."""

    name: str
    members: tuple[str, ...]
    """Names after `from ... import`, which may be modules too."""
    line: int
    required: bool
    is_relative: bool


def find_local(folder: Path, name: str, *, inner: bool = False) -> Path | None:
    """Return the module file or package folder that a worker would import from `folder`.

    `inner`: `folder` is itself a package.
    """
    package = folder / name
    if (package / "__init__.py").is_file():
        return package
    for suffix in (*_EXTENSIONS, ".py"):
        if (module := folder / f"{name}{suffix}").is_file():
            return module
    # Without __init__.py it is a package only where no installed one bears the name.
    if package.is_dir() and any(package.rglob("*.py")) and (inner or not is_installed(name)):
        return package
    return None


def is_installed(name: str) -> bool:
    """Whether a worker on this machine could import a top-level module; nothing is imported.

    What only stands in the working folder is not counted, which Python puts first on the path for
    a program started by `-m`: a worker has another one.
    """
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return True
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: loaded by hand, without a spec
        return name in sys.modules
    if spec is None:
        return False
    places = [spec.origin] if spec.has_location and spec.origin else []
    places = places or [str(path) for path in spec.submodule_search_locations or ()]
    here = str(Path.cwd())
    return not places or any(
        (folder := _folder_of(place, name)) != here or folder in sys.path[1:] for place in places
    )


def _folder_of(place: str, name: str) -> str:
    """Return the path entry that holds a module, given its file or folder."""
    path = Path(place).absolute()
    return str(path.parent.parent if path.parent.name == name else path.parent)


def _find_torchserve() -> Path | None:
    spec = importlib.util.find_spec(TORCHSERVE)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _imports(module: Module) -> Iterator[_Import]:
    # Not inside `if`: whether a worker comes there is not known here.
    at_import = {id(item) for item in module_level(module.tree, within=(ast.With,))}
    for node in walk(module.tree):
        if isinstance(node, ast.Import):
            required = module.required and id(node) in at_import
            for alias in node.names:
                yield _Import(alias.name, (), node.lineno, required, False)
        elif isinstance(node, ast.ImportFrom):
            required = module.required and id(node) in at_import
            members = tuple(alias.name for alias in node.names)
            name = _absolute_name(node, module)
            if name:
                yield _Import(name, members, node.lineno, required, node.level > 0)


def _absolute_name(node: ast.ImportFrom, module: Module) -> str:
    """Return the full name of what stands between `from` and `import`."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    up = node.level - module.is_package
    parent = parts[: len(parts) - up] if up else parts
    return ".".join([*parent, node.module] if node.module else parent) or module.name


def _steps_to(folder: Path, needed: _Import, *, is_local: bool = True) -> tuple[list[_Step], str]:
    """Return the files that an import reads in turn, and the first part that is not there."""
    parts = needed.name.split(".")
    steps: list[_Step] = []
    for count in range(1, len(parts) + 1):
        parent = folder.joinpath(*parts[: count - 1])
        place = find_local(parent, parts[count - 1], inner=count > 1)
        if place is None:
            return steps, ".".join(parts[:count])
        steps += _step(place, ".".join(parts[:count]), needed.required, is_local)
    for member in needed.members:
        place = find_local(folder.joinpath(*parts), member, inner=True)
        if place is not None:
            steps += _step(place, f"{needed.name}.{member}", needed.required, is_local)
    return steps, ""


def _step(place: Path, name: str, required: bool, is_local: bool) -> list[_Step]:
    path = place / "__init__.py" if place.is_dir() else place
    return [_Step(path, name, required, is_local)] if path.is_file() else []


def _module_name(folder: Path, path: Path) -> str:
    relative = path.relative_to(folder).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(parts)
