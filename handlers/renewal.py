"""Renewal in place: a worker that has grown starts afresh and loses no request.

TorchServe fails whatever a worker holds that it ends, and scaling down ends the newest worker,
never the one that grew. So a worker that is told to (SIGUSR2), or whose resident set is above
`renew_above_bytes`, replaces its own process image between two batches (os.execv) and keeps its
process id, its output and its connection. It loads the model again from what the frontend had told
it and reads on. The frontend sees one slower answer.

It looks before the first byte of a message is read: whatever waits is still in the kernel then, and
the new image reads it. What an image holds otherwise is lost: atexit functions do not run, child
processes are not waited for. A handler that cannot have that sets `renewal: false`. A worker that
cannot renew itself leaves SIGUSR2 alone, so that SigCgt in /proc/PID/status tells who can.

This file is also the program that the new image runs. docs/decisions/0015-renewal.md
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import fast_worker

__all__ = ["install", "main", "Renewal"]

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often an idle worker looks at its memory, and a busy one at most."""
REST = 10
"""A worker that renewed itself serves this many times as long as that took before it does again."""
RESPONSE_TIMEOUT = 120.0
"""Seconds a worker may be silent where model-config.yaml does not say (ts ModelConfig)."""
STATEFUL = ("asyncCommunication", "continuousBatching", "sequenceBatching", "parallelType")
"""Settings of TorchServe with which a worker is never between two batches, or is not alone."""
MEGABYTE = 1 << 20

LoadMessage = dict[str, Any]
"""What the frontend says when a model is to be loaded (ts/protocol/otf_message_handler.py)."""


def install(
    context: Any, *, above_bytes: int = 0, flush: Callable[[], None] = lambda: None
) -> bool:
    """Let this worker renew itself from its next batch on; return whether it will.

    Call it while the model is loaded. With `above_bytes` it also does so by itself once its
    resident set is larger. `flush` is called before the old image ends.

    Where that is not possible a line in the log says why; where there is no worker, nothing does.
    """
    worker: Any = sys.modules["__main__"]
    if not hasattr(worker, "TorchModelServiceWorker"):
        return False
    message = _find_load_message()
    if message is None:
        return False
    if obstacle := _find_obstacle(context.model_yaml_config or {}):
        _log.info("renewal is off: %s", obstacle)
        return False
    timeout = float((context.model_yaml_config or {}).get("responseTimeout") or RESPONSE_TIMEOUT)
    renewal = Renewal(message, above_bytes=above_bytes, flush=flush, timeout=timeout)
    service = importlib.import_module("ts.service").Service
    set_socket = service.set_cl_socket

    def take_over(self: Any, connection: socket.socket) -> None:
        """Take the connection: the model is loaded, and the frontend knows it."""
        set_socket(self, connection)
        if renewal.arm(connection):
            read = worker.retrieve_msg

            def read_next(connection: socket.socket) -> Any:
                renewal.wait()
                return read(connection)

            worker.retrieve_msg = read_next

    service.set_cl_socket = take_over
    return True


class Renewal:
    """A worker's readiness to renew itself: asked by a signal or its memory, done when it waits."""

    def __init__(
        self,
        message: LoadMessage,
        *,
        above_bytes: int = 0,
        flush: Callable[[], None] = lambda: None,
        timeout: float = RESPONSE_TIMEOUT,
    ) -> None:
        self._past: dict[str, Any] = message.get("renewal") or {}
        self._load = {key: _to_text(value) for key, value in message.items() if key != "renewal"}
        self._above_bytes = above_bytes
        self._flush = flush
        self._timeout = timeout
        self._wake = self._notify = -1
        self._is_fresh = True

    def arm(self, connection: socket.socket) -> bool:
        """Catch the signal from now on; return False where loading takes too long for it."""
        took = time.monotonic() - self._past["since"] if self._past else _read_age()
        if took >= self._timeout:
            _log.info("renewal is off: loading took %.0f s, responseTimeout is less", took)
            return False
        self._connection = connection
        self._wake, self._notify = os.pipe()
        os.set_blocking(self._notify, False)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._settle(took)
        signal.signal(signal.SIGUSR2, self._ask)
        return True

    def _settle(self, took: float) -> None:
        """Say how a renewal went, and judge the limit by what the model needs anyway."""
        resident = _read_resident()
        self._next_look = time.monotonic() + LOOK_SECONDS
        if self._past:
            _log.info(
                "renewed in place (%d): in %.1f s, resident set %d MB, before %d MB",
                self._past["count"],
                took,
                resident // MEGABYTE,
                self._past["resident"] // MEGABYTE,
            )
            if self._past["lock"] >= 0:
                os.close(self._past["lock"])
                self._next_look += REST * took
        if 0 < self._above_bytes <= resident:
            _log.warning(
                "renew_above_bytes is off: it is %d MB, the loaded model needs %d MB",
                self._above_bytes // MEGABYTE,
                resident // MEGABYTE,
            )
            self._above_bytes = 0

    def _ask(self, *_: object) -> None:
        # Only a note: the frame that was interrupted may be anywhere, also in a half-read message.
        with contextlib.suppress(BlockingIOError):
            os.write(self._notify, b"\0")

    def wait(self) -> None:
        """Return when the next message can be read; renew this worker first if it was asked to."""
        while True:
            # The time limit also bounds how late a signal is seen that came just before the call.
            ready = {number for number, _ in self._poll.poll(LOOK_SECONDS * 1000)}
            if self._is_fresh and self._connection.fileno() in ready:
                self._is_fresh = False
                return  # it has waited for one renewal, and is not to wait for another
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._renew()
            elif self._is_heavy():
                self._renew_alone()
            if self._connection.fileno() in ready:
                return

    def _is_heavy(self) -> bool:
        if not self._above_bytes or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_SECONDS
        return _read_resident() > self._above_bytes

    def _renew_alone(self) -> None:
        """Renew this worker unless another of this model is at it: they grow alike."""
        import fcntl  # here: there is none on Windows, where no worker gets so far

        with contextlib.suppress(OSError):  # the folder is locked, or gone: the next look comes
            lock = os.open(self._load["modelPath"], os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._renew(lock)
                self._above_bytes = 0  # it failed, and would again
            finally:
                os.close(lock)

    def _renew(self, lock: int = -1) -> None:
        """Become a new image of this worker; return only if that fails."""
        state = {
            "count": self._past.get("count", 0) + 1,
            "connection": self._connection.fileno(),
            "lock": lock,
            "since": time.monotonic(),
            "resident": _read_resident(),
        }
        try:
            self._flush()
            sys.stdout.flush()
            sys.stderr.flush()
            command = _make_command({"load": self._load, "renewal": state})
            # Ignored, for that outlives the exec: by default a second signal would end the process.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            with _inherited(self._connection.fileno(), *([lock] if lock >= 0 else [])):
                os.execv(command[0], command)
        except Exception as exc:  # whatever it is: the old image is whole, and goes on
            signal.signal(signal.SIGUSR2, self._ask)
            _log.error("renewal failed, the worker goes on as it is: %s", exc)


def main() -> None:
    """Go on as the worker that this process was, with a new image."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this file's folder, which the worker had further behind
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    # The worker's module, under the name it had: fast_worker looks for it there.
    module: Any = importlib.import_module("ts.model_service_worker")
    sys.modules["__main__"] = module
    state, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    args = module.ArgParser.model_service_worker_args().parse_args(arguments)
    try:
        connection = socket.socket(fileno=state["renewal"]["connection"])
        connection.set_inheritable(False)
        worker = module.TorchModelServiceWorker(
            args.sock_type, args.sock_name, args.host, args.port, args.metrics_config
        )
        _serve(module, worker, connection, state)
    except Exception:
        _log.error("Backend worker process died.", exc_info=True)  # TorchServe's own last words
    finally:
        if args.sock_type == "unix":
            Path(args.sock_name).unlink(missing_ok=True)
    sys.exit(1)


def _serve(module: Any, worker: Any, connection: socket.socket, state: Mapping[str, Any]) -> None:
    """Load the model and answer batches, as TorchModelServiceWorker.handle_connection does.

    That one would wait for the frontend to say what to load, and answer it.
    """
    load = state["load"]
    message = {k: v.encode() if isinstance(v, str) else v for k, v in load.items()}
    service, result, code = worker.load_model({**message, "renewal": state["renewal"]})
    if code != 200:
        raise RuntimeError(f"{code} - {result}")
    service.set_cl_socket(connection)
    while True:
        command, batch = module.retrieve_msg(connection)
        if command != b"I":
            raise ValueError(f"expected a batch from the frontend, found command {command!r}")
        connection.sendall(service.predict(batch))


def _find_load_message() -> LoadMessage | None:
    """Return what the frontend said; only the frame of load_model, which called us, holds it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "load_model" and "load_model_request" in frame.f_locals:
            return dict(frame.f_locals["load_model_request"])
        frame = frame.f_back
    return None


def _find_obstacle(config: Mapping[str, Any]) -> str:
    """Return why this worker cannot renew itself; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if unknown := fast_worker.find_unknown("model_service_worker", "service"):
        return f"not TorchServe 0.12.0's own: {', '.join(unknown)}"
    if stateful := [key for key in STATEFUL if config.get(key)]:
        return f"{stateful[0]} is set"
    if "LOCAL_RANK" in os.environ:
        return "torchrun started this worker"
    if threading.current_thread() is not threading.main_thread():
        return "signals reach the main thread only"
    if signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, signal.SIG_IGN):
        return "the handler uses SIGUSR2 itself"
    return ""


def _make_command(state: Mapping[str, Any]) -> list[str]:
    """Return the command line of the new image: as this one was started, but for the program."""
    flags = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    past = 2 if Path(sys.argv[0]).name == Path(__file__).name else 1
    arguments = sys.argv[past:]
    return [sys.executable, *flags, os.path.realpath(__file__), json.dumps(state), *arguments]


@contextlib.contextmanager
def _inherited(*kept: int) -> Iterator[None]:
    """Let the new image have some descriptors, and no others but the standard ones.

    Python's own close by themselves; those of C libraries, CUDA's among them, may not.
    """
    numbers = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    for number in numbers:
        if number > 2:
            with contextlib.suppress(OSError):  # the one that listed them
                os.set_inheritable(number, number in kept)
    try:
        yield
    finally:
        for number in kept:
            os.set_inheritable(number, False)


def _to_text(value: Any) -> Any:
    return bytes(value).decode() if isinstance(value, (bytes, bytearray)) else value


def _read_resident() -> int:
    """Return this process's resident set in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _read_age() -> float:
    """Return the seconds since this process was started."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(stat[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


if __name__ == "__main__":
    main()
