"""Tensor: any model, arrays in and arrays out.

In: npy; JSON lists; KServe v1 {"instances": [...]} and v2 {"inputs": [{name, shape, datatype,
data}]}; TensorFlow Serving's {"inputs": ...}; several inputs by their names. An array with one
dimension more than an input has is a batch of them.
Out: JSON lists, npy, raw numbers, v2; for a batch a list, in order.
At /explanations: how much each number of the inputs speaks for a number of the output.

Settings, under `handler:` in model-config.yaml: inputs (a list of {name, shape, datatype,
allow_nan}; shape without the batch axis, null where free), max_elements, and those of attribution
and batch_handler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from array_input import Array, ArrayLimits, InputSpec, read_array
from attribution import Explainer, Explanation, find_place, write_explanations
from backend import ModelInput
from batch_handler import BatchHandler
from collation import Tensors
from inference_request import InferenceRequest, Part
from inference_response import NAMES, Arrays, InferenceResponse
from logits import find_best, fold_logits, score_logits, to_logits
from prediction_log import Observation
from problem import RejectedInput

__all__ = ["TensorHandler"]

MOST_FEATURES = 64
"""Numbers of an input that are features; a longer one is no row of a table."""


class TensorHandler(BatchHandler):
    """Gives a model the arrays of a request, and the client the model's."""

    def configure(self) -> None:
        """Read what the model takes, from the settings or from the model file itself."""
        declared = self.settings.get("inputs")
        if declared:
            self.inputs = tuple(InputSpec.parse(item) for item in declared)
        else:
            self.inputs = tuple(
                InputSpec(item.name, item.shape, NAMES.get(item.dtype))
                for item in self.backend.inputs or (ModelInput("input"),)
            )
        self.array_limits = ArrayLimits(
            max_elements=int(self.settings.get("max_elements", ArrayLimits.max_elements))
        )
        self.explainer = Explainer(self.backend, self.settings, batch=self.max_batch)
        self.labels = _read_labels(self.folder)
        self.columns = _read_columns(self.folder)

    def make_example(self) -> tuple[torch.Tensor, ...] | None:
        """Return zeros where the settings declare shapes."""
        if any(item.shape is None or None in item.shape for item in self.inputs):
            return None
        return tuple(
            torch.from_numpy(item.check(np.zeros(item.shape or (), "float32")))
            for item in self.inputs
        )

    def read(self, request: InferenceRequest) -> Sequence[tuple[Array, ...]]:
        """Return the inputs of each thing to predict, one array an input."""
        if request.form == "v1":
            return [self._read_instance(part) for part in request.parts]
        named = {part.name: part for part in request.parts}
        if len(named) < len(request.parts):  # files, each a thing by itself
            if len(self.inputs) > 1:
                raise RejectedInput(422, "expected each input once, found one several times")
            return [(read_array(part, self.array_limits),) for part in request.parts]
        if len(self.inputs) > 1 or (request.form in ("v2", "columns") and "" not in named):
            columns = [self._read_named(named, item) for item in self.inputs]
        elif request.form == "many":
            return [(read_array(part, self.array_limits),) for part in request.parts]
        else:
            columns = [read_array(request.parts[0], self.array_limits)]
        return self._split(request, columns)

    def make_tensor(self, decoded: tuple[Array, ...]) -> tuple[torch.Tensor, ...]:
        """Return the arrays as tensors, in the order of the model's inputs."""
        return tuple(
            torch.from_numpy(np.asarray(item.check(array)))  # a row of a vector is no array
            for item, array in zip(self.inputs, decoded, strict=True)
        )

    def make_answer(self, output: Any) -> Any:
        """Return the output as lists, by name where the model names its outputs."""
        if isinstance(output, Mapping):
            return {str(name): self.make_answer(value) for name, value in output.items()}
        if isinstance(output, tuple):
            return [self.make_answer(value) for value in output]
        return output.tolist()

    def make_arrays(self, output: Any) -> Arrays:
        """Return the outputs by name; those without one are output_0, output_1."""
        if isinstance(output, Mapping):
            return {str(name): value for name, value in output.items()}
        if isinstance(output, tuple):
            return {f"output_{index}": value for index, value in enumerate(output)}
        return {"output": output}

    def describe(self, inputs: Sequence[Tensors], outputs: Sequence[Any]) -> list[Observation]:
        """Return a row's numbers by their columns, and what the model makes of it.

        That is a label with its probability where the archive has one for each number of the
        output, else the number itself.
        """
        features = [self._name_features(tensors) for tensors in inputs]
        logits = self._find_logits(outputs)
        if logits is None:
            return [
                Observation(features=named, prediction=_write_number(output))
                for named, output in zip(features, outputs, strict=True)
            ]
        columns = (*(column.tolist() for column in find_best(logits)), fold_logits(logits).tolist())
        return [
            Observation(
                features=named,
                prediction=self.labels[best],
                confidence=confidence,
                embedding=embedding,
            )
            for named, best, confidence, embedding in zip(features, *columns, strict=True)
        ]

    def score(self, outputs: Sequence[Any], kind: str) -> Sequence[float | None]:
        """Return how far each thing is from what the model learnt, where its outputs are logits."""
        logits = self._find_logits(outputs)
        if logits is None:
            return super().score(outputs, kind)
        scores: list[float] = score_logits(logits, kind).tolist()
        return scores

    def _name_features(self, tensors: Tensors) -> dict[str, float]:
        if len(tensors) != 1 or tensors[0].dim() > 1 or tensors[0].numel() > MOST_FEATURES:
            return {}
        numbers = tensors[0].reshape(-1).tolist()
        if len(numbers) == len(self.columns):
            return dict(zip(self.columns, numbers, strict=True))
        return {f"value_{place}": number for place, number in enumerate(numbers)}

    def _find_logits(self, outputs: Sequence[Any]) -> np.ndarray[Any, Any] | None:
        """Return (N, classes) logits where each output has one number for each label."""
        shape = (len(self.labels),)
        if not self.labels or not all(
            isinstance(item, torch.Tensor) and item.shape == shape for item in outputs
        ):
            return None
        return to_logits(np.stack([output.float().numpy() for output in outputs]))

    def explain(self, request: InferenceRequest, inputs: Sequence[Tensors]) -> InferenceResponse:
        """Answer how much each number of the inputs speaks for a number of the output."""
        found = [self._explain_item(request, item) for item in inputs]
        return write_explanations(self.write, request, found)

    def _explain_item(self, request: InferenceRequest, tensors: Tensors) -> Explanation:
        options = self.explainer.read_options(request)
        inputs = tuple(tensor[None].to(self.backend.device) for tensor in tensors)

        def pick(outputs: Any) -> torch.Tensor:
            output = _choose_output(outputs, options.output)
            return output.reshape(len(output), -1)

        with torch.inference_mode():
            outputs = self.backend.run(*inputs)
        scores = pick(outputs)[0]
        shape = tuple(_choose_output(outputs, options.output).shape[1:])
        index = find_place(options.target, shape, int(scores.argmax()))
        values, delta = self.explainer.attribute(options.method, inputs, index, pick=pick)
        names = [item.name for item in self.inputs] if len(inputs) > 1 else ["attributions"]
        place = [int(number) for number in np.unravel_index(index, shape or (1,))]
        return Explanation(
            method=options.method,
            target=place if len(place) > 1 else place[0],
            prediction=float(scores[index]),
            attributions={name: value[0] for name, value in zip(names, values, strict=True)},
            delta=delta,
        )

    def _read_instance(self, part: Part) -> tuple[Array, ...]:
        """Read one instance of v1: an array, or a mapping of named ones."""
        value = part.value
        names = {item.name for item in self.inputs}
        if isinstance(value, Mapping) and names <= set(value):
            parts = {name: Part(value[name], part.content_type, name) for name in names}
            return tuple(self._read_named(parts, item) for item in self.inputs)
        if len(self.inputs) > 1:
            raise RejectedInput(422, f"expected an object with {sorted(names)} for each instance")
        return (read_array(part, self.array_limits),)

    def _read_named(self, parts: Mapping[str, Part], spec: InputSpec) -> Array:
        if spec.name not in parts:
            raise RejectedInput(
                422,
                f"expected inputs {[item.name for item in self.inputs]}, "
                f"found {sorted(name[:40] for name in parts)[:8]}",
            )
        return read_array(parts[spec.name], self.array_limits)

    def _split(
        self, request: InferenceRequest, columns: Sequence[Array]
    ) -> Sequence[tuple[Array, ...]]:
        """Take a batch apart; whether it is one, the declared rank says, else the protocol."""
        first, spec = columns[0], self.inputs[0]
        if request.form == "one" and spec.shape is not None and first.ndim == len(spec.shape):
            return [tuple(columns)]
        sizes = {array.shape[0] if array.ndim else 0 for array in columns}
        if len(sizes) != 1 or 0 in sizes:
            raise RejectedInput(422, f"expected inputs with one batch axis, found {sorted(sizes)}")
        if max(sizes) > self.limits.max_items:
            raise RejectedInput(
                413, f"expected at most {self.limits.max_items} items, found {max(sizes):,}"
            )
        if request.form == "one":
            request.form = "many"
        return list(zip(*columns, strict=True))


def _choose_output(outputs: Any, wanted: Any) -> torch.Tensor:
    """Return one of a model's outputs: by name or number, or else the first."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    named = outputs if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    if wanted is None:
        wanted = next(iter(named))
    if isinstance(wanted, (str, int)) and wanted in named:
        output: torch.Tensor = named[wanted]
        return output
    raise RejectedInput(422, f"expected output to be one of {list(named)}")


def _read_labels(folder: Path) -> tuple[str, ...]:
    """Return the archive's labels; none where it has no classes.json."""
    path = folder / "classes.json"
    return tuple(map(str, json.loads(path.read_text(encoding="utf-8")))) if path.is_file() else ()


def _read_columns(folder: Path) -> tuple[str, ...]:
    """Return the names of a table's columns, as the training's reference has them, if there is one.

    They name what is logged, and no more: a reference that cannot be read stops no worker.
    """
    try:
        with np.load(folder / "reference.npz", allow_pickle=False) as reference:
            return tuple(reference["feature_names"].tolist())
    except Exception:  # whatever zipfile, zlib and numpy raise for a broken one
        return ()


def _write_number(output: Any) -> str | None:
    if isinstance(output, torch.Tensor) and output.numel() == 1:
        return f"{output.item():.6g}"
    return None
