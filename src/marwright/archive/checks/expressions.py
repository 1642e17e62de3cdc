"""What a source file's expressions say of paths, followed as far as assignments tell."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from marwright.archive.checks.modules import Module
from marwright.archive.checks.syntax import walk

__all__ = ["Expressions", "JOINS", "MAKERS", "Target"]

MAKERS = re.compile(r"pathlib\.(Pure|Posix)?Path|str|os\.(fspath|path\.(abs|real|norm)path)")
"""Functions that make a path of their arguments, by their full names."""
JOINS = re.compile(r"(os\.path|posixpath)\.join")
MODEL_DIR = "model_dir"
"""How TorchServe's Context calls the folder of the unpacked archive (ts/context.py)."""

_ABSOLUTE = re.compile(r"/[^/\s]|[A-Za-z]:[\\/]|~[\w.-]*/")
_SAME_PATH = ("resolve", "absolute", "as_posix")
_DEPTH = 12
"""Of nested expressions that are followed."""


@dataclass(frozen=True)
class Target:
    """Where an expression leads: below the model's folder, or to a text as it stands."""

    text: str
    is_rooted: bool = False
    """Whether `text` is below the model's folder."""

    @property
    def member(self) -> str:
        """The name inside the archive; a relative path is one too: workers run in that folder."""
        return posixpath.normpath(self.text.lstrip("/") if self.is_rooted else self.text)

    @property
    def is_absolute(self) -> bool:
        """Whether it names a place of one machine."""
        return not self.is_rooted and _ABSOLUTE.match(self.text) is not None

    def join(self, other: Target) -> Target:
        """Return the path of `other` below this one, as os.path.join has it."""
        if other.is_rooted or other.is_absolute:
            return other
        return Target(posixpath.join(self.text, other.text), self.is_rooted)

    def parent(self) -> Target:
        """Return the folder it stands in."""
        return Target(posixpath.dirname(self.text), self.is_rooted)


@dataclass
class Expressions:
    """One module's tree, with what is needed to follow its names."""

    module: Module
    calls: list[ast.Call] = field(default_factory=list)
    texts: list[ast.Constant] = field(default_factory=list)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    _aliases: dict[str, str] = field(default_factory=dict)
    """Local name to the full name that was imported."""
    _values: dict[tuple[ast.AST | None, str], list[ast.expr | None]] = field(default_factory=dict)
    """(function, name) or (None, `self.name`) to all that is bound to it; None: not known."""

    @classmethod
    def read(cls, module: Module) -> Expressions:
        """Gather a module's calls, texts and assignments."""
        source = cls(module)
        nodes = list(walk(module.tree))
        source.parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                source._aliases.update(_aliases(node))
            elif isinstance(node, ast.Call):
                source.calls.append(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                source.texts.append(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    source._bind(target, node.value)
            elif isinstance(node, ast.arg):
                source._values.setdefault((source.function_of(node), node.arg), []).append(None)
            elif isinstance(node, (ast.For, ast.AugAssign, ast.comprehension)):
                source._bind(node.target, None)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                source._bind(node.optional_vars, None)
        return source

    def function_of(self, node: ast.AST) -> ast.AST | None:
        """Return the innermost function around a node, or None at module level."""
        parent = self.parents.get(node)
        while parent is not None:
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                return parent
            parent = self.parents.get(parent)
        return None

    def full_name(self, function: ast.expr) -> str:
        """Return the name that a function was imported under: `numpy.load` for `np.load`."""
        head, dot, rest = _dotted(function).partition(".")
        return self._aliases.get(head, head) + dot + rest

    def resolve(self, node: ast.expr | None, depth: int = _DEPTH) -> Target | None:
        """Return where an expression leads, or None where its source does not say."""
        if node is None or depth == 0:
            return None
        depth -= 1
        if isinstance(node, ast.Constant):
            return Target(node.value) if isinstance(node.value, str) else None
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._resolve_name(node, depth)
        if isinstance(node, ast.Subscript):
            return Target("", is_rooted=True) if _says_model_dir(node.slice) else None
        if isinstance(node, ast.Call):
            return self._resolve_call(node, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return self._join([node.left, node.right], depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._concatenate([node.left, node.right], depth)
        if isinstance(node, ast.JoinedStr):
            return self._concatenate(node.values, depth)
        return self.resolve(node.value, depth) if isinstance(node, ast.FormattedValue) else None

    def _bind(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._bind(item, None)
            return
        name = _dotted(target)
        if "." in name or not name:
            self._values.setdefault((None, name), []).append(value)
            return
        self._values.setdefault((self.function_of(target), name), []).append(value)
        if isinstance(self.parents[self.parents[target]], ast.ClassDef):
            self._values.setdefault((None, f"self.{name}"), []).append(value)

    def _look_up(self, node: ast.expr, name: str) -> list[ast.expr | None]:
        """Return what is bound to a name, in the innermost function that binds it."""
        scope = None if "." in name else self.function_of(node)
        while (scope, name) not in self._values and scope is not None:
            scope = self.function_of(scope)
        return self._values.get((scope, name), [])

    def _resolve_name(self, node: ast.Name | ast.Attribute, depth: int) -> Target | None:
        name = _dotted(node)
        if name == "__file__":
            return Target(self.module.member, is_rooted=True)
        if isinstance(node, ast.Attribute) and node.attr == "parent":
            inner = self.resolve(node.value, depth)
            return None if inner is None else inner.parent()
        values = self._look_up(node, name)
        if len(values) == 1 and values[0] is not None:
            return self.resolve(values[0], depth)
        is_model_dir = values in ([], [None]) and name.split(".")[-1] == MODEL_DIR
        return Target("", is_rooted=True) if is_model_dir else None

    def _resolve_call(self, node: ast.Call, depth: int) -> Target | None:
        name = self.full_name(node.func)
        if name in ("os.getcwd", "pathlib.Path.cwd"):
            return Target("", is_rooted=True)
        if name == "os.path.dirname" and node.args:
            inner = self.resolve(node.args[0], depth)
            return None if inner is None else inner.parent()
        if MAKERS.fullmatch(name) or JOINS.fullmatch(name):
            return self._join(node.args, depth)
        if not isinstance(node.func, ast.Attribute):
            return None
        if node.func.attr == "get" and node.args and _says_model_dir(node.args[0]):
            return Target("", is_rooted=True)
        if node.func.attr == "joinpath":
            return self._join([node.func.value, *node.args], depth)
        return self.resolve(node.func.value, depth) if node.func.attr in _SAME_PATH else None

    def _join(self, parts: list[ast.expr], depth: int) -> Target | None:
        targets = [self.resolve(part, depth) for part in parts]
        whole: Target | None = None
        for target in targets:
            if target is None:
                return None
            whole = target if whole is None else whole.join(target)
        return whole

    def _concatenate(self, parts: list[ast.expr], depth: int) -> Target | None:
        whole = Target("")
        for part in parts:
            target = self.resolve(part, depth)
            if target is None or (target.is_rooted and whole.text):
                return None
            whole = Target(whole.text + target.text, whole.is_rooted or target.is_rooted)
        return whole


def _aliases(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    for alias in node.names:
        if isinstance(node, ast.Import):
            head = alias.name.split(".")[0]
            yield (alias.asname, alias.name) if alias.asname else (head, head)
        elif node.module and not node.level:
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression, else an empty text."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _says_model_dir(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == MODEL_DIR
