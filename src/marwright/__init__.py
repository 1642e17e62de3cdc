"""marwright carries a PyTorch model from training to a watched release on TorchServe."""

from __future__ import annotations

from marwright.errors import MarwrightError

__version__ = "0.1.0"

__all__ = ["MarwrightError"]
