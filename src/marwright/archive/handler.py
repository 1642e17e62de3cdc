"""The handler's source: a file, and the local modules that travel with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from marwright.archive.checks.findings import Severity
from marwright.archive.checks.modules import Closure
from marwright.archive.checks.source import MISSING, check_closure
from marwright.errors import HandlerError
from marwright.storage import translate_os_errors

__all__ = ["find_ours", "HandlerSource", "list_ours"]

_LEFT_OUT = ("__pycache__", ".")
"""How the names of files and folders begin that are no part of a package."""
_OURS = re.compile(r"^class \w+\(BatchHandler\):", re.MULTILINE)


@dataclass(frozen=True)
class HandlerSource:
    """A handler file and the local modules it imports, each of which travels with it."""

    path: Path
    siblings: tuple[Path, ...] = field(default=())
    """Modules and package folders beside the handler that it reaches by imports."""

    @classmethod
    def find(cls, handler: str) -> HandlerSource:
        """Read a handler given as a path, or by the name of one that comes with marwright.

        Modules that are missing are no error here: check_source judges them by what the archive's
        requirements name.

        Raises:
            HandlerError: no such file, a syntax error, no or two classes; all of a file's problems
                are named at once.
        """
        path = Path(handler) if handler.endswith(".py") else find_ours() / f"{handler}.py"
        with translate_os_errors(f"read {path}"):
            found = path.is_file()
        if not found:
            raise HandlerError(
                f"there is no handler file {handler}",
                remedy="pass a path ending in .py, or the name of one of ours: "
                + ", ".join(list_ours()),
            )
        closure = Closure.follow(path)
        problems = [
            finding
            for finding in check_closure(closure)
            if finding.severity >= Severity.ERROR and finding.rule is not MISSING
        ]
        if problems:
            raise HandlerError(
                f"a worker could not load {path.name}",
                found="; ".join(f"{item.rule.id} {item.place}: {item.found}" for item in problems),
                remedy=problems[0].remedy,
            )
        return cls(path, tuple(closure.siblings))

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name inside the archive, file) of the handler and all that travels with it.

        A package travels whole, with what it reads beside its modules.
        """
        folder = self.path.parent
        for path in (self.path, *self.siblings):
            members = sorted(path.rglob("*")) if path.is_dir() else [path]
            for member in members:
                name = member.relative_to(folder)
                if member.is_file() and not any(part.startswith(_LEFT_OUT) for part in name.parts):
                    yield name.as_posix(), member


def list_ours() -> list[str]:
    """Return the names of the handlers that come with marwright."""
    return sorted(
        entry.name.removesuffix(".py")
        for entry in resources.files("marwright.handlers").iterdir()
        if entry.name.endswith(".py") and _OURS.search(entry.read_text(encoding="utf-8"))
    )


def find_ours() -> Path:
    """Return the folder of the handlers that come with marwright."""
    return Path(str(resources.files("marwright.handlers")))
