"""Libraries that are installed only where they are asked for."""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

from marwright.errors import UsageError

__all__ = ["import_extra"]

_EXTRAS = {
    "nncf": "openvino",
    "onnx": "optimise",
    "onnxruntime": "optimise",
    "onnxscript": "optimise",
    "openvino": "openvino",
    "torch_pruning": "optimise",
    "torchao": "optimise",
}


def import_extra(name: str, purpose: str) -> Any:
    """Import a module; `purpose` begins the sentence "... needs NAME".

    Raises:
        UsageError: it is not installed; says how to install it.
    """
    library = name.partition(".")[0]
    if library in ("nncf", "openvino"):
        # Both report each use to their maker as soon as they are imported, without asking. They
        # do without it where this is not installed, and so they are told.
        cast("dict[str, Any]", sys.modules).setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"{purpose} needs {library.replace('_', '-')}",
            remedy=f"pip install 'marwright[{_EXTRAS[library]}]'",
        ) from exc
