"""Flower, where it is installed: imported with its telemetry off and its log held back."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from marwright.errors import UsageError

__all__ = ["load_flower", "quieten_flower"]

SWITCHES = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Read when flwr is imported, and by its commands."""


def load_flower() -> None:
    """Import Flower; nothing of it speaks to anybody.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.update(SWITCHES)
    try:
        with warnings.catch_warnings():
            # The typer that Flower asks for takes names that click will drop.
            warnings.simplefilter("ignore", DeprecationWarning)
            import flwr.app
            import flwr.clientapp
            import flwr.serverapp.strategy  # noqa: F401  # whether all is there
    except ImportError as exc:
        raise UsageError(
            "federated training needs Flower",
            expected="Python 3.11 or newer, and flwr",
            found=str(exc),
            remedy="pip install 'marwright[federated]'",
        ) from exc


@contextmanager
def quieten_flower() -> Iterator[None]:
    """Hold back Flower's log lines: what matters of them is in the report, or an error."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
