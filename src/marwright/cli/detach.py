"""`marwright serve --detach`: the same command in the background, in a session of its own."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

import typer

from marwright.cli.output import print_json, print_table, say
from marwright.errors import NotReadyError

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
        facts = _read_facts(process.stdout, timeout)
        if facts is None:
            process.terminate()
            process.wait()
            errors.seek(0)
            sys.stderr.write(errors.read() if as_json else _render_errors(errors.read()))
            raise typer.Exit(1)
    facts["pid"] = process.pid
    process.returncode = 0  # it is not waited for: it outlives this process
    _wait_until_ready(facts, timeout)
    if as_json:
        print_json(facts)
    else:
        shown = {key: value for key, value in facts.items() if key != "adopted"}
        print_table(["", ""], [[key.replace("_", " "), value] for key, value in shown.items()])
        say(f"serving in the background; marwright stop {facts['server']} ends it")


def _read_facts(stdout: IO[str], timeout: float) -> dict[str, Any] | None:
    """Return the line that a serving server prints; None where it ended, or took too long."""
    ready, _, _ = select.select([stdout], [], [], timeout)
    line = stdout.readline() if ready else ""
    return json.loads(line) if line else None


def _render_errors(text: str) -> str:
    """Return what a process with --json wrote, for people."""
    start = text.find("{\n")
    try:
        error = json.loads(text[start:])
    except ValueError:
        return text
    facts = ("message", "found", "remedy")
    line = "; ".join(error[key] for key in facts if error.get(key))
    return f"{text[:start]}error: {line}\n" + "".join(
        f"    {detail}\n" for detail in error.get("detail", "").splitlines()
    )


def _wait_until_ready(facts: dict[str, Any], timeout: float) -> None:
    from marwright.server.inspection import fetch_status
    from marwright.server.status import UNANSWERED

    deadline = time.monotonic() + timeout
    while True:
        status = fetch_status(facts["health"]) or {}
        if status.get("ready"):
            return
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
