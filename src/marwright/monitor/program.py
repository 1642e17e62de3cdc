"""Prometheus and Alertmanager as programs: found, asked about their files, started, ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from marwright.errors import (
    ConfigurationError,
    MarwrightError,
    NotReadyError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from marwright.server.ports import HOST, is_free
from marwright.server.process import Process
from marwright.storage import translate_os_errors

__all__ = ["check_file", "find_program", "Program", "PROGRAMS", "read_key", "write_private"]

CHECK_SECONDS = 30.0
START_SECONDS = 60.0
GRACE_SECONDS = 10.0
LOOK_SECONDS = 0.05
TAIL_BYTES = 4096
PASSED = ("PATH", "LANG", "LC_ALL", "TZ")
"""The variables that they are given: they need no secret, and no proxy."""
FLAGS = "flags"
PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")
"""Which run, and which check what is made for them."""


def find_program(name: str) -> Path:
    """Return a program of the Debian packages.

    Raises:
        ServerError: it is not there.
    """
    found = shutil.which(name)
    if found is None:
        raise ServerError(
            f"monitoring needs {name}",
            found="none on PATH",
            remedy="install it: apt-get install prometheus prometheus-alertmanager; Debian starts"
            " both as services, at 9090 and 9093, which marwright does not need:"
            " systemctl disable --now prometheus prometheus-alertmanager",
        )
    return Path(found).absolute()


def check_file(command: Sequence[str], path: Path, *, secret: str = "") -> None:
    """Let a program look at a file that was made for it; its words never show `secret`.

    Raises:
        ConfigurationError: it refuses the file; `detail` is what it says.
        ServerError: it is not there.
    """
    program, *arguments = command
    try:
        done = subprocess.run(
            [str(find_program(program)), *arguments, str(path)],
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerError(f"{program} could not look at {path.name}", found=str(exc)) from exc
    if done.returncode:
        said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        said = said.replace(secret, "...") if secret else said
        lines = [line for line in said.splitlines() if "FAILED" in line or "rror" in line]
        raise ConfigurationError(
            f"{program} refuses {path.name}",
            found=(lines or said.splitlines() or [""])[0].strip(),
            remedy="mend what it names in deploy.yaml's monitoring section",
            detail=said,
        )


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    with translate_os_errors(f"write {path}"):
        fresh = path.with_name(f".{path.name}.new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        fresh.replace(path)


def read_key(folder: Path) -> str:
    """Return the word that the programs' addresses begin with, made at the first time.

    Neither asks for a token, and Alertmanager answers any web page that its user has open: one that
    does not know the word gets 404. It is no secret from other users of this machine: both programs
    lead them from / to it.
    """
    path = folder / "key"
    with contextlib.suppress(OSError):
        if key := path.read_text(encoding="ascii").strip():
            return key
    write_private(path, secrets.token_urlsafe(18))
    return path.read_text(encoding="ascii")


class Program:
    """One of them under a guard, which ends it with whoever holds it, however that ends.

    `setting` is the key of deploy.yaml that says its port; `files` go into a folder of its own,
    which vanishes with it, `data` is where it keeps things; `arguments` come besides.
    """

    def __init__(
        self,
        name: str,
        setting: str,
        port: int,
        *,
        key: str,
        files: Mapping[str, str],
        arguments: Sequence[str],
    ) -> None:
        self.name = name
        self.url = f"http://{HOST}:{port}/{key}"
        self._setting = setting
        self._port = port
        self._flags = [
            f"--web.listen-address={HOST}:{port}",
            f"--web.external-url={self.url}",  # all of its addresses begin so
            *arguments,
        ]
        self._program = find_program(name)
        self._process: Process | None = None
        with translate_os_errors("make a folder for what runs"):
            self.folder = Path(tempfile.mkdtemp(prefix=f"marwright-{name}-"))
            for file, text in files.items():
                write_private(self.folder / file, text)

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.exit_status is None

    def begin(self) -> None:
        """Start it, without waiting for it.

        Raises:
            PortTakenError: somebody listens there.
        """
        if self._process is not None:
            self._process.end(keep_folder=True)
            self._process = None
        if not is_free(self._port):
            raise self._explain_port()
        # In a file: a command line is everybody's to read.
        write_private(self.folder / FLAGS, "\n".join(self._flags) + "\n")
        self._process = Process.start(
            self.folder,
            [str(self._program), f"@{FLAGS}"],
            environment={name: os.environ[name] for name in PASSED if name in os.environ},
            grace=GRACE_SECONDS,
        )

    def wait(self) -> None:
        """Return once it answers.

        Raises:
            ServerDiedError: it has ended; `detail` is what it said.
            NotReadyError: it took too long.
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), opener.open(f"{self.url}/-/ready", timeout=5):
                return
            if not self.is_running:
                raise self.explain_end()
            if time.monotonic() > deadline:
                raise NotReadyError(
                    f"{self.name} was not ready within {START_SECONDS:g} s",
                    detail=self._read_output(),
                )
            time.sleep(LOOK_SECONDS)

    def explain_end(self) -> MarwrightError:
        """Return the error for a program that has ended, in its own words."""
        said = self._read_output()
        if "address already in use" in said:
            return self._explain_port()
        lines = [line for line in said.splitlines() if "level=error" in line or "error:" in line]
        return ServerDiedError(
            f"{self.name} has ended", found=lines[-1] if lines else "", detail=said
        )

    def end(self) -> None:
        """End it, and remove its folder; safe to call twice."""
        if self._process is not None:
            self._process.end()
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _explain_port(self) -> PortTakenError:
        return PortTakenError(
            f"port {self._port} ({self._setting}) is taken",
            remedy=f"stop what listens there, perhaps Debian's own service: systemctl disable --now"
            f" {self.name}; or choose another one: {self._setting} in deploy.yaml",
        )

    def _read_output(self) -> str:
        with contextlib.suppress(OSError), (self.folder / "output.log").open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
        return ""
