"""The JSON Schema of a request's body, where the archive brings one (MAR-INF/spec.json)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from problem import RejectedInput

__all__ = ["load_check"]

SPEC = "MAR-INF/spec.json"


def load_check(folder: Path) -> Callable[[Any], None] | None:
    """Return what refuses bodies (422) that the archive's schema does not allow; None without one.

    Raises:
        ModuleNotFoundError: there is a schema, and no jsonschema to check it with.
    """
    path = folder / SPEC
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    schema = (spec.get("input") or {}).get("schema")
    if not schema:
        return None
    try:
        validators = importlib.import_module("jsonschema.validators")
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "this archive has a schema for its input, which needs jsonschema in the server's "
            "environment: pip install jsonschema",
            name="jsonschema",
        ) from exc
    validator = validators.validator_for(schema)(schema)

    def check(body: Any) -> None:
        try:
            fault = next(iter(validator.iter_errors(body)), None)
        except RecursionError as exc:
            raise RejectedInput(422, "expected what the schema allows, found it too deep") from exc
        if fault is not None:
            where = "".join(f"[{key!r}]" for key in fault.absolute_path)[:200] or "the body"
            raise RejectedInput(422, f"expected what the schema allows, {where}: {_shorten(fault)}")

    return check


def _shorten(fault: Any) -> str:
    """Return the fault without the body that it quotes at any length."""
    message = str(fault.message)
    return message if len(message) <= 200 else f"{fault.validator} does not hold"
