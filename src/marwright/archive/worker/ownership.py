"""Which files are a handler's own, and which belong to Python and what is installed."""

from __future__ import annotations

import os
import site
import sysconfig
from collections.abc import Sequence

__all__ = ["find_own"]

_INSTALLED = tuple(
    folder + os.sep
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        site.getusersitepackages(),
    )
)


def find_own(filename: str, roots: Sequence[str]) -> str:
    """Return a file's name below one of the roots, or "" where it is not the handler's.

    A handler that is used where it stands may have a virtual environment, or all of Python, below
    its folder.
    """
    for root in roots:
        below = root + os.sep
        installed = tuple(folder for folder in _INSTALLED if folder.startswith(below))
        if filename.startswith(below) and not filename.startswith(installed or ("\0",)):
            return filename[len(below) :].replace(os.sep, "/")
    return ""
