"""model-config.yaml: TorchServe's settings for one model, and the handler's own.

Names are TorchServe's (org.pytorch.serve.archive.model.ModelConfig); it ignores an unknown key
without a word, so here one is an error.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from marwright.errors import ArchiveError

__all__ = [
    "change_settings",
    "HandlerSettings",
    "ModelSettings",
    "SettingProblem",
    "SETTINGS_NAME",
]

SETTINGS_NAME = "model-config.yaml"


@dataclass(frozen=True)
class SettingProblem:
    """One setting that cannot be used."""

    key: str
    """Its name, with those of the mappings around it: `handler.top_k`; may be empty."""
    message: str
    is_unknown: bool = False
    """Whether TorchServe knows no such key."""

    def __str__(self) -> str:
        """Return the line an error names it by."""
        return f"{self.key}: {self.message}" if self.key else self.message


class HandlerSettings(BaseModel):
    """Settings of the handlers in handlers/; another handler may add its own keys."""

    model_config = ConfigDict(extra="allow", frozen=True)

    backend: str | None = None
    """What executes the model file; torchscript where not given."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of one inference; where not given the cores divided by the workers."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Largest request; what is encoded in it is decoded only below this."""
    max_items: int | None = Field(default=None, ge=1)
    """Most things to predict in one request; 64 where not given."""
    max_batch: int | None = Field(default=None, ge=1)
    """Most things in one inference; 64 where not given."""
    collate: Literal["bucket", "pad", "refuse"] | None = None
    """What becomes of unlike shapes: inferred apart, padded to one, or 422."""
    pad_value: float | None = None
    warm_up: bool | None = None
    """Whether the model runs at its batch sizes before the first request; true where not given."""
    metrics: bool | None = None
    """Whether stages, batch sizes and statuses are counted; true where not given."""
    fast_worker: bool | None = None
    """Whether the worker's own path is shortened; true where not given."""
    renewal: bool | None = None
    """Whether a worker renews itself in place when it gets SIGUSR2; true where not given."""
    renew_above_bytes: int | None = Field(default=None, ge=1)
    """Resident set above which a worker renews itself unasked; never where not given."""
    prediction_log: dict[str, Any] | None = None
    """What is kept of requests and answers: folder, share and more (handlers/prediction_log.py)."""
    ood_score: Literal["energy", "softmax"] | None = None
    """Score of each answer's header x-ood-score; none where not given."""
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """image_classifier: (height, width) in pixels that the model takes."""
    top_k: int | None = Field(default=None, ge=1)
    """image_classifier: how many labels an answer holds; 5 where not given."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Images: largest width times height."""
    scaled_decoding: bool | None = None
    """Images: decode a large JPEG at a fraction of its size where that suffices."""
    inputs: list[dict[str, Any]] | None = None
    """tensor: name, shape, datatype of each input."""
    max_elements: int | None = Field(default=None, ge=1)
    """tensor: most numbers in one array."""
    explain_method: Literal["integrated_gradients", "saliency", "occlusion", "grad_cam"] | None = (
        None
    )
    """/explanations: where a request names none; integrated_gradients where not given."""
    explain_steps: int | None = Field(default=None, ge=1)
    """/explanations: how finely integrated gradients and occlusion look; 32 where not given."""
    letterbox: bool | None = None
    """object_detector: resize with the sides' ratio kept."""
    takes: Literal["batch", "list", "image"] | None = None
    """object_detector: how the model takes images."""
    box_format: Literal["xyxy", "xywh", "cxcywh"] | None = None
    """object_detector: what four numbers of a raw box mean."""
    box_units: Literal["pixels", "relative"] | None = None
    """object_detector: what raw boxes are measured in."""
    background: bool | None = None
    """object_detector: whether class 0 is the background; true where not given."""
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    """object_detector: how good a box must be to be told; 0.5 where not given."""
    iou_threshold: float | None = Field(default=None, ge=0, le=1)
    """object_detector: by how much boxes of one class may overlap."""
    max_detections: int | None = Field(default=None, ge=1)
    """object_detector: most boxes of one image; 100 where not given."""


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
        if problems := cls.find_problems(values):
            raise ArchiveError(
                f"{source} has settings that cannot be used",
                found="; ".join(str(problem) for problem in problems),
            )
        return cls.model_validate(dict(values))

    @classmethod
    def find_problems(
        cls, values: Mapping[Any, Any], *, strict: bool = False
    ) -> list[SettingProblem]:
        """Return all that is wrong with settings.

        `strict`: as TorchServe reads them, to which "2" and 2.0 are no numbers of workers.
        """
        try:
            cls.model_validate(dict(values), strict=strict)
        except ValidationError as exc:
            return [
                _describe(
                    ".".join(str(part) for part in problem["loc"]), problem["type"], problem["msg"]
                )
                for problem in exc.errors()
            ]
        return []

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


def _describe(key: str, kind: str, message: str) -> SettingProblem:
    if kind != "extra_forbidden":
        message = message.removeprefix("Value error, ")
        return SettingProblem(key, message[:1].lower() + message[1:])
    plain = {_simplify(name): name for name in ModelSettings.model_fields}
    close = difflib.get_close_matches(_simplify(key), plain, n=1, cutoff=0.75)
    hint = f", did you mean {plain[close[0]]}?" if close else ""
    return SettingProblem(key, f"no setting of TorchServe{hint}", is_unknown=True)


def _simplify(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()


def change_settings(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with other values, given by dotted keys, in the order that pack writes.

    Raises:
        ArchiveError: an unknown key, or a value that cannot be used; all of them at once.
    """
    values = copy.deepcopy(dict(before))
    for key, value in changes.items():
        *outer, last = key.split(".")
        place: Any = values
        for name in outer:
            place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ArchiveError(f"{key} cannot be set", found=f"no mapping {'.'.join(outer)}")
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    _check_changed(values, changes.keys(), before.keys())
    if isinstance(handler := values.get("handler"), dict):
        values["handler"] = _sort(handler, HandlerSettings)
    return _sort(values, ModelSettings)


def _check_changed(
    values: Mapping[str, Any], changed: Collection[str], before: Collection[str]
) -> None:
    """Check changed settings as TorchServe reads them; what else was there is left alone.

    That may be a handler's own key, or what another version of TorchServe took.
    """
    new = {key.split(".")[0] for key in changed} - set(before)
    known = {key: values[key] for key in values if key in {*new, *ModelSettings.model_fields}}
    handler = {"handler": known.pop("handler")} if "handler" in known else {}
    if isinstance(workers := known.get("minWorkers"), int):
        known.setdefault("maxWorkers", max(workers, 1))
    problems = [
        str(problem)
        for problem in [
            *ModelSettings.find_problems(known, strict=True),
            *ModelSettings.find_problems(handler),
        ]
        if not problem.key or any(_is_within(problem.key, key) for key in changed)
    ]
    if problems:
        raise ArchiveError("the settings cannot be used", found="; ".join(problems))


def _is_within(key: str, other: str) -> bool:
    """Whether one dotted key is the other, or a part of it, either way."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _sort(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return values in the order of a model's fields, others behind them."""
    order = {key: number for number, key in enumerate(model.model_fields)}
    return dict(sorted(values.items(), key=lambda item: order.get(item[0], len(order))))
