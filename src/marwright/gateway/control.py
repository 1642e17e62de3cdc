"""Releases that are led from another machine: what its words make this site do.

Who leads puts an archive into the gateway's uploads (control_routes.py), has it checked, and has a
release begun; then says a word about every second, which is answered with how the release stands.
The release runs in a process of its own, as one that is made here; a word is a line on its standard
input, and where none comes for its lease, it takes itself back (release/lead.py).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from marwright.archive.digests import digest_stream
from marwright.errors import MarwrightError, NotReadyError, ReleaseError, UsageError
from marwright.gateway.control_routes import DIGEST, UPLOADS
from marwright.gateway.traffic import NAME
from marwright.storage import translate_os_errors

__all__ = ["Control", "State"]

CHECK_SECONDS = 120.0
END_SECONDS = 90.0
"""How long a release may take to go back when its site is stopped."""
ARCHIVE = rf"^{NAME}[.]mar$"

State = dict[str, Any]
"""running; lines: what was decided since those that were seen; ended: how, and error: why."""


class _Asked(BaseModel):
    """What is asked, of one archive."""

    model_config = ConfigDict(extra="forbid", strict=True)

    archive: str = Field(pattern=ARCHIVE, max_length=200)
    digest: str = Field(pattern=f"^{DIGEST}$")


class _Begin(_Asked):
    lease: float = Field(ge=1, le=3600)


class _Word(_Asked):
    model: str = Field(pattern=f"^{NAME}$", max_length=200)
    word: Literal["stay", "move", "keep", "back"]
    reason: str = Field(default="", max_length=2000)
    seen: int = Field(default=0, ge=0)


class Control:
    """What a site does for who leads releases from elsewhere; one release at a time.

    Each operation takes what a request's JSON says, and raises UsageError where that is not
    understood.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name = ""
        self._uploads: Path | None = None
        self._errand: _Errand | None = None
        self.answers = {
            "/control/check": self.check,
            "/control/begin": self.begin,
            "/control/say": self.say,
        }

    @contextlib.contextmanager
    def open(self, folder: Path, name: str) -> Iterator[None]:
        """Take orders for a site until the block ends; a release then goes back before that."""
        self._uploads, self._name = folder / UPLOADS, name
        try:
            yield
        finally:
            with self._lock:
                if self._errand is not None:
                    self._errand.end()

    def check(self, asked: Any) -> Any:
        """Return the candidate that an archive would be: `marwright release --check --json`.

        Raises:
            ReleaseError: all that speaks against it; or another file was uploaded.
        """
        wanted = _read(_Asked, asked)
        path = self._find(wanted)
        self._remove_others(wanted)
        try:
            done = subprocess.run(
                _write_command(["release", path, "--to", self._name, "--check", "--json"]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=CHECK_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise ReleaseError(f"it was not checked within {CHECK_SECONDS:g} s") from exc
        if done.returncode:
            raise _read_error(done.stderr)
        return json.loads(done.stdout)

    def begin(self, asked: Any) -> State:
        """Begin a release in a process of its own, of what was checked.

        Each of its lines has the digest of the archive that it found.

        Raises:
            ReleaseError: one is being made.
        """
        wanted = _read(_Begin, asked)
        with self._lock:
            if self._errand is not None and self._errand.is_running:
                raise ReleaseError(
                    "another release is being made", found=self._errand.wanted.archive
                )
            command = ["release", str(self._place(wanted)), "--to", self._name, "--json"]
            self._errand = _Errand(wanted, [*command, f"--lease={wanted.lease}"])
            return self._errand.tell(0)

    def say(self, asked: Any) -> State:
        """Pass a word on, and return how the release stands.

        "back" also undoes a release that was finished, if it was the last one.
        """
        wanted = _read(_Word, asked)
        self._place(wanted)
        with self._lock:
            errand = self._errand
            if errand is None or errand.wanted.digest != wanted.digest:
                errand = None
            if wanted.word == "back" and (errand is None or errand.ended in {"released", "failed"}):
                errand = self._errand = _Errand(wanted, self._write_return(wanted))
            if errand is None:
                raise ReleaseError(f"no release of {wanted.archive} is being made")
            if errand.is_running:
                errand.pass_on(wanted.word, wanted.reason)
            else:
                shutil.rmtree(self._place(wanted).parent, ignore_errors=True)
                if errand.ended == "stuck":  # tried again when it is asked for again
                    self._errand = None
            return errand.tell(wanted.seen)

    def _write_return(self, wanted: _Word) -> list[str]:
        command = ["rollback", wanted.model, "--to", self._name, "--json"]
        return [*command, f"--digest={wanted.digest}", f"--reason={_fold(wanted.reason)}"]

    def _place(self, wanted: _Asked) -> Path:
        """Return where an uploaded archive lies; raises NotReadyError before there is any."""
        if self._uploads is None:
            raise NotReadyError("the site has not begun yet")
        return self._uploads / wanted.digest / wanted.archive

    def _find(self, wanted: _Asked) -> str:
        """Return where an uploaded archive lies; raises ReleaseError where it is another one."""
        path = self._place(wanted)
        with translate_os_errors(f"read {wanted.archive}"), path.open("rb") as stream:
            found = digest_stream(stream)
        if found != wanted.digest:
            raise ReleaseError(
                f"another {wanted.archive} was uploaded", expected=wanted.digest, found=found
            )
        return str(path)

    def _remove_others(self, wanted: _Asked) -> None:
        """Remove what was put here before, and came to nothing."""
        folder = self._place(wanted).parent
        with self._lock:
            running = self._errand is not None and self._errand.is_running
            for other in folder.parent.iterdir() if not running else ():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)


class _Errand:
    """One command of marwright that runs for who leads."""

    def __init__(self, wanted: _Asked, command: list[str]) -> None:
        self.wanted = wanted
        self._returns = command[0] == "rollback"
        self._lines: list[Any] = []
        self._process = subprocess.Popen(
            _write_command(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the site's, which then says "back"
        )
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read_lines, self._read_errors)
        ]
        self._errors = ""
        for thread in self._threads:
            thread.start()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None or any(thread.is_alive() for thread in self._threads)

    @property
    def ended(self) -> str:
        """How it ended: "released" or "returned"; "" while it runs.

        "failed" is a release that stands open, "stuck" a way back that did not work.
        """
        if self.is_running:
            return ""
        if self._returns:
            return "stuck" if self._process.returncode else "returned"
        if self._process.returncode == 0:
            return "released"
        events = [line["event"] for line in self._lines]
        return "returned" if events[-1:] in ([], ["returned"]) else "failed"

    def tell(self, seen: int) -> State:
        state: State = {"running": self.is_running, "ended": self.ended}
        state["lines"] = self._lines[seen:]
        if not state["running"] and self._process.returncode:
            state["error"] = _read_error(self._errors).to_json()
        return state

    def pass_on(self, word: str, reason: str) -> None:
        if self._returns:
            return
        assert self._process.stdin is not None  # it is a pipe
        with contextlib.suppress(OSError):  # it ends just now
            self._process.stdin.write(f"{word} {_fold(reason)}\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Take the release back, and wait for that."""
        if self.is_running:
            self.pass_on("back", "its site was stopped")
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        if self._returns:
            self._process.stdout.read()
            return
        for text in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._lines.append(json.loads(text))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors = self._process.stderr.read()


def _write_command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "marwright", *words]


def _read(form: type[Any], asked: Any) -> Any:
    """Return what is asked; raises UsageError where it is not understood."""
    try:
        return form.model_validate(asked)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"not understood: {where}", found=first["msg"]) from exc


def _read_error(text: str) -> MarwrightError:
    """Return the error that a command of marwright has printed, last of all."""
    with contextlib.suppress(ValueError, KeyError, TypeError):  # it was killed before
        return ReleaseError.from_json(json.loads(text[text.rindex("{\n") :]))
    return ReleaseError("the release was cut off", found=text.strip()[-200:])


def _fold(text: str) -> str:
    """Return a text in one line."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", text).strip()
