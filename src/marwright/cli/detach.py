"""`marwright serve --detach`: the same command in the background, in a session of its own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

import typer

from marwright.cli.output import print_error, print_json, say
from marwright.cli.serve import print_facts
from marwright.errors import MarwrightError, NotReadyError, ServerDiedError

__all__ = ["start_detached"]


def start_detached(*, as_json: bool, timeout: float) -> None:
    """Start the command again without --detach, and return once its server is ready.

    Raises:
        NotReadyError: it serves, but not all that is wanted; it goes on.
        Exit: it did not start, and has said why.
    """
    words = [word for word in sys.argv[1:] if word != "--detach"]
    words += [] if "--json" in words else ["--json"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "marwright", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
        )
        assert process.stdout is not None  # it is a pipe
        with process.stdout as stdout:
            facts = _read_facts(stdout, timeout)
        if facts is None:
            process.terminate()
            status: int | None = process.wait()
        else:
            facts["pid"] = process.pid
            try:
                status = _wait_until_ready(process, facts, timeout)
            finally:
                if process.returncode is None:
                    process.returncode = 0  # it is not waited for: it outlives this process
                    _pass_on(errors)
        if facts is None or status is not None:
            errors.seek(0)
            _tell_end(errors.read(), status, as_json=as_json)
            raise typer.Exit(1)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)
        say(f"serving in the background; marwright stop {facts['server']} ends it")


def _read_facts(stdout: IO[str], timeout: float) -> dict[str, Any] | None:
    """Return the line that a serving server prints; None where it ended, or took too long."""
    ready, _, _ = select.select([stdout], [], [], timeout)
    line = stdout.readline() if ready else ""
    return json.loads(line) if line else None


def _pass_on(errors: IO[str]) -> None:
    """Say what the command, which goes on, said until it served, such as warnings."""
    text = os.pread(errors.fileno(), os.fstat(errors.fileno()).st_size, 0)  # it shares the offset
    sys.stderr.write(text.decode(errors="replace"))


def _tell_end(text: str, status: int | None, *, as_json: bool) -> None:
    """Say why the process ended; `text` is what it said with --json."""
    start = f"\n{text}".rfind("\n{\n")
    try:
        said = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        said = None
    sys.stderr.write(text[:start] if said else text)
    if said is None:
        error: MarwrightError = ServerDiedError(
            "the server ended before it was ready", found=f"exit status {status}"
        )
    elif as_json:
        sys.stderr.write(text[start:])
        return
    else:
        facts = ("message", "expected", "found", "remedy", "detail")
        error = MarwrightError(**{key: said[key] for key in facts if key in said})
    print_error(error, as_json=as_json)


def _wait_until_ready(
    process: subprocess.Popen[str], facts: dict[str, Any], timeout: float
) -> int | None:
    """Return None once the server is ready, or the exit status where its supervisor has ended."""
    from marwright.server.registry import list_records
    from marwright.server.supervision.inspection import fetch_status
    from marwright.server.supervision.status import UNANSWERED

    deadline = time.monotonic() + timeout
    record = list_records().get(facts["server"])
    while True:
        status = fetch_status(facts["health"], record.key if record else "") or {}
        if status.get("ready"):
            return None
        if process.poll() is not None:
            return process.returncode
        lacking = [item for item in status.get("models", ()) if item["problem"]]
        broken = [item for item in lacking if item["problem"] != UNANSWERED]
        if broken or time.monotonic() > deadline:
            problems = [f"{item['name']} {item['version']}: {item['problem']}" for item in lacking]
            raise NotReadyError(
                f"the server {facts['server']} serves, but is not ready",
                found="; ".join(problems) or "no answer",
                remedy=f"it goes on; end it: marwright stop {facts['server']}",
                detail="\n".join(filter(None, (item["detail"] for item in broken))),
            )
        time.sleep(0.1)
