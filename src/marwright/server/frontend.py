"""TorchServe's frontend with a few constants changed, and a door of our own in front of it.

A server's run folder holds changed classes that stand before TorchServe's jar on Java's class path;
nothing installed is touched, and only classes that are known byte for byte are changed.

- eager batches (docs/decisions/0010-eager-batches.md): TorchServe takes the first request of a
  batch from its queue and then waits up to maxBatchDelay, 1 ms at least, for each further one
  (org.pytorch.serve.wlm.Model, pollBatch), also when nobody else is there. Batches need no waiting:
  while a worker computes, requests queue up, and the next batch takes them all. So the waits' unit
  becomes microseconds: maxBatchDelay 1 takes what is in the queue and goes.
- the door (docs/decisions/0014-door.md): where TorchServe adds netty's HTTP codec to a connection
  (org.pytorch.serve.ServerInitializer), it adds our class door/Door.java, which sees what comes and
  goes over HTTP, and counts predictions in TorchServe's own metrics (door/Tally.java).
  FrontendSettings says what it does there.
- the same for gRPC: door/GrpcGate.java comes where TorchServe makes the interceptor of its servers
  (org.pytorch.serve.ModelServer) and asks for the key; door/GrpcJob.java comes where it makes the
  job for a prediction (org.pytorch.serve.grpcimpl.InferenceImpl) and spares the worker.
- held requests: door/Aggregator.java comes where TorchServe makes what gathers the requests of a
  batch (org.pytorch.serve.wlm.WorkLoadManager), and answers those that a worker took from the queue
  and had not begun when it died. The other aggregators extend it then: Java checks that all that
  can stand in that place are one kind, so that their classes change with it, or none.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from marwright.errors import UsageError

__all__ = ["FrontendSettings", "PATCHES", "Patch", "write_classes"]

_log = logging.getLogger(__name__)

_LOG4J_LEVELS = {"warning": "warn", "critical": "fatal"}


@dataclass(frozen=True)
class Patch:
    """One constant, and what it becomes in one class or in all that have to agree on it."""

    name: str
    classes: Mapping[str, str]
    """Members of TorchServe's jar, with the SHA-256 that they have in TorchServe 0.12.0."""
    before: str
    after: str
    without: str
    """What goes without saying where the class is another one, for the log."""

    @property
    def is_door(self) -> bool:
        """Whether the class it names is one of ours."""
        return self.after.startswith("marwright/")

    def apply(self, archive: zipfile.ZipFile) -> dict[str, bytes] | None:
        """Return the changed classes, or None where one is not known."""
        before = _encode(self.before)
        changed = {}
        for member, sha256 in self.classes.items():
            code = archive.read(member)
            if hashlib.sha256(code).hexdigest() != sha256 or code.count(before) != 1:
                return None
            changed[member] = code.replace(before, _encode(self.after))
        return changed


PATCHES = (
    Patch(
        name="eager batches",
        classes={
            "org/pytorch/serve/wlm/Model.class": (
                "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff"
            ),
        },
        # The class uses the constant for TimeUnit alone.
        before="MILLISECONDS",
        after="MICROSECONDS",
        without="requests will wait for maxBatchDelay",
    ),
    Patch(
        name="door",
        classes={
            "org/pytorch/serve/ServerInitializer.class": (
                "096cdc16ec94359c5bafd0fddf4443e3d9a8c7656863d0b57bf1586fd2f8f700"
            ),
        },
        # A class that is made there without arguments and added as a ChannelHandler.
        before="io/netty/handler/codec/http/HttpServerCodec",
        after="marwright/Door",
        without="slow clients, workflows and changes without a key are let in",
    ),
    Patch(
        name="gRPC gate",
        classes={
            "org/pytorch/serve/ModelServer.class": (
                "779d0df5bfc17c5ad09ac46d63d9a017d48a4cd68c1b7464de914d3cb40190b9"
            ),
        },
        # Made there with a ConnectorType, and used as a ServerInterceptor: ours extends it.
        before="org/pytorch/serve/grpcimpl/GRPCInterceptor",
        after="marwright/GrpcGate",
        without="over gRPC the management token changes models without a key",
    ),
    Patch(
        name="gRPC jobs",
        classes={
            "org/pytorch/serve/grpcimpl/InferenceImpl.class": (
                "8b85e06f700eeb9dc6e595307bcaf38c67209883a08dcd09039f72f1462e36cc"
            ),
        },
        # Made there for a prediction, and used as a Job: ours extends it.
        before="org/pytorch/serve/job/GRPCJob",
        after="marwright/GrpcJob",
        without="a call over gRPC that does not fit its handler costs the worker",
    ),
    Patch(
        name="held requests",
        classes={
            # Makes one for a worker; the others extend it.
            "org/pytorch/serve/wlm/WorkLoadManager.class": (
                "d8078b60dcae76ca80482b1db01510c5babc45e5af88f4cff1b1e18f0e322c74"
            ),
            "org/pytorch/serve/wlm/SequenceBatching.class": (
                "c30d888ce70f7e3e431ed53c274022d1fda8dc60365b515bcb2bc9e34a8d375b"
            ),
            "org/pytorch/serve/wlm/ContinuousBatching.class": (
                "46d458da2395d810c1164401fc4f5bb97f60b3fc50d753903f4265616223523f"
            ),
            "org/pytorch/serve/wlm/AsyncBatchAggregator.class": (
                "aed0a24091f876e16c3138c335df25fca0380fb704212bc3b53f004c78111cf4"
            ),
        },
        before="org/pytorch/serve/wlm/BatchAggregator",
        after="marwright/Aggregator",
        without="a request that a worker took and had not begun when it died gets no answer",
    ),
)
"""All that is known of TorchServe's classes."""


@dataclass(frozen=True)
class FrontendSettings:
    """What the door does, and how much the log says; the defaults limit nothing."""

    key_file: Path | None = None
    """Changes of models need X-Marwright-Key, over gRPC too, with this file's content."""
    deny: tuple[str, ...] = ("/workflows", "/wfpredict")
    """Path prefixes that answer 404."""
    request_seconds: float = 0.0
    """A request that has not arrived whole so long after its first byte gets 408; 0: no limit."""
    max_connections: int = 0
    """Further ones get 503, whichever address they are made to; 0: no limit."""
    retry_after: int = 1
    """Seconds that every 429 and 503 asks a client to wait."""
    log_requests: str = "errors"
    """Which answers leave a line in the log: none, errors, all."""
    log_level: str = "info"
    """debug, info, warning, error or critical."""
    log_file_bytes: int = 20 * 1024 * 1024
    log_files: int = 5
    """How many of them are kept, server.log among them; two at least."""

    def to_arguments(self) -> list[str]:
        """Return the arguments for Java."""
        if self.log_requests not in ("none", "errors", "all"):
            raise UsageError(
                "no such choice of requests to log",
                expected="none, errors or all",
                found=repr(self.log_requests),
            )
        properties = {
            "deny": ",".join(self.deny),
            "request.seconds": f"{self.request_seconds:g}",
            "retry.after": str(self.retry_after),
            "log.requests": self.log_requests,
            "log.level": _LOG4J_LEVELS.get(self.log_level, self.log_level),
            "log.size": f"{self.log_file_bytes}B",
            "log.rotated": str(max(1, self.log_files - 1)),
        }
        if self.key_file is not None:
            properties["key.file"] = str(self.key_file)
        if self.max_connections:
            properties["max.connections"] = str(self.max_connections)
        return [f"-Dmarwright.{name}={value}" for name, value in properties.items()]


def write_classes(
    jar: Path, folder: Path, *, eager_batches: bool = True, door: bool = True
) -> tuple[str, ...]:
    """Write changed classes below a folder that is to stand first on Java's class path.

    Returns the names of the patches that were applied. With another TorchServe than 0.12.0 there
    are none, and a line in the log says for each what that means.
    """
    applied = []
    for patch in PATCHES:
        if not (door if patch.is_door else eager_batches):
            continue
        try:
            with zipfile.ZipFile(jar) as archive:
                classes = patch.apply(archive)
        except (OSError, KeyError, zipfile.BadZipFile) as exc:
            _log.warning("%s: %s cannot be read: %s", patch.without, jar, exc)
            continue
        if classes is None:
            _log.warning("%s: %s is not TorchServe 0.12.0's", patch.without, jar)
            continue
        if patch.is_door:
            _write_door(folder / "marwright")
        for member, code in classes.items():
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(code)
        applied.append(patch.name)
    return tuple(applied)


def _write_door(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source in (resources.files("marwright.server") / "door").iterdir():
        if source.name.endswith(".class"):
            (folder / source.name).write_bytes(source.read_bytes())


def _encode(text: str) -> bytes:
    """Return a constant of a class file: tag 1, length, text (JVM specification, section 4.4.7)."""
    return b"\x01" + len(text).to_bytes(2, "big") + text.encode("ascii")
