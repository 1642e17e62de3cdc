"""Typed access to a TorchServe: inference, management, health, metrics; over REST and gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marwright.client.async_client import AsyncClient
    from marwright.client.batches import Outcome
    from marwright.client.client import Client
    from marwright.client.endpoint import Endpoint
    from marwright.client.grpc_async_client import AsyncGrpcClient
    from marwright.client.grpc_client import GrpcClient
    from marwright.client.metrics import Metrics
    from marwright.client.results import (
        Answer,
        Health,
        ModelPage,
        ModelSummary,
        ModelVersion,
        Worker,
    )
    from marwright.client.retries import Retries
    from marwright.client.tensors import Inference, Tensor
    from marwright.client.tokens import TokenFile

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncGrpcClient",
    "Client",
    "Endpoint",
    "GrpcClient",
    "Health",
    "Inference",
    "Metrics",
    "ModelPage",
    "ModelSummary",
    "ModelVersion",
    "Outcome",
    "Retries",
    "Tensor",
    "TokenFile",
    "Worker",
]

_HOMES = {
    "AsyncClient": "async_client",
    "AsyncGrpcClient": "grpc_async_client",
    "Client": "client",
    "Endpoint": "endpoint",
    "GrpcClient": "grpc_client",
    "Inference": "tensors",
    "Metrics": "metrics",
    "Outcome": "batches",
    "Retries": "retries",
    "Tensor": "tensors",
    "TokenFile": "tokens",
    **dict.fromkeys(
        ("Answer", "Health", "ModelPage", "ModelSummary", "ModelVersion", "Worker"), "results"
    ),
}


def __getattr__(name: str) -> Any:
    """Import on first use: who needs one client does not wait for the others."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
