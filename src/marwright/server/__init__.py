"""One TorchServe process tree under our supervision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marwright.server.ports import Ports
    from marwright.server.registration import register
    from marwright.server.torchserve import TorchServe

__all__ = ["Ports", "register", "TorchServe"]

_HOMES = {
    "Ports": "marwright.server.ports",
    "register": "marwright.server.registration",
    "TorchServe": "marwright.server.torchserve",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `marwright.server.java` runs before a client is needed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
