"""Several processes that train one network: torch.distributed, and those that are started here.

torchrun starts processes and tells each its place in the environment; `--processes 2` does the
same on this machine.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from marwright.errors import MarwrightError

__all__ = ["ALONE", "Group", "join_group", "start_others"]

GRACE_SECONDS = 10.0
JOIN_SECONDS = 120.0
"""A process takes some five to start; on a machine with much else to do a minute."""
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def share(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a batch; all of it where it is too small to part."""
        return chosen[self.rank :: self.size] if self.parts(chosen) else chosen

    def parts(self, chosen: torch.Tensor) -> bool:
        """Whether a batch is large enough for each process to have two of it."""
        return self.size > 1 and len(chosen) >= 2 * self.size

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with its gradients averaged over the processes."""
        if self.size == 1:
            return model
        network = getattr(model, "network", model)  # Exported's own buffers never change
        changes = next(network.buffers(), None) is not None  # batch normalisation's do
        with warnings.catch_warnings():
            # The newer name of the option is not known to torch 2.6.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            # Sent before each step, three numbers took a sixth of the time (two gloo processes).
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=changes)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values


ALONE = Group()


@contextmanager
def join_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that the environment names, as torchrun sets it; alone without."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = [name for name in PLACE if name not in os.environ]
    if missing:
        raise MarwrightError(
            "the environment names several processes but not where they meet",
            expected=", ".join(PLACE),
            found=f"no {', '.join(missing)}",
            remedy="start with torchrun, or with --processes",
        )
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # gloo talks over the interface that the machine's name resolves to, which may be none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Both: what add_up adds lies on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A process that died before it came here must not be awaited for torch's half hour.
    wait = timedelta(seconds=JOIN_SECONDS)
    store, rank, size = next(rendezvous("env://", timeout=wait))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


@contextmanager
def start_others(arguments: Sequence[str], processes: int) -> Iterator[None]:
    """Start all but the first of the processes that train together; this one is the first.

    `arguments` are those of `python -m marwright.training.train`. Whatever happens here, none of
    them is left.
    """
    place = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_find_port()),
    }
    command = [sys.executable, "-m", "marwright.training.train", *arguments]
    with ExitStack() as stack:
        others = []
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes)]
        stack.enter_context(_change_environment({**place, "RANK": "0", "LOCAL_RANK": "0"}))
        for rank, log in enumerate(logs, start=1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command, env={**os.environ, **own}, stdout=subprocess.DEVNULL, stderr=log
            )
            stack.callback(_end, process)
            others.append(process)
        try:
            yield
        except RuntimeError as exc:  # torch's, where another process has gone
            # A moment for the other's own end; ended by us it would have no cause to tell.
            _wait(others)
            for rank, (process, log) in enumerate(zip(others, logs, strict=True), start=1):
                if process.returncode:
                    log.seek(0)
                    raise MarwrightError(
                        f"process {rank} of {processes} ended with status {process.returncode}",
                        detail=log.read().decode(errors="replace")[-2000:],
                    ) from exc
            raise
        except BaseException:
            for process in others:
                process.terminate()
            raise


@contextmanager
def _change_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS / 5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that should be ending, and end it where it does not."""
    _wait([process])
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
