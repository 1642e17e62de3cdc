"""The nginx of this machine: where it is, and what it says of a configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from marwright.errors import ConfigurationError, ServerError

__all__ = ["check_configuration", "find_nginx"]

FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/nginx/sbin")
"""Where packages put it; a plain user's PATH often lacks them."""
CHECK_SECONDS = 30.0


def find_nginx() -> Path:
    """Return the nginx on PATH, or the one that a package has put beside it.

    Raises:
        ServerError: there is none.
    """
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS]))
    if found is None:
        raise ServerError(
            "the gateway needs nginx",
            expected=f"nginx on PATH or in {', '.join(FOLDERS)}",
            found="none",
            # Before Debian 12 nginx-light had no split_clients.
            remedy="install it: apt-get install nginx",
        )
    return Path(found).absolute()


def check_configuration(path: Path) -> None:
    """Let nginx read a configuration without using it; relative paths begin in its folder.

    Raises:
        ConfigurationError: nginx refuses it; `detail` is what it says.
        ServerError: there is no nginx.
    """
    command = [str(find_nginx()), "-t", "-q", "-c", str(path), "-p", f"{path.parent}/"]
    try:
        done = subprocess.run(
            command,
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerError("nginx could not look at its configuration", found=str(exc)) from exc
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise ConfigurationError(
            "nginx refuses the gateway's configuration",
            found=said.partition("\n")[0],
            remedy="mend what it names; a directive it does not know takes a newer nginx",
            detail=said,
        )
