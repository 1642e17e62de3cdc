"""What deploy.yaml's keys mean, read from the texts below them in deployment.py and sections.py.

Pydantic can do so itself, whenever the module is imported: 40 ms of each command, for texts that
few ask for.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

__all__ = ["add_descriptions"]


def add_descriptions(schema: dict[str, Any], *modules: ModuleType) -> dict[str, Any]:
    """Return a JSON schema with the texts that stand below its models' fields in modules."""
    listed = (item for module in modules for item in _list_texts(module))
    texts = {(name, field): text for name, field, text in listed}
    models = {schema.get("title", ""): schema, **schema.get("$defs", {})}
    for name, model in models.items():
        for field, value in model.get("properties", {}).items():
            if (name, field) in texts:
                value.setdefault("description", texts[name, field])
    return schema


def _list_texts(module: ModuleType) -> Iterator[tuple[str, str, str]]:
    """Yield class, field and text of each annotated field that a text follows."""
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                yield node.name, field.target.id, inspect.cleandoc(str(text.value.value))
