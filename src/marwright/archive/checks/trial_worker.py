"""The program of a trial: a worker that answers the batches of a plan and tells how it went.

    python trial_worker.py EVENTS STACK < plan.json

EVENTS and STACK are file descriptors: of a pipe, which gets one JSON object a line, and of a file,
which gets the Python stack at the time limit or at a crash. It is a program and no module of the
toolkit: what a worker imports has to be found on a worker's path, before anything of ours.
"""

from __future__ import annotations

import base64
import faulthandler
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marwright.archive.worker import Answer, Model, Request

MAX_RANDOM_BYTES = 4096
MAX_TOLD_BYTES = 4 << 20
"""Of an answer's body; of a longer one the digest is told."""
OPTIONAL_SHARE = 0.5
"""Of the time limit; what is optional is left out after it."""


def main(arguments: list[str]) -> None:
    """Run the plan on standard input."""
    events, stack = (int(argument) for argument in arguments)
    for descriptor in (events, stack):
        os.set_inheritable(descriptor, False)
    teller = Teller(events)
    plan = json.load(sys.stdin)
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(plan["timeout"], exit=True, file=stack)
    teller.tell("step", name="importing TorchServe")
    prepare_imports(plan)
    model = load_model(plan, teller)
    if model is not None and answer_batches(model, plan, teller):
        teller.tell("done")
    os._exit(0)  # nothing is left to do: neither torch's end nor the handler's is awaited


class Teller:
    """Tells the parent what happens."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the program began."""
        return time.monotonic() - self._started

    def tell(self, event: str, **facts: Any) -> None:
        """Write one line; it is with the parent whatever happens next."""
        facts = {"event": event, "memory_bytes": read_peak_memory(), **facts}
        line = json.dumps(facts).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]


def prepare_imports(plan: dict[str, Any]) -> None:
    """Import TorchServe as ts/model_service_worker.py does, and the toolkit from its own place."""
    own = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != own]
    import ts.arg_parser
    import ts.async_service
    import ts.model_loader  # noqa: F401  they bring torch, from wherever a worker would find it

    workers_path = sys.path[:]
    # A member of the archive named marwright must not come before.
    sys.path[:] = [plan["marwright"], *(entry for entry in workers_path if entry != plan["folder"])]
    import marwright.archive.worker  # noqa: F401

    sys.path[:] = workers_path


def load_model(plan: dict[str, Any], teller: Teller) -> Model | None:
    """Import the handler and call its initialize; tell how long that took, or why it failed."""
    from marwright.archive.worker import Model

    teller.tell("step", name="loading")
    try:
        model = Model(Path(plan["folder"]))
    except BaseException as exc:
        teller.tell("failed", **describe(exc, plan["folder"]))
        return None
    teller.tell(
        "loaded",
        seconds=teller.seconds,
        import_seconds=model.import_seconds,
        initialize_seconds=model.initialize_seconds,
    )
    return model


def answer_batches(model: Model, plan: dict[str, Any], teller: Teller) -> bool:
    """Send the batches, and tell all answers; return whether the model lived through them."""
    bodies = [Path(name).read_bytes() for name, _ in plan["samples"]]
    for requests, is_optional in plan["batches"]:
        if is_optional and teller.seconds > OPTIONAL_SHARE * plan["timeout"]:
            teller.tell("left_out")
            break
        teller.tell("step", name=f"answering a batch of {len(requests)}", requests=requests)
        inputs = [
            make_request(bodies[number], plan["samples"][number][1], kind)
            for number, kind in requests
        ]
        try:
            answers = model.predict(inputs)
        except BaseException as exc:  # it died of the batch before, and does not load again
            teller.tell("failed", **describe(exc, plan["folder"]))
            return False
        teller.tell(
            "answered", requests=requests, answers=[encode_answer(answer) for answer in answers]
        )
    return True


def make_request(body: bytes, content_type: str | None, kind: str) -> Request:
    """Return a sample's request, whole or broken in one of three ways."""
    from marwright.archive.worker import Request

    if kind == "empty":
        body = b""
    elif kind == "cut":
        body = body[: len(body) // 2]
    elif kind == "random":
        body = random.Random(0).randbytes(min(max(len(body), 64), MAX_RANDOM_BYTES))
    return Request(body, content_type=content_type)


def encode_answer(answer: Answer) -> dict[str, Any]:
    """Return an answer as JSON can carry it."""
    body = answer.body
    if len(body) > MAX_TOLD_BYTES:
        body = b"sha256:" + hashlib.sha256(body).hexdigest().encode()
    return {
        "status": answer.status,
        "body": base64.b64encode(body).decode(),
        "seconds": answer.seconds,
        "failure": vars(answer.failure) if answer.failure else None,
    }


def describe(error: BaseException, folder: str) -> dict[str, Any]:
    """Return why a worker could not load the model."""
    from marwright.archive.worker.trace import describe as describe_trace
    from marwright.errors import HandlerError, MarwrightError

    if isinstance(error, MarwrightError) and not isinstance(error, HandlerError):
        return {"message": str(error), "is_refusal": True}
    cause = error.__cause__ if isinstance(error, HandlerError) and error.__cause__ else error
    trace = describe_trace(cause, [folder])
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    return {
        "message": trace.reason,
        "place": trace.place,
        "traceback": trace.text,
        "missing": missing,
        "is_torchserves": _is_torchserves(cause, folder),
    }


def _is_torchserves(error: BaseException, folder: str) -> bool:
    """Whether one of TorchServe's own handlers could not be imported, not the archive's."""
    is_torchserves = False
    entry = error.__traceback__
    while entry is not None:
        code = entry.tb_frame.f_code
        if f"{os.sep}ts{os.sep}torch_handler{os.sep}" in code.co_filename:
            is_torchserves = code.co_name == "<module>"
        elif code.co_filename.startswith(folder):
            is_torchserves = False
        entry = entry.tb_next
    return is_torchserves


def read_peak_memory() -> int:
    """Return the most memory that this process had at once.

    On Linux ru_maxrss begins with what the parent had: it outlives execve, VmHWM does not.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
