"""Typed access to a TorchServe: inference, management and health over REST."""

from __future__ import annotations

from marwright.client.client import Client
from marwright.client.endpoint import Endpoint
from marwright.client.results import Answer, Health, ModelSummary, ModelVersion, Worker
from marwright.client.tokens import TokenFile

__all__ = [
    "Answer",
    "Client",
    "Endpoint",
    "Health",
    "ModelSummary",
    "ModelVersion",
    "TokenFile",
    "Worker",
]
