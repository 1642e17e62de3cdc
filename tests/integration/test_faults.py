"""What a client sees of a handler that fails, hangs, dies or eats memory; and who comes next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

# What it does is said by the request; its answer is the worker's process id.
SOURCE = """
import contextlib, os, resource, signal, sys, time
import torch
from batch_handler import BatchHandler

class Faulty(BatchHandler):
    def decode(self, part):
        word = part.read_text()
        getattr(self, "do_" + word, lambda: None)()
        return word

    def make_tensor(self, word):
        return torch.ones(2)

    def make_answer(self, output):
        return os.getpid()

    def do_raise(self): raise ValueError("no luck")
    def do_recurse(self): self.do_recurse()
    def do_hang(self): time.sleep(600)
    def do_leave(self): sys.exit(3)
    def do_vanish(self): os._exit(3)
    def do_crash(self): os.kill(os.getpid(), signal.SIGSEGV)
    def do_fall_to_the_kernel(self): os.kill(os.getpid(), signal.SIGKILL)  # as it ends the greedy

    def do_allocate(self):
        with self.limited_memory():
            kept = []
            while True:
                kept.append(bytearray(1 << 24))

    def do_allocate_tensors(self):
        with self.limited_memory():
            kept = []
            while True:
                kept.append(torch.empty(1 << 22))

    @contextlib.contextmanager
    def limited_memory(self):
        # 300 MB more than the process has; without a limit the machine would suffer.
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
"""
TIMEOUT = 2
"""Seconds until TorchServe gives up a silent worker."""


@pytest.fixture(scope="module")
def ask(
    server: TorchServe, connect: Callable[..., Any], pack_own: Callable[..., Path]
) -> Iterator[Callable[[str], Any]]:
    """Return a function that tells the handler what to do."""
    settings = {"batchSize": 1, "responseTimeout": TIMEOUT}
    network = torch.nn.Sequential(torch.nn.Linear(2, 1))
    archive = pack_own("faulty", "faulty.py", network, source=SOURCE, settings=settings)
    register(server.client, archive)
    send = connect(server)
    yield lambda word: send("/predictions/faulty", word, "text/plain")
    server.client.models.unregister("faulty", "1.0")
    (server.store / "faulty.mar").unlink()


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("raise", 500, "ValueError: no luck"),
        ("recurse", 500, "RecursionError"),
        ("allocate", 507, "MemoryError"),
        ("allocate_tensors", 507, "memory"),
    ],
)
def test_what_python_can_catch_is_a_problem_and_the_worker_goes_on(
    ask: Callable[[str], Any], server: TorchServe, fault: str, status: int, reason: str
) -> None:
    worker = ask("nothing").json()
    answer = ask(fault)
    assert (answer.status_code, answer.headers["Content-Type"]) == (
        status,
        "application/problem+json",
    )
    assert ask("nothing").json() == worker
    instance = answer.json()["instance"]
    record = find_record(server, instance)
    assert reason in record["reason"]
    assert record["request_id"] == answer.headers["x-request-id"]


def find_record(server: TorchServe, text: str) -> dict[str, Any]:
    """Return the line of the log that holds a text; the log may be behind the answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in server.log_file.read_text().splitlines():
            if text in line:
                record: dict[str, Any] = json.loads(json.loads(line)["message"])
                return record
        time.sleep(0.05)
    raise AssertionError(f"no line holds {text}")


@pytest.mark.parametrize(
    "fault",
    [
        "hang",
        "leave",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("vanish", "crash")),
        pytest.param("fall_to_the_kernel", marks=pytest.mark.slow),
    ],
)
def test_what_ends_a_worker_is_a_500_and_those_who_wait_are_answered_by_the_next(
    ask: Callable[[str], Any], fault: str
) -> None:
    worker = ask("nothing").json()
    with ThreadPoolExecutor(4) as pool:
        started = time.monotonic()
        failed = pool.submit(ask, fault)
        time.sleep(0.05)
        waiting = [pool.submit(ask, "nothing") for _ in range(3)]
        answer = failed.result()
        seconds = time.monotonic() - started
        others = [future.result() for future in waiting]
    # TorchServe's own words: the handler is not there any more to say anything. Where Java has seen
    # the exit status of a worker killed with SIGKILL in time, it takes that for the lack of memory.
    assert answer.status_code in ((500, 507) if fault == "fall_to_the_kernel" else (500,))
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "code": answer.status_code,
        "type": "InternalServerException",
        "message": "Worker died.",
    }
    assert seconds < TIMEOUT + 3
    assert {other.status_code for other in others} == {200}
    assert len({other.json() for other in others} - {worker}) == 1
