"""Why a model answered so: how much each part of an input speaks for one of its outputs.

Integrated gradients, saliency and occlusion are Captum's, imported with the first explanation.
Grad-CAM is computed here, from the convolutions that torch runs: Captum's needs hooks, and neither
TorchScript nor an exported program has any.

Settings, under `handler:` in model-config.yaml: explain_method (by default integrated_gradients, or
occlusion where the backend has no gradients), explain_steps (32). A request may say otherwise:
{"data": ..., "method": "saliency", "target": "7"}, or {"instances"/"inputs": ..., "parameters":
{"method": ..., "target": ...}}.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from backend import Backend
from inference_request import InferenceRequest
from inference_response import Arrays, InferenceResponse
from problem import RejectedInput

__all__ = [
    "Attribution",
    "choose_windows",
    "Explainer",
    "Explanation",
    "find_place",
    "find_target",
    "METHODS",
    "Options",
    "write_explanations",
]

METHODS = ("integrated_gradients", "saliency", "occlusion", "grad_cam")
Tensors = tuple[torch.Tensor, ...]
Pick = Callable[[Any], torch.Tensor]
"""Takes (N, K) scores out of what the model gives."""

WINDOWS_PER_STEP = 4
"""A step of integrated gradients, forward and backward, costs about as much."""


class Options(NamedTuple):
    """What one request wants explained."""

    method: str
    target: Any = None
    """A label or an index; None for the output that is largest."""
    output: Any = None
    """Which of the model's outputs, where it has several; None for the first."""


class Attribution(NamedTuple):
    """How much each number of each input speaks for a target."""

    values: Tensors
    """In the inputs' shapes, batch axis included."""
    delta: float | None = None
    """Integrated gradients: by how much their sum misses f(input) - f(zeros)."""


@dataclass(frozen=True)
class Explanation:
    """What a client is told."""

    method: str
    target: Any
    prediction: Any
    attributions: Mapping[str, torch.Tensor]
    """By the inputs' names, or one named attributions; without batch axis."""
    delta: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what JSON says."""
        lists = {name: _round(tensor) for name, tensor in self.attributions.items()}
        delta = {} if self.delta is None else {"convergence_delta": _shorten(self.delta)}
        return {
            "method": self.method,
            "target": self.target,
            "prediction": self.prediction,
            **delta,
            "attributions": lists["attributions"] if set(lists) == {"attributions"} else lists,
        }

    def to_arrays(self) -> Arrays:
        """Return the attributions, and the rest as further arrays."""
        delta = {} if self.delta is None else {"convergence_delta": torch.tensor(self.delta)}
        told = {"method": self.method, "target": self.target, "prediction": self.prediction}
        texts = {name: [str(value)] for name, value in told.items()}
        return {**self.attributions, **delta, **texts}

    def to_headers(self) -> dict[str, str]:
        """Return what a picture cannot say."""
        return {"x-method": self.method, "x-target": quote(str(self.target))}


def write_explanations(
    write: Callable[..., InferenceResponse],
    request: InferenceRequest,
    found: Sequence[Explanation],
) -> InferenceResponse:
    """Answer a request in its own form, by its handler's `write`: one explanation a thing."""
    return write(
        request, [item.to_json() for item in found], lambda: [item.to_arrays() for item in found]
    )


class Explainer:
    """Explains the outputs of one model, an input at a time."""

    def __init__(self, backend: Backend, settings: Mapping[str, Any], *, batch: int) -> None:
        """`batch` is how many inputs the model may get at once.

        Raises:
            ValueError: a setting that means nothing.
        """
        self._backend = backend
        self._batch = batch
        usual = "integrated_gradients" if backend.module is not None else "occlusion"
        self.method = str(settings.get("explain_method", usual))
        self.steps = int(settings.get("explain_steps", 32))
        if self.method not in METHODS or self.steps < 1:
            raise ValueError(
                f"expected handler.explain_method to be one of {METHODS} and explain_steps 1 or "
                f"more, found {self.method!r} and {self.steps}"
            )

    @property
    def most_windows(self) -> int:
        """How often occlusion may ask the model."""
        return WINDOWS_PER_STEP * self.steps

    def read_options(self, request: InferenceRequest) -> Options:
        """Read what a request says of its explanation.

        Raises:
            RejectedInput: 422 for a method that is none of METHODS.
        """
        given = request.parameters
        if request.form == "one" and isinstance(request.parts[0].value, Mapping):
            given = request.parts[0].value
        method = given.get("method", self.method)
        if method not in METHODS:
            raise RejectedInput(
                422, f"expected a method of {', '.join(METHODS)}, found {str(method)[:40]!r}"
            )
        return Options(method, given.get("target"), given.get("output"))

    def attribute(
        self,
        method: str,
        inputs: Tensors,
        target: int,
        *,
        pick: Pick = lambda output: output,
        windows: Sequence[tuple[int, ...]] = (),
    ) -> Attribution:
        """Explain one output for one input (a batch of one).

        `windows` are what occlusion hides at once, a shape for each input; where not given they are
        chosen.

        Raises:
            RejectedInput: 501 for a method that this model, or this environment, has not.
        """
        if method == "occlusion":
            return self._occlude(inputs, target, pick, windows)
        module = self._require_gradients(method, inputs)
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            scores = pick(module(*tensors))
            if torch.is_grad_enabled() and not scores.requires_grad:
                raise RejectedInput(
                    501, f"{method} needs an output with gradients: ask for the method occlusion"
                )
            # An input that an output does not depend on has the gradient zero, and not none.
            for tensor in tensors:
                scores = scores + 0 * tensor.reshape(len(tensor), -1)[:, :1].sum(1, keepdim=True)
            return scores

        if method == "grad_cam":
            return _run_grad_cam(forward, inputs, target)
        captum = _import_captum()
        if method == "saliency":
            return Attribution(captum.Saliency(forward).attribute(inputs, target=target))
        values, delta = captum.IntegratedGradients(forward).attribute(
            inputs,
            baselines=(0,) * len(inputs),
            target=target,
            n_steps=self.steps,
            internal_batch_size=min(self.steps, self._batch),
            return_convergence_delta=True,
        )
        return Attribution(tuple(value.detach() for value in values), float(delta))

    def _occlude(
        self, inputs: Tensors, target: int, pick: Pick, windows: Sequence[tuple[int, ...]]
    ) -> Attribution:
        """Hide a window after the other; what the output then loses is the window's share."""
        most = max(1, self.most_windows // len(inputs))
        shapes = tuple(windows) or tuple(choose_windows(x.shape[1:], most) for x in inputs)
        occlusion = _import_captum().Occlusion(lambda *x: pick(self._backend.run(*x)))
        values = occlusion.attribute(
            inputs,
            sliding_window_shapes=shapes,
            strides=shapes,
            baselines=(0,) * len(inputs),
            target=target,
            perturbations_per_eval=self._batch,
        )
        return Attribution(values)

    def _require_gradients(self, method: str, inputs: Tensors) -> Callable[..., Any]:
        module = self._backend.module
        if module is None:
            raise RejectedInput(
                501,
                f"{method} needs gradients, and the backend {self._backend.name} has none: "
                "ask for the method occlusion, or serve the model as TorchScript",
            )
        if not all(tensor.is_floating_point() for tensor in inputs):
            raise RejectedInput(
                501, f"{method} needs inputs of floating point: ask for the method occlusion"
            )
        return module


def find_target(target: Any, labels: Sequence[str], predicted: int) -> int:
    """Return the index of a label or an index; of the prediction where none is given.

    Raises:
        RejectedInput: 422 for neither.
    """
    if target is None:
        return predicted
    if isinstance(target, str) and target in labels:
        return labels.index(target)
    text = str(target)
    if text.isdecimal() and len(text) < 10 and int(text) < len(labels):
        return int(text)
    raise RejectedInput(
        422, f"expected target to be a label or an index below {len(labels)}, found {text[:40]!r}"
    )


def find_place(target: Any, shape: Sequence[int], largest: int) -> int:
    """Return the flat index of one number of an output; of the largest where none is given.

    Raises:
        RejectedInput: 422 where the output has no such number.
    """
    if target is None:
        return largest
    place = target if isinstance(target, list) else [target]
    sizes = tuple(shape) or (1,)
    if [type(i) for i in place] == [int] * len(sizes) and all(
        0 <= i < size for i, size in zip(place, sizes, strict=True)
    ):
        return int(np.ravel_multi_index(place, sizes))
    example = [0] * len(sizes) if len(sizes) > 1 else 0
    raise RejectedInput(
        422, f"expected target to be a place in an output of shape {list(sizes)}, such as {example}"
    )


def choose_windows(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the smallest cube of which at most `most` cover a shape."""
    # At least this long, or their volumes would not do.
    least = (math.prod(shape) / most) ** (1 / max(1, len(shape)))
    for side in range(max(1, int(least)), max(shape, default=1) + 1):
        window = tuple(min(side, size) for size in shape)
        if math.prod(-(-size // part) for size, part in zip(shape, window, strict=True)) <= most:
            return window
    return tuple(shape)


def _run_grad_cam(
    forward: Callable[..., torch.Tensor], inputs: Tensors, target: int
) -> Attribution:
    """Weigh the last convolution's maps by the mean of their gradients (Selvaraju et al., 2017)."""
    with _Convolutions() as seen:
        torch.autograd.grad(forward(*inputs)[0, target], inputs)
    if seen.last is None or inputs[0].dim() != 4:
        raise RejectedInput(
            501,
            "grad_cam needs a model with convolutions over height and width: "
            "ask for integrated_gradients, saliency or occlusion",
        )
    maps, gradient = seen.last
    heat = functional.relu((maps * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))
    size = tuple(inputs[0].shape[2:])
    return Attribution((functional.interpolate(heat, size, mode="bilinear").detach(),))


class _Convolutions(TorchDispatchMode):
    """Sees each convolution run, whoever calls it, and which is the first that gradients reach.

    Backwards the first one is the last: the one that Grad-CAM looks at.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: list[tuple[int, int, torch.Tensor]] = []
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        """Its maps (1, C, H, W), and the gradient that arrives at them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func in (aten.convolution.default, aten._convolution.default):
            # Copied: a ReLU may come that overwrites it.
            self._seen.append((args[0].data_ptr(), args[1].data_ptr(), result.clone()))
        elif func is aten.convolution_backward.default and self.last is None:
            gradient, image, weight = args[:3]
            for seen_image, seen_weight, maps in self._seen:
                is_same = (seen_image, seen_weight) == (image.data_ptr(), weight.data_ptr())
                if is_same and maps.dim() == 4 and maps.shape == gradient.shape:
                    self.last = maps, gradient.clone()
        return result


def _round(tensor: torch.Tensor) -> Any:
    """Return nested lists of six digits each: a third of the bytes, and more than float32 means."""
    flat = [_shorten(value) for value in tensor.detach().cpu().flatten().tolist()]
    return np.array(flat, dtype=np.float64).reshape(tensor.shape).tolist()


def _shorten(value: float) -> float:
    return float(f"{value:.6g}")


def _import_captum() -> Any:
    try:
        return importlib.import_module("captum.attr")
    except ModuleNotFoundError as exc:
        raise RejectedInput(
            501,
            "explanations need Captum in the server's environment: pip install captum",
        ) from exc
