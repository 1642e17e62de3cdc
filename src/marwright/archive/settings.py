"""model-config.yaml: TorchServe's settings for one model, and the handler's own.

Names are TorchServe's (org.pytorch.serve.archive.model.ModelConfig); it ignores an unknown key
without a word, so here one is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from marwright.errors import ArchiveError

__all__ = ["HandlerSettings", "ModelSettings", "SETTINGS_NAME"]

SETTINGS_NAME = "model-config.yaml"


class HandlerSettings(BaseModel):
    """Settings of handlers/image_classifier.py; another handler may add its own keys."""

    model_config = ConfigDict(extra="allow", frozen=True)

    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """(height, width) in pixels that the model takes."""
    top_k: int | None = Field(default=None, ge=1)
    """How many labels an answer holds; 5 where not given."""
    threads: int | None = Field(default=None, ge=1)
    """torch threads of one worker; 1 where not given."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Largest encoded image."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Largest width times height."""


class ModelSettings(BaseModel):
    """What TorchServe reads from model-config.yaml when it registers the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minWorkers: int = Field(default=1, ge=0)
    maxWorkers: int = Field(default=1, ge=0)
    batchSize: int = Field(default=8, ge=1)
    maxBatchDelay: int = Field(default=1, ge=1)
    """Milliseconds a request may wait for others to share its batch.

    With 0 and a batch size above 1, TorchServe 0.12 answered a lone request in 105 ms (measured).
    """
    responseTimeout: int = Field(default=60, ge=1)
    """Seconds after which a silent worker is replaced."""
    startupTimeout: int = Field(default=120, ge=1)
    """Seconds a worker may take to load the model."""
    handler: HandlerSettings = HandlerSettings()

    # TorchServe's other keys are passed on as they are, where given.
    asyncCommunication: bool | None = None
    clientTimeoutInMills: int | None = None
    continuousBatching: bool | None = None
    deviceIds: list[int] | None = None
    deviceType: str | None = None
    jobQueueSize: int | None = None
    maxNumSequence: int | None = None
    maxRetryTimeoutInSec: int | None = None
    maxSequenceJobQueueSize: int | None = None
    parallelLevel: int | None = None
    parallelType: str | None = None
    sequenceBatching: bool | None = None
    sequenceMaxIdleMSec: int | None = None
    sequenceTimeoutMSec: int | None = None
    torchrun: dict[str, Any] | None = None
    useJobTicket: bool | None = None
    useVenv: bool | None = None
    # Read by TorchServe's Python side (ts/torch_handler, ts/handler_utils).
    dali: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None
    pippy: dict[str, Any] | None = None
    pt2: Any = None

    @model_validator(mode="after")
    def _check_workers(self) -> ModelSettings:
        if self.maxWorkers < self.minWorkers:
            raise ValueError(f"maxWorkers {self.maxWorkers} is below minWorkers {self.minWorkers}")
        return self

    @classmethod
    def create(cls, values: Mapping[str, Any], *, source: str) -> ModelSettings:
        """Check settings given as a mapping; `source` names the file or option in errors.

        Raises:
            ArchiveError: unknown keys, wrong types, impossible numbers; all of them at once.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as exc:
            problems = [
                f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'].lower()}"
                for problem in exc.errors()
            ]
            raise ArchiveError(
                f"{source} has settings that cannot be used", found="; ".join(problems)
            ) from exc

    @classmethod
    def read(cls, path: Path) -> ModelSettings:
        """Read a model-config.yaml."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as exc:
            reason = " ".join(str(exc).split())
            raise ArchiveError(f"cannot read {path}", expected="YAML", found=reason) from exc
        values = {} if values is None else values  # an empty file
        if not isinstance(values, dict):
            raise ArchiveError(
                f"cannot read {path}", expected="a mapping", found=type(values).__name__
            )
        return cls.create(values, source=str(path))

    def to_yaml(self) -> bytes:
        """Return the file's bytes: the first six settings spelled out, others where given."""
        values = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False).encode()
