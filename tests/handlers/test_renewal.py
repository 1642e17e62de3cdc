"""The renewal of a worker: what it waits for, what it keeps, and when it lets it be."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Import = Callable[[str], Any]

# ts leaves its version file open when imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renewal needs Linux"),
]

HANDLER = """
import os, time

import renewal

STATE = []

class Small:
    def initialize(self, context):
        plan = os.path.join(context.system_properties["model_dir"], "plan")
        with open(plan) as file:
            exec(file.read())
        self.installed = renewal.install(
            context, above_bytes=int(os.environ.get("ABOVE", "0")), flush=self.flush
        )

    def flush(self):
        print("flushed", flush=True)

    def handle(self, data, context):
        answers = []
        for row in data:
            word = bytes(row["body"]).decode()
            if word == "slow":
                time.sleep(1)
            elif word == "grow":
                STATE.append(bytearray(b"x") * (64 << 20))
            elif word == "break":
                renewal.sys.executable = "/nowhere/python"
            STATE.append(word)
            answers.append(f"{os.getpid()} {len(STATE)}")
        return answers
"""


def pack(*values: bytes) -> bytes:
    return b"".join(len(value).to_bytes(4, "big") + value for value in values)


END = b"\xff\xff\xff\xff"


class Frontend:
    """A real worker of TorchServe's, and this end of its connection."""

    def __init__(self, folder: Path, handlers: Path, *, tcp: bool = False, **env: str) -> None:
        self.folder = folder
        (folder / "small.py").write_text(HANDLER, encoding="utf-8")
        (folder / "plan").touch()
        import ts

        home = Path(ts.__file__).parent
        if tcp:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                address: Any = probe.getsockname()
            where = ["--sock-type", "tcp", "--host", "127.0.0.1", "--port", str(address[1])]
        else:
            address = str(folder / "s.9000")
            where = ["--sock-type", "unix", "--sock-name", address]
        paths = os.pathsep.join(map(str, (home.parent, folder, handlers)))
        self.output = folder / "output"
        with self.output.open("wb") as stream:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", str(home / "model_service_worker.py")),
                    *where,
                    *("--metrics-config", str(home / "configs" / "metrics.yaml")),
                ],
                env={**os.environ, "PYTHONPATH": paths, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.wait_for("Torch worker started.")
        self.connection = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self.connection.settimeout(60)
        self.connection.connect(address)

    def load(self) -> None:
        folder = str(self.folder).encode()
        message = b"L" + pack(b"m", folder) + (1).to_bytes(4, "big") + pack(b"small.py")
        self.connection.sendall(message + END + pack(b"") + b"\0")
        assert self.read_answer().startswith(b"\0\0\0\xc8")

    def send(self, word: bytes) -> None:
        request = pack(b"id") + END + pack(b"body", b"", word) + END
        self.connection.sendall(b"I" + request + END)

    def read_answer(self) -> bytes:
        content = b""
        while not content.endswith(END):
            piece = self.connection.recv(1 << 16)
            assert piece, self.text
            content += piece
        return content

    def ask(self, word: bytes = b"x") -> list[int]:
        """Return the worker's process id, and how many words its image has had."""
        self.send(word)
        return self.read_numbers()

    def read_numbers(self) -> list[int]:
        body = self.read_answer()[:-4].rpartition(b"\0")[2]
        return [int(number) for number in body[1:].split()]

    def signal(self) -> None:
        os.kill(self.process.pid, signal.SIGUSR2)

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    @property
    def is_catching(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        (caught,) = (line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGUSR2 - 1) & 1)

    def wait_for(self, text: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None, self.text
            time.sleep(0.02)

    def wait_until_armed(self) -> None:
        deadline = time.monotonic() + 60
        while not self.is_catching:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def close(self) -> None:
        self.connection.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def begin(tmp_path: Path, root: Path) -> Iterator[Callable[..., Frontend]]:
    """Return a function that starts a worker with its model loaded."""
    started: list[Frontend] = []

    def begin_worker(*, tcp: bool = False, armed: bool = True, **env: str) -> Frontend:
        frontend = Frontend(tmp_path, root / "handlers", tcp=tcp, **env)
        started.append(frontend)
        frontend.load()
        if armed:
            frontend.wait_until_armed()
        return frontend

    yield begin_worker
    for frontend in started:
        frontend.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_an_idle_worker_acts_at_once_and_keeps_its_process_and_connection(
    begin: Callable[..., Frontend], tcp: bool
) -> None:
    frontend = begin(tcp=tcp)
    pid = frontend.process.pid
    assert [frontend.ask(), frontend.ask()] == [[pid, 1], [pid, 2]]
    frontend.signal()
    frontend.wait_for("renewed in place (1)")
    assert [frontend.ask(), frontend.ask()] == [[pid, 1], [pid, 2]]
    frontend.signal()
    frontend.wait_for("renewed in place (2)")
    assert frontend.ask() == [pid, 1]
    assert frontend.text.count("flushed") == 2
    frontend.connection.close()
    assert frontend.process.wait(30) == 0  # "Frontend disconnected."


def test_a_batch_in_work_is_answered_first_and_one_that_waits_by_the_new_image(
    begin: Callable[..., Frontend],
) -> None:
    frontend = begin()
    pid = frontend.process.pid
    assert frontend.ask() == [pid, 1]
    frontend.send(b"slow")
    time.sleep(0.3)
    for _ in range(3):  # more signals than one are one wish
        frontend.signal()
    assert frontend.read_numbers() == [pid, 2]
    assert frontend.ask() == [pid, 1]
    frontend.wait_for("renewed in place (1)")
    assert "renewed in place (2)" not in frontend.text


def test_a_batch_that_has_waited_for_one_renewal_does_not_wait_for_two(
    handlers: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ours, theirs = socket.socketpair()
    renewal = handlers("renewal").Renewal({}, timeout=1e9)
    monkeypatch.setattr(renewal, "_renew", lambda: asked.append("renewal"))
    before = signal.getsignal(signal.SIGUSR2)
    with ours, theirs:
        try:
            assert renewal.arm(ours)
            theirs.send(b"x")
            os.kill(os.getpid(), signal.SIGUSR2)
            renewal.wait()
            assert asked == []
            renewal.wait()
            assert asked == ["renewal"]
        finally:
            signal.signal(signal.SIGUSR2, before)
            os.close(renewal._wake)
            os.close(renewal._notify)


def test_signals_while_the_model_is_loaded_again_do_no_harm(
    begin: Callable[..., Frontend],
) -> None:
    frontend = begin()
    frontend.folder.joinpath("plan").write_text("time.sleep(1); print('loading', flush=True)")
    frontend.signal()
    while frontend.is_catching:
        time.sleep(0.01)
    frontend.send(b"x")
    while not frontend.is_catching:
        assert frontend.process.poll() is None
        frontend.signal()
        time.sleep(0.05)
    assert frontend.read_numbers()[0] == frontend.process.pid
    assert frontend.ask()[0] == frontend.process.pid


def test_an_exec_that_fails_leaves_the_old_image_serving(begin: Callable[..., Frontend]) -> None:
    frontend = begin()
    pid = frontend.process.pid
    assert frontend.ask(b"break") == [pid, 1]
    frontend.signal()
    frontend.wait_for("renewal failed, the worker goes on as it is: [Errno 2]")
    assert frontend.ask() == [pid, 2]
    assert frontend.is_catching


def test_a_model_that_cannot_be_loaded_again_ends_the_worker(
    begin: Callable[..., Frontend],
) -> None:
    frontend = begin()
    frontend.folder.joinpath("plan").write_text("raise ValueError('gone')")
    frontend.signal()
    assert frontend.process.wait(60) == 1
    assert "ValueError: gone" in frontend.text
    assert "Backend worker process died." in frontend.text
    assert not frontend.folder.joinpath("s.9000").exists()


def test_a_worker_above_its_limit_renews_itself_when_no_other_does(
    begin: Callable[..., Frontend],
) -> None:
    frontend = begin()
    limit = read_resident(frontend.process.pid) + (40 << 20)
    frontend.close()
    frontend = begin(ABOVE=str(limit))
    pid = frontend.process.pid
    lock = os.open(frontend.folder, os.O_RDONLY)  # as another worker of this model holds it
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert frontend.ask(b"grow") == [pid, 2]
    time.sleep(2.2)
    assert frontend.ask() == [pid, 3]
    os.close(lock)
    frontend.wait_for("renewed in place (1)")
    assert frontend.ask() == [pid, 1]
    assert read_resident(pid) < limit
    lock = os.open(frontend.folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the new image let it go
    os.close(lock)


def read_resident(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_below_what_the_model_needs_is_said_and_left_alone(
    begin: Callable[..., Frontend],
) -> None:
    frontend = begin(ABOVE="1")
    frontend.wait_for("renew_above_bytes is off: it is 0 MB, the loaded model needs")
    frontend.ask()
    time.sleep(1.2)
    assert frontend.ask() == [frontend.process.pid, 2]


def test_a_worker_that_cannot_renew_itself_says_why_and_does_not_take_the_signal(
    begin: Callable[..., Frontend], tmp_path: Path
) -> None:
    tmp_path.joinpath("plan").write_text("context.model_yaml_config['sequenceBatching'] = True")
    frontend = begin(armed=False)
    frontend.wait_for("renewal is off: sequenceBatching is set")
    assert frontend.ask() == [frontend.process.pid, 1]
    assert not frontend.is_catching


def test_what_stands_in_the_way_is_named(handlers: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    module = handlers("renewal")
    find = module._find_obstacle
    assert find({"continuousBatching": False, "batchSize": 4}) == ""
    for key in ("continuousBatching", "asyncCommunication", "parallelType"):
        assert find({key: True}) == f"{key} is set"
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        assert "torchrun" in find({})
    with ThreadPoolExecutor(1) as pool:
        assert "main thread" in pool.submit(find, {}).result()
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert "SIGUSR2 itself" in find({})
    finally:
        signal.signal(signal.SIGUSR2, before)
    monkeypatch.setitem(handlers("fast_worker").KNOWN, "service", "0" * 64)
    assert find({}) == "not TorchServe 0.12.0's own: service"


def test_a_model_that_loads_for_longer_than_a_worker_may_be_silent_is_not_renewed(
    handlers: Import, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not handlers("renewal").Renewal({}, timeout=0.001).arm(ours)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    assert "renewal is off: loading took" in caplog.text


def test_the_new_image_is_told_to_load_what_the_old_one_was(handlers: Import) -> None:
    module = handlers("renewal")
    message = {"modelName": bytearray("ñ".encode()), "gpu": 1, "limitMaxImagePixels": True}
    state = json.loads(json.dumps({"load": module.Renewal(message)._load, "renewal": {"count": 1}}))
    told: list[Any] = []

    def load_model(message: dict[str, Any]) -> tuple[None, str, int]:
        told.append(message)
        return None, "System out of memory", 507

    with pytest.raises(RuntimeError, match="507 - System out of memory"):
        module._serve(None, SimpleNamespace(load_model=load_model), None, state)
    assert told == [{**message, "renewal": {"count": 1}}]


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [0]), ({"renew_above_bytes": 5}, [5]), ({"renewal": False}, [])],
)
def test_our_handlers_ask_for_it_unless_told_not_to(
    handlers: Import,
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    expected: list[int],
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        handlers("renewal"),
        "install",
        lambda context, above_bytes, flush: asked.append(above_bytes),
    )
    inputs = [{"name": "x", "shape": [2], "datatype": "FP32"}]
    start(handlers("tensor").TensorHandler, Double(), inputs=inputs, **settings)
    assert asked == expected


def test_outside_a_worker_nothing_changes_and_nothing_is_said(
    handlers: Import, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert not handlers("renewal").install(SimpleNamespace(model_yaml_config={}))
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    assert not caplog.records


def test_the_new_command_is_the_old_one_but_for_the_program(
    handlers: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = handlers("renewal")
    monkeypatch.setattr(sys, "argv", ["/ts/model_service_worker.py", "--sock-type", "unix"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *sys.argv])
    first = module._make_command({"n": 1})
    assert first == [sys.executable, "-u", module.__file__, '{"n": 1}', "--sock-type", "unix"]
    monkeypatch.setattr(sys, "argv", first[2:])
    monkeypatch.setattr(sys, "orig_argv", first)
    second = module._make_command({"n": 2})
    assert second == [*first[:3], json.dumps({"n": 2}), *first[4:]]
