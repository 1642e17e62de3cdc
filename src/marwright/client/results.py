"""What a server answers, as frozen dataclasses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from marwright.client.calls import Response
from marwright.errors import ClientError, UsageError

__all__ = [
    "Answer",
    "Health",
    "ModelPage",
    "ModelSummary",
    "ModelVersion",
    "parse_json",
    "Worker",
]

Result = TypeVar("Result")


def parse_json(body: bytes, request: str, read: Callable[[Any], Result]) -> Result:
    """Decode an answer's body and make a result of it.

    Raises:
        ClientError: it is no JSON, or none of the shape that `read` expects.
    """
    try:
        return read(json.loads(body))
    # What decoding raises, and what reading a dict, a list, an int where there is none raises.
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as exc:
        raise ClientError(
            f"{request} did not answer with the JSON that was expected",
            found=repr(body[:80].decode("utf-8", "replace")),
            remedy="check that the address is this API of a TorchServe",
        ) from exc


@dataclass(frozen=True)
class Answer:
    """A successful answer of a model."""

    status: int
    content_type: str
    body: bytes
    request_id: str
    """TorchServe's id of the request, as it stands in the server's log."""
    seconds: float
    """From sending the request to the whole answer, without tries that came to nothing."""

    @classmethod
    def from_response(cls, response: Response, seconds: float) -> Answer:
        """Keep an answer as it came."""
        return cls(
            status=response.status,
            content_type=response.headers.get("Content-Type", ""),
            body=response.body,
            request_id=response.headers.get("x-request-id", ""),
            seconds=seconds,
        )

    def numpy(self) -> Any:
        """Read the body as an array in NumPy's format, asked for by accept="application/x-npy".

        Raises:
            UsageError: it is something else; see `content_type`.
        """
        import io

        import numpy as np

        try:
            return np.load(io.BytesIO(self.body), allow_pickle=False)
        except (ValueError, EOFError, OSError) as exc:
            raise UsageError(
                "the answer is no array",
                expected="application/x-npy",
                found=self.content_type,
                remedy='ask for it: accept="application/x-npy"',
            ) from exc

    def json(self) -> Any:
        """Decode the body as JSON.

        Raises:
            ClientError: it is something else; see `content_type`.
        """
        return parse_json(self.body, "the model", lambda value: value)


@dataclass(frozen=True)
class Health:
    """What `/ping` says: whether the server is up, not whether its models are ready."""

    status: str

    @classmethod
    def from_response(cls, response: Response) -> Health:
        """Read the answer of `GET /ping`."""
        if response.status == 500:
            return cls(status="Unhealthy")
        return parse_json(response.body, "GET /ping", lambda answer: cls(str(answer["status"])))

    @property
    def healthy(self) -> bool:
        """Whether TorchServe calls itself healthy."""
        return self.status == "Healthy"


@dataclass(frozen=True)
class ModelSummary:
    """One line of the model list: a model's default version."""

    name: str
    archive: str
    """The `modelUrl` it was registered with."""

    @classmethod
    def from_response(cls, item: Mapping[str, Any]) -> ModelSummary:
        """Read one entry of `GET /models`."""
        return cls(name=item["modelName"], archive=item["modelUrl"])


@dataclass(frozen=True)
class ModelPage:
    """One page of the model list."""

    models: tuple[ModelSummary, ...]
    next_token: str = ""
    """What asks for the next page; "" on the last one."""

    @classmethod
    def from_response(cls, page: Mapping[str, Any]) -> ModelPage:
        """Read an answer of `GET /models`."""
        models = tuple(ModelSummary.from_response(item) for item in page["models"])
        return cls(models, str(page.get("nextPageToken") or ""))


@dataclass(frozen=True)
class Worker:
    """One worker process of a model version."""

    id: str
    status: str
    """READY, LOADING, UNLOADING or another of TorchServe's words."""
    pid: int
    memory_bytes: int

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.status == "READY"

    @classmethod
    def from_response(cls, item: Mapping[str, Any]) -> Worker:
        """Read one entry of `workers`."""
        return cls(
            id=str(item["id"]),
            status=item["status"],
            pid=int(item.get("pid", -1)),
            memory_bytes=int(item.get("memoryUsage", 0)),
        )


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model, with its workers and settings."""

    name: str
    version: str
    archive: str
    min_workers: int
    max_workers: int
    batch_size: int
    max_batch_delay_ms: int
    loaded_at_startup: bool
    workers: tuple[Worker, ...]
    response_timeout: int = 0
    """Seconds until a worker that does not answer is ended."""
    startup_timeout: int = 0
    """Seconds until a worker that does not load its model is ended."""
    queue_room: int = 0
    """How many more requests may wait."""
    queue_length: int = 0
    """How many requests wait."""
    metadata: Mapping[str, Any] | None = None
    """What the handler says of the model, where it was asked: describe(customized=True)."""

    @property
    def ready_workers(self) -> int:
        """How many workers take requests."""
        return sum(worker.ready for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Whether it has at least one worker and all that were asked for take requests."""
        return self.ready_workers >= max(1, self.min_workers)

    @classmethod
    def from_response(cls, item: Mapping[str, Any]) -> ModelVersion:
        """Read one entry of `GET /models/{name}/{version}`."""
        queue = item.get("jobQueueStatus") or {}
        return cls(
            name=item["modelName"],
            version=item["modelVersion"],
            archive=item["modelUrl"],
            min_workers=int(item["minWorkers"]),
            max_workers=int(item["maxWorkers"]),
            batch_size=int(item["batchSize"]),
            max_batch_delay_ms=int(item["maxBatchDelay"]),
            loaded_at_startup=bool(item.get("loadedAtStartup", False)),
            workers=tuple(Worker.from_response(worker) for worker in item["workers"]),
            response_timeout=int(item.get("responseTimeout", 0)),
            startup_timeout=int(item.get("startupTimeout", 0)),
            queue_room=int(queue.get("remainingCapacity", 0)),
            queue_length=int(queue.get("pendingRequests", 0)),
            metadata=item.get("customizedMetadata"),
        )
