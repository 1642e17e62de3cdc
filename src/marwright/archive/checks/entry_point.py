"""The entry point of a handler: the one class, or the function, that TorchServe calls.

Source: ts/model_loader.py, and list_classes_from_module in ts/utils/util.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.modules import Module
from marwright.archive.checks.syntax import bound_names, module_level

__all__ = ["check_entry_point", "defined_classes", "list_classes", "RULES"]

ENTRY_POINT = Rule(
    "H303",
    Severity.ERROR,
    "TorchServe finds no one entry point",
    "leave exactly one class in the handler's file and move others to a file beside it, "
    "or define handle(data, context)",
)
METHODS = Rule(
    "H304", Severity.ERROR, "the handler's class lacks a method", "add the method to the class"
)
FUNCTION = Rule(
    "H305",
    Severity.ERROR,
    "the manifest names a function that the handler does not define",
    "name a function that the handler's file defines",
)
FILE_NAME = Rule(
    "H306",
    Severity.ERROR,
    "the handler's file name cannot be imported",
    "rename the handler's file",
)
RULES = (ENTRY_POINT, METHODS, FUNCTION, FILE_NAME)

# Assigned at module level, their results count as classes of the module.
_CLASS_MAKERS = ("namedtuple", "NamedTuple", "TypedDict", "Enum", "make_dataclass", "type")


def check_entry_point(handler: Module, function: str = "") -> Iterator[Finding]:
    """Yield why TorchServe would find nothing to call; `function` is named by the manifest."""
    if "." in handler.path.stem:
        yield FILE_NAME.at(
            f"a dot in the name {handler.path.name!r}, which Python reads as a package",
            member=handler.member,
        )
    statements = list(module_level(handler.tree))
    names = set[str]().union(*(bound_names(item) for item in statements))
    if (function or "handle") in names or "*" in names:
        return  # what `import *` brings is known only by running it
    classes = defined_classes(statements)
    if function:
        yield _describe_absent(function, classes, handler)
    if len(classes) == 1:
        yield from _check_methods(*next(iter(classes.items())), handler)
        return
    found = list_classes(classes)
    yield ENTRY_POINT.at(
        f"{found} where TorchServe expects exactly one class",
        member=handler.member,
        line=list(classes.values())[1].lineno if classes else None,
    )


def defined_classes(statements: Iterable[ast.stmt]) -> dict[str, ast.stmt]:
    """Return the classes that TorchServe would count, by name: a module keeps one of each name."""
    found: dict[str, ast.stmt] = {}
    for item in statements:
        if isinstance(item, ast.ClassDef):
            found[item.name] = item
        elif isinstance(item, ast.Assign) and isinstance(item.value, ast.Call):
            maker = item.value.func
            called = maker.attr if isinstance(maker, ast.Attribute) else getattr(maker, "id", "")
            if called in _CLASS_MAKERS and len(item.value.args) > 1:
                found.update(dict.fromkeys(bound_names(item), item))
    return found


def list_classes(classes: dict[str, ast.stmt]) -> str:
    """Return `A (line 1), B (line 2)`, or `none`."""
    return ", ".join(f"{name} (line {item.lineno})" for name, item in classes.items()) or "none"


def _describe_absent(function: str, classes: dict[str, ast.stmt], handler: Module) -> Finding:
    """Where the function is absent TorchServe takes the class, and says nothing."""
    if len(classes) != 1:
        return FUNCTION.at(f"no function {function}", member=handler.member)
    (name,) = classes
    return FUNCTION.at(
        f"no function {function}; TorchServe takes the class {name}",
        member=handler.member,
        severity=Severity.WARNING,
    )


def _check_methods(name: str, definition: ast.stmt, handler: Module) -> Iterator[Finding]:
    if not isinstance(definition, ast.ClassDef) or definition.bases or definition.decorator_list:
        return  # what it inherits is known only by running it
    methods = set[str]().union(*(bound_names(item) for item in definition.body))
    for method in ("initialize", "handle"):
        if method not in methods:
            yield METHODS.at(
                f"class {name} without a method {method}",
                member=handler.member,
                line=definition.lineno,
            )
