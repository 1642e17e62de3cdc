"""The base of every handler here: a batch of requests in, exactly one answer for each, in order.

A subclass writes what is particular: `decode` one thing to predict, `make_tensor` of it,
`make_answer` of one output. The base reads requests, collates, infers, finds the one request that
makes inference fail, scatters, and writes answers and problems. One bad request never harms its
neighbours.

Settings, under `handler:` in model-config.yaml: backend, threads, max_bytes, max_items, max_batch,
collate (bucket, pad, refuse), pad_value, warm_up, metrics, fast_worker, renewal, renew_above_bytes,
prediction_log (see prediction_log.py), ood_score (see logits.py: energy or softmax, told to clients
in the header x-ood-score).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fast_worker
import renewal
from backend import Backend, load_backend
from body_schema import load_check
from collation import WAYS, Tensors, group_shapes, scatter, stack
from cpu_share import count_threads
from inference_request import (
    Incoming,
    InferenceRequest,
    Part,
    RequestLimits,
    read_id,
    read_request,
)
from inference_response import Arrays, InferenceResponse, render, render_problem
from logits import SCORES
from prediction_log import Note, Observation, PredictionLog, open_log
from problem import RejectedInput
from stage_metrics import StageMetrics

__all__ = ["BatchHandler"]

_log = logging.getLogger(__name__)


@dataclass
class _Item:
    """One thing to predict, on its way."""

    decoded: Any
    tensors: Tensors = ()
    output: Any = None
    error: Exception | None = None


@dataclass
class _Slot:
    """One request on its way; done once it has a response."""

    incoming: Incoming
    request: InferenceRequest | None = None
    items: list[_Item] = field(default_factory=list)
    response: InferenceResponse | None = None


class BatchHandler:
    """Answers batches; see the module."""

    def initialize(self, context: Any) -> None:
        """Load the model; TorchServe calls this once in each worker."""
        config = context.model_yaml_config or {}
        self.settings: dict[str, Any] = dict(config.get("handler") or {})
        self.folder = Path(context.system_properties["model_dir"])
        manifest = context.manifest["model"]
        self.model_name = str(manifest.get("modelName", ""))
        self.model_version = str(manifest.get("modelVersion", ""))
        self.batch_size = int(context.system_properties.get("batch_size") or 1)
        limits = {key: int(self.settings[key]) for key in _LIMITS if key in self.settings}
        self.limits = RequestLimits(**limits)
        self.check_json = load_check(self.folder)
        self.max_batch = int(self.settings.get("max_batch", 64))
        self.collate = _choose(self.settings, "collate", WAYS)
        self.pad_value = float(self.settings.get("pad_value", 0.0))
        self.metrics = StageMetrics(
            context,
            model=self.model_name,
            version=self.model_version,
            enabled=bool(self.settings.get("metrics", True)),
        )
        self.ood_score = _choose(self.settings, "ood_score", ("", *SCORES))
        if self.ood_score and type(self).score is BatchHandler.score:
            raise ValueError(f"handler.ood_score: {type(self).__name__} has no score")
        self.prediction_log = open_log(
            self.settings.get("prediction_log"),
            model=self.model_name,
            version=self.model_version,
            describe=self._describe,
            count=self.metrics.count_predictions,
        )
        self._has_lost_notes = False
        self.backend = self._load(context, config)
        self.configure()
        example = self.make_example()
        self._example = example if isinstance(example, tuple) or example is None else (example,)
        self._shapes = [tuple(tensor.shape) for tensor in self._example or ()]
        if self.collate == "refuse" and not self._shapes:
            raise ValueError("handler.collate: refuse needs a handler that knows its shapes")
        if self.settings.get("warm_up", True):
            self._warm_up()
        if self.settings.get("fast_worker", True) and type(self).handle is BatchHandler.handle:
            fast_worker.install(self)
        if self.settings.get("renewal", True):  # after fast_worker: it wraps what reads
            renewal.install(
                context,
                above_bytes=int(self.settings.get("renew_above_bytes") or 0),
                flush=self._flush,
            )

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch as TorchServe hands it over: one answer for each request, in order."""
        incoming = []
        for index, row in enumerate(data):
            headers = {
                str(name).lower(): value
                for name, value in context.get_all_request_header(index).items()
                if isinstance(value, str)
            }
            incoming.append(
                Incoming(
                    id=str(context.get_request_id(index) or ""),
                    row=row,
                    content_type=headers.get("content-type", ""),
                    accept=headers.get("accept", ""),
                    is_explanation=headers.get("explain") == "True",
                    header_id=read_id(headers.get("x-request-id", "")),
                )
            )
        responses = self.answer(incoming)
        for index, response in enumerate(responses):
            if response.status != 200:
                context.set_response_status(response.status, response.phrase, index)
            context.set_response_content_type(index, response.content_type)
            for name, value in response.headers.items():
                context.set_response_header(index, name, value)
        return [response.body for response in responses]

    # What a subclass writes.

    def configure(self) -> None:
        """Read the handler's own settings and files, after the model is loaded."""

    def read(self, request: InferenceRequest) -> Sequence[Any]:
        """Return what one request wants predicted, decoded; by default each part by itself."""
        return [self.decode(part) for part in request.parts]

    def decode(self, part: Part) -> Any:
        """Decode one thing to predict; raise RejectedInput for what the client has to mend."""
        raise NotImplementedError

    def make_tensor(self, decoded: Any) -> torch.Tensor | Tensors:
        """Return the model's input for one thing, without a batch axis; a tuple for several."""
        raise NotImplementedError

    def make_tensors(self, decoded: Sequence[Any]) -> Sequence[torch.Tensor | Tensors]:
        """Do so for many things at once, where that takes less time; one for each, in order."""
        return [self.make_tensor(item) for item in decoded]

    def infer(self, *batch: torch.Tensor) -> Any:
        """Run the model: each input with a batch axis first, and so each output."""
        return self.backend.run(*batch)

    def make_answer(self, output: Any) -> Any:
        """Return what JSON is to say of one output."""
        return output.tolist()

    def make_arrays(self, output: Any) -> Arrays:
        """Return one output as named arrays, for npy, raw numbers and KServe v2."""
        return {"output": output}

    def explain(self, request: InferenceRequest, inputs: Sequence[Tensors]) -> InferenceResponse:
        """Answer a request to /explanations; `inputs` are its tensors, one tuple a thing."""
        raise RejectedInput(501, f"{type(self).__name__} explains nothing")

    def describe(self, inputs: Sequence[Tensors], outputs: Sequence[Any]) -> Sequence[Observation]:
        """Return what the prediction log says of things: one observation for each, in order.

        Another thread calls it, for things of several batches at once; requests do not wait for it.
        """
        return [Observation() for _ in outputs]

    def score(self, outputs: Sequence[Any], kind: str) -> Sequence[float | None]:
        """Return how far each thing is from what the model learnt, by one of logits.SCORES."""
        return [None for _ in outputs]

    def make_example(self) -> torch.Tensor | Tensors | None:
        """Return one input to warm up with; None where the handler knows none."""
        return None

    # What the base does.

    def write(
        self,
        request: InferenceRequest,
        values: Sequence[Any],
        arrays: Callable[[], Sequence[Arrays]],
    ) -> InferenceResponse:
        """Write what one request gets, in its own form; see inference_response.render."""
        return render(request, values, arrays, model=self.model_name, version=self.model_version)

    def answer(self, incoming: Sequence[Incoming]) -> list[InferenceResponse]:
        """Answer a batch of requests: one response for each, in order."""
        slots = [_Slot(item) for item in incoming]
        began = time.perf_counter()
        watch = self.metrics.start(len(slots))
        for slot in slots:
            self._attempt(slot, self._read)
        watch.lap("decode")
        self._prepare_all(list(_unfinished(slots)))
        watch.lap("preprocess")
        self._infer_all([s for s in _unfinished(slots) if not s.incoming.is_explanation])
        watch.lap("infer")
        for slot in _unfinished(slots):
            self._attempt(slot, self._explain if slot.incoming.is_explanation else self._render)
        responses = [slot.response or _LOST for slot in slots]
        watch.finish("postprocess", [response.status for response in responses])
        if self.prediction_log is not None:
            self._keep_notes(self.prediction_log, slots, time.perf_counter() - began)
        return responses

    def _keep_notes(self, log: PredictionLog, slots: Sequence[_Slot], seconds: float) -> None:
        """Note what is to be logged; what goes wrong costs the notes, and none of the answers."""
        wanted = [
            slot
            for slot in slots
            if not slot.incoming.is_explanation and log.takes(_name(slot.incoming))
        ]
        if not wanted:
            return
        try:
            log.keep(list(_take_notes(wanted, seconds)))
        except Exception as exc:  # the answers are made; memory may have run out for the copies
            self.metrics.count_predictions(0, sum([_count_notes(slot) for slot in wanted]))
            if not self._has_lost_notes:
                _log.error("predictions cannot be noted: %s: %s", type(exc).__name__, exc)
            self._has_lost_notes = True

    def _read(self, slot: _Slot) -> None:
        slot.request = read_request(slot.incoming, self.limits, self.check_json)
        slot.items = [_Item(decoded) for decoded in self.read(slot.request)]
        if not 0 < len(slot.items) <= self.limits.max_items:
            raise RejectedInput(
                413 if slot.items else 400,
                f"expected 1 to {self.limits.max_items} items, found {len(slot.items):,}",
            )

    def _prepare_all(self, slots: Sequence[_Slot]) -> None:
        """Make tensors of all things together; where that fails, of each request by itself."""
        alone = list(slots)
        with contextlib.suppress(Exception):  # whose it is the second try tells
            self._prepare([item for slot in slots for item in slot.items])
            alone.clear()
        for slot in alone:
            self._attempt(slot, lambda slot: self._prepare(slot.items))
        if self.collate == "refuse":
            for slot in _unfinished(slots):
                self._attempt(slot, self._check_shapes)

    def _prepare(self, items: Sequence[_Item]) -> None:
        found = self.make_tensors([item.decoded for item in items])
        for item, tensors in zip(items, found, strict=True):
            item.tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        for item in items:
            item.decoded = None  # it may be large

    def _check_shapes(self, slot: _Slot) -> None:
        for item in slot.items:
            shapes = [tuple(tensor.shape) for tensor in item.tensors]
            if shapes != self._shapes:
                raise RejectedInput(422, f"expected shapes {self._shapes}, found {shapes}")

    def _infer_all(self, slots: Sequence[_Slot]) -> None:
        """Infer all items, those of one shape together; give those that failed their problem."""
        items = [item for slot in slots for item in slot.items]
        for indices in group_shapes([item.tensors for item in items], self.collate):
            for start in range(0, len(indices), self.max_batch):
                self._infer_group([items[i] for i in indices[start : start + self.max_batch]])
        for slot in slots:
            error = next((item.error for item in slot.items if item.error is not None), None)
            if error is not None:
                self._fail(slot, error)

    def _infer_group(self, items: list[_Item]) -> None:
        """Infer together; where that fails halve until the one that fails is alone."""
        try:
            outputs = self._infer(items)
        except Exception as exc:
            traceback.clear_frames(exc.__traceback__)  # they hold the batch, and what came of it
            if len(items) == 1:
                items[0].error = exc
                return
            if _is_out_of_memory(exc) and torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(items) // 2
            self._infer_group(items[:middle])
            self._infer_group(items[middle:])
            return
        for item, output in zip(items, outputs, strict=True):
            item.output = output

    @torch.inference_mode()
    def _infer(self, items: Sequence[_Item]) -> list[Any]:
        # A list, here and in collation.py: made of a generator, the arguments' tuples only fill
        # CPython's store of spare ones, up to 2,000 of each length, and memory grows meanwhile.
        columns = zip(*[item.tensors for item in items], strict=True)
        batch = [stack(column, self.pad_value).to(self.backend.device) for column in columns]
        return scatter(self.infer(*batch), len(items))

    def _render(self, slot: _Slot) -> None:
        assert slot.request is not None  # else it was refused
        outputs = [item.output for item in slot.items]
        slot.response = self.write(
            slot.request,
            [self.make_answer(output) for output in outputs],
            lambda: [self.make_arrays(output) for output in outputs],
        )
        if self.ood_score:
            scores = self.score(outputs, self.ood_score)
            if None not in scores:
                slot.response.headers["x-ood-score"] = ",".join(f"{score:.6g}" for score in scores)

    def _describe(self, notes: Sequence[Note]) -> Sequence[Observation]:
        """Tell the prediction log what notes say, with the score that it wants."""
        assert self.prediction_log is not None  # which asks
        outputs = [note.output for note in notes]
        told = self.describe([note.tensors for note in notes], outputs)
        if self.prediction_log.settings.score == "none":
            return told
        scores = self.score(outputs, self.prediction_log.settings.score)
        return [item._replace(score=score) for item, score in zip(told, scores, strict=True)]

    def _flush(self) -> None:
        """Hand on what another image of this worker would not know of."""
        if self.prediction_log is not None:
            self.prediction_log.flush()
        self.metrics.flush()

    def _explain(self, slot: _Slot) -> None:
        assert slot.request is not None
        slot.response = self.explain(slot.request, [item.tensors for item in slot.items])

    def _attempt(self, slot: _Slot, step: Callable[[_Slot], None]) -> None:
        """Take one request a step further; what goes wrong concerns this request alone."""
        try:
            step(slot)
        except Exception as exc:
            self._fail(slot, exc)

    def _fail(self, slot: _Slot, error: Exception) -> None:
        """Answer a refusal; else give the client an id, and the log the traceback beside it."""
        if isinstance(error, RejectedInput):
            slot.response = render_problem(error.status, error.detail)
            self._log_failure(slot, error.status, error.detail)
            return
        instance = str(uuid.uuid4())
        if _is_out_of_memory(error):
            status, detail = 507, "the model ran out of memory for this request"
        else:
            status, detail = 500, "the model could not answer; its log says why under this id"
        slot.response = render_problem(status, detail, instance=instance)
        trace = "".join(traceback.format_exception(error))
        self._log_failure(slot, status, f"{type(error).__name__}: {error}", instance, trace)

    def _log_failure(
        self, slot: _Slot, status: int, reason: str, instance: str = "", trace: str = ""
    ) -> None:
        """Write one line of JSON; requests that went well leave none."""
        record = {
            "event": "request_failed",
            "request_id": slot.incoming.id,
            "model": self.model_name,
            "version": self.model_version,
            "status": status,
            "reason": reason,
        }
        if instance:
            record |= {"instance": f"urn:uuid:{instance}", "traceback": trace}
        _log.warning(json.dumps(record))

    def _load(self, context: Any, config: Mapping[str, Any]) -> Backend:
        manifest = context.manifest["model"]
        gpu = context.system_properties.get("gpu_id")
        device = torch.device(
            f"cuda:{gpu}" if torch.cuda.is_available() and gpu is not None else "cpu"
        )
        workers = max(int(config.get("minWorkers") or 1), int(config.get("maxWorkers") or 1))
        architecture = manifest.get("modelFile")
        return load_backend(
            str(self.settings.get("backend", "torchscript")),
            self.folder / manifest["serializedFile"],
            device=device,
            threads=int(self.settings.get("threads") or count_threads(workers)),
            architecture=self.folder / architecture if architecture else None,
        )

    def _warm_up(self) -> None:
        """Run the model at the batch sizes to come, so that no client waits for its compiling."""
        if self._example is None:
            return
        for size in sorted({1, 2, self.batch_size}):
            for _ in range(2):  # TorchScript measures in the first run and compiles in the second
                self._infer([_Item(None, self._example)] * size)


_LIMITS = ("max_bytes", "max_items")
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Failed to allocate memory",
    "std::bad_alloc",
    "CUDA out of memory",  # TorchScript raises it as another error than torch does
)
"""What torch, ONNX Runtime and C++ say in a RuntimeError or an error of their own."""
_LOST = render_problem(500, "the handler gave this request no answer")


def _choose(settings: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = settings.get(key, choices[0])
    if value not in choices:
        raise ValueError(f"expected handler.{key} to be one of {choices}, found {value!r}")
    return str(value)


def _name(incoming: Incoming) -> str:
    """Return the id under which a request is logged."""
    return incoming.header_id or incoming.id


def _take_notes(slots: Sequence[_Slot], seconds: float) -> Iterator[Note]:
    """Give the prediction log's notes of requests: of each thing, or of one that failed."""
    now = time.time()
    for slot in slots:
        incoming, request, status = slot.incoming, slot.request, _find_status(slot)
        if request is None or status != 200:
            value, kind = _find_body(incoming.row, incoming.content_type)
            yield Note(now, _name(incoming), 0, status, seconds, value, kind, (), None)
            continue
        # Of several arrays, or a batch in one, no part is one thing.
        is_alike = len(request.parts) == len(slot.items)
        for index, item in enumerate(slot.items):
            value, kind = _find_value(request.parts[index]) if is_alike else (None, "")
            # A view would keep the whole batch in memory.
            tensors, output = _copy(item.tensors), _copy(item.output)
            yield Note(
                *(now, _name(incoming), index, status, seconds, value, kind, tensors, output)
            )


def _find_status(slot: _Slot) -> int:
    return (slot.response or _LOST).status


def _count_notes(slot: _Slot) -> int:
    """Return how many notes a request makes: one of each thing, or one where it failed."""
    return len(slot.items) if _find_status(slot) == 200 else 1


def _copy(value: Any) -> Any:
    """Return what holds no memory of anything else: tensors and arrays are copied."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, tuple):
        copies = [_copy(item) for item in value]
        return value._make(copies) if hasattr(value, "_make") else tuple(copies)
    return value


def _find_value(part: Part) -> tuple[Any, str]:
    """Return what came as bytes, base64 or text, and the type of its bytes; None for numbers."""
    value = part.value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return value, part.content_type
    is_wrapped = isinstance(value, Mapping) and any(
        isinstance(value.get(key), str) for key in ("b64", "data")
    )
    return (part, "") if is_wrapped or isinstance(value, str) else (None, "")


def _find_body(row: Any, content_type: str) -> tuple[Any, str]:
    """Return the body of a request that was refused, or its first part, where that is bytes."""
    fields = [(*pair, content_type) for pair in row.items()] if isinstance(row, Mapping) else row
    for _, value, kind in fields:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return value, kind
    return None, ""


def _unfinished(slots: Sequence[_Slot]) -> Iterator[_Slot]:
    return (slot for slot in slots if slot.response is None)


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: torch and ONNX Runtime raise errors of other kinds for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
