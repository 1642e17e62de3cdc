"""How a trial ended: why a worker could not load the model, died, or never came to an end."""

from __future__ import annotations

import linecache
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.requirements import Requirements, name_requirement
from marwright.archive.checks.trial import Trial

__all__ = ["DIED", "find_place", "judge_ending", "RULES"]

LOADING = Rule(
    "W501",
    Severity.ERROR,
    "a worker cannot load the model",
    "mend the handler or the weights and pack again",
)
MISSING = Rule(
    "W502",
    Severity.ERROR,
    "a module is missing",
    "add what brings it to --requirements-file, or pack the module",
)
DIED = Rule(
    "W503",
    Severity.ERROR,
    "the worker died",
    "mend the handler: no request and no model may end the process",
)
HANGS = Rule(
    "W504",
    Severity.ERROR,
    "the worker did not come to an end",
    "mend the handler, or give it more time: --timeout",
)
UNTRIED = Rule(
    "W505",
    Severity.WARNING,
    "this machine cannot try the handler",
    "install here what the server has, and check again",
)
RULES = (LOADING, MISSING, DIED, HANGS, UNTRIED)

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')
_OURS = ("/marwright/archive/", "/ts/model_loader.py", "/ts/service.py", "/importlib/__init__.py")
LAST_LINES = 10
"""Of what the handler printed, shown where nothing else tells why it died."""


def judge_ending(trial: Trial, folder: Path, requirements: Requirements) -> Iterator[Finding]:
    """Yield why a trial did not come to its end, if it did not."""
    if (failed := trial.find("failed")) is not None:
        yield _judge_failure(failed, folder, requirements)
    elif trial.find("done") is None:
        doing = (trial.find("step") or {"name": "starting"})["name"]
        rule = HANGS if trial.has_timed_out else DIED
        member, line, stack = _read_stack(trial.stack, folder)
        last = trial.output.splitlines()[-LAST_LINES:]
        yield rule.at(
            f"{_describe_end(trial)} while {doing}",
            member=member,
            line=line,
            detail=stack or "\n".join(last),
        )


def find_place(place: str, folder: Path) -> tuple[str, int | None]:
    """Return member and line of `handler.py:12`; nothing where that stands outside the archive."""
    name, _, line = place.rpartition(":")
    if name and line.isdecimal() and (folder / name).is_file():
        return name, int(line)
    return "", None


def _judge_failure(failed: dict[str, Any], folder: Path, requirements: Requirements) -> Finding:
    """Judge an exception of the import or of initialize."""
    if failed.get("is_refusal"):
        return UNTRIED.at(failed["message"])
    member, line = find_place(failed["place"], folder)
    where = "" if member or not failed["place"] else f" at {failed['place']}"
    rule, remedy = _choose_rule(failed, folder, requirements)
    return rule.at(
        f"{failed['message']}{where}",
        member=member,
        line=line,
        detail=failed["traceback"],
        remedy=remedy,
    )


def _choose_rule(
    failed: dict[str, Any], folder: Path, requirements: Requirements
) -> tuple[Rule, str]:
    """Tell what the archive lacks from what only this machine lacks; return a remedy with it."""
    module = (failed["missing"] or "").split(".")[0]
    requirement = name_requirement(module)
    if failed["is_torchserves"]:
        return UNTRIED, f"pip install {requirement}, here and for the server" if module else ""
    if not module or (folder / module).is_dir():
        return LOADING, ""
    if requirements.bring(module) is not False:
        return UNTRIED, f"install {requirement} here, and check again"
    return MISSING, f"add {requirement} to --requirements-file, or pack {module}.py"


def _describe_end(trial: Trial) -> str:
    if trial.has_timed_out:
        return "the time limit passed"
    status = trial.status or 0
    if status >= 0:
        return f"the process ended itself with exit status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = ", as the system does where memory is short," if name == "SIGKILL" else ""
    return f"the process was ended by {name}{hint}"


def _read_stack(stack: str, folder: Path) -> tuple[str, int | None, str]:
    """Return the handler's innermost frame and the stack around it, as a traceback is written.

    faulthandler writes threads one after the other, each innermost frame first, the main one last.
    """
    threads = [
        [match.groupdict() for match in map(_FRAME.match, block.splitlines()) if match]
        for block in re.split(r"\n\s*\n", stack)
    ]
    root = f"{folder.resolve()}/"
    for frames in reversed(threads):
        own = [frame for frame in frames if frame["file"].startswith(root)]
        if own:
            lines = [_write_frame(frame, root) for frame in reversed(frames)]
            member = own[0]["file"].removeprefix(root)
            text = "\n".join(["Stack (most recent call last):", *filter(None, lines)])
            return member, int(own[0]["line"]), text
    return "", None, ""


def _write_frame(frame: dict[str, str], root: str) -> str:
    """Return a frame as tracebacks show it; nothing for frames of whoever called the handler."""
    file = frame["file"]
    if not file.startswith(root) and any(part in file for part in _OURS):
        return ""
    text = linecache.getline(file, int(frame["line"])).strip()
    name = file.removeprefix(root)
    head = f'  File "{name}", line {frame["line"]}, in {frame["function"]}'
    return f"{head}\n    {text}" if text else head
