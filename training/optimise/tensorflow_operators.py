"""What each of torch's core ATen operators is in TensorFlow.

TensorFlow's convolutions on a CPU, and TFLite's anywhere, take the channels last. So a convolution
hands on `Maps`, and the operators between two convolutions pass them through as they are: one
transpose at the network's input and one before the first `view`, not two around every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

__all__ = [
    "AXES",
    "Call",
    "Maps",
    "OPERATORS",
    "operator",
    "pad_maps",
    "put_channels_last",
    "put_channels_second",
]

AXES = (0, 3, 1, 2)
"""Where each axis of torch's (N, C, H, W) lies in (N, H, W, C)."""

UNARY = {
    "abs": "abs",
    "ceil": "math.ceil",
    "cos": "cos",
    "elu": "nn.elu",
    "erf": "math.erf",
    "exp": "exp",
    "floor": "floor",
    "log": "math.log",
    "neg": "negative",
    "reciprocal": "math.reciprocal",
    "relu": "nn.relu",
    "round": "round",
    "rsqrt": "math.rsqrt",
    "sigmoid": "sigmoid",
    "silu": "nn.silu",
    "sin": "sin",
    "sqrt": "sqrt",
    "tanh": "tanh",
}

BINARY = {
    "add.Scalar": "add",
    "add.Tensor": "add",
    "div.Scalar": "divide",
    "div.Tensor": "divide",
    "maximum.default": "maximum",
    "minimum.default": "minimum",
    "mul.Scalar": "multiply",
    "mul.Tensor": "multiply",
    "pow.Tensor_Scalar": "pow",
    "pow.Tensor_Tensor": "pow",
    "sub.Scalar": "subtract",
    "sub.Tensor": "subtract",
}


@dataclass(frozen=True)
class Maps:
    """A tensor of (N, H, W, C) that stands for torch's (N, C, H, W)."""

    tensor: Any


@dataclass(frozen=True)
class Call:
    """One operator's place in the graph."""

    tf: Any
    node: fx.Node
    values: dict[fx.Node, Any]
    """What the nodes before it are: tensors, Maps, or arrays for weights and constants."""
    variables: dict[str, Any]
    """The saved module's variables, by node and purpose: a function may be traced twice."""

    @property
    def shape(self) -> list[int]:
        """The result's shape, -1 for the batch."""
        return [size if isinstance(size, int) else -1 for size in self.node.meta["val"].shape]

    def hold(self, purpose: str, array: np.ndarray) -> Any:
        """Return the variable that keeps an array of weights in the saved module."""
        name = f"{self.node.name}/{purpose}"
        if name not in self.variables:
            with self.tf.init_scope():  # out of the graph that is being traced
                weights = np.ascontiguousarray(array, np.float32)
                self.variables[name] = self.tf.Variable(weights, trainable=False, name=name)
        return self.variables[name]

    def read(self, argument: Any) -> Any:
        """Return what an argument of a node is."""
        return self.values[argument] if isinstance(argument, fx.Node) else argument


Operator = Callable[..., Any]
OPERATORS: dict[str, tuple[Operator, bool]] = {}
"""By torch's name: the function, called with a Call and torch's arguments, and whether it takes
Maps. One that does not gets every tensor as torch has it."""


def operator(*names: str, maps: bool = False) -> Callable[[Operator], Operator]:
    """Put a function into the table under torch's names, the leading "aten." left out."""

    def register(function: Operator) -> Operator:
        OPERATORS.update({f"aten.{name}": (function, maps) for name in names})
        return function

    return register


def put_channels_second(tf: Any, value: Any) -> Any:
    """Return a tensor as torch has it; what is no Maps comes back as it is."""
    if not isinstance(value, Maps):
        return value
    height, width, channels = value.tensor.shape[1:]
    if height == width == 1:  # nothing moves, and a reshape costs nothing
        return tf.reshape(value.tensor, [-1, channels, 1, 1])
    return tf.transpose(value.tensor, [0, 3, 1, 2])


def put_channels_last(tf: Any, value: Any) -> Any:
    """Return (N, H, W, C), or something that broadcasts against it, of whatever broadcasts."""
    if isinstance(value, Maps):
        return value.tensor
    rank = np.ndim(value) if isinstance(value, int | float | np.ndarray) else len(value.shape)
    if rank == 0:
        return value
    if isinstance(value, np.ndarray):
        return value.reshape((1,) * (4 - rank) + value.shape).transpose(0, 2, 3, 1)
    for _ in range(4 - rank):
        value = tf.expand_dims(value, 0)
    return tf.transpose(value, [0, 2, 3, 1])


def pad_maps(tf: Any, maps: Any, spans: Sequence[tuple[int, int]], value: float) -> Any:
    """Return (N, H, W, C) with `value` around it: before and after, for H and for W."""
    if not any(before or after for before, after in spans):
        return maps
    return tf.pad(maps, [[0, 0], *spans, [0, 0]], constant_values=value)


# Element by element


def _register_unary(name: str, path: str) -> None:
    @operator(f"{name}.default", maps=True)
    def apply(call: Call, value: Any) -> Any:
        function = call.tf
        for part in path.split("."):
            function = getattr(function, part)
        return Maps(function(value.tensor)) if isinstance(value, Maps) else function(value)


def _register_binary(name: str, function_name: str) -> None:
    @operator(name, maps=True)
    def apply(call: Call, left: Any, right: Any, *, alpha: float = 1) -> Any:
        kind = float if call.node.meta["val"].dtype.is_floating_point else int
        pair = [kind(side) if isinstance(side, int | float) else side for side in (left, right)]
        function = getattr(call.tf.math, function_name)
        maps = len(call.shape) == 4 and any(isinstance(side, Maps) for side in pair)
        change = put_channels_last if maps else put_channels_second
        first, second = (change(call.tf, side) for side in pair)
        result = function(first, second if alpha == 1 else second * kind(alpha))
        return Maps(result) if maps else result


for _name, _path in UNARY.items():
    _register_unary(_name, _path)
for _name, _path in BINARY.items():
    _register_binary(_name, _path)


def _keep_maps(function: Operator) -> Operator:
    """Let a function of one tensor, element by element, take Maps and return Maps."""

    def apply(call: Call, value: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(value, Maps):
            return Maps(function(call, value.tensor, *rest, **options))
        return function(call, value, *rest, **options)

    return apply


@operator("clamp.default", "hardtanh.default", maps=True)
@_keep_maps
def _clamp(call: Call, value: Any, lowest: Any = None, highest: Any = None) -> Any:
    if call.node.target is torch.ops.aten.hardtanh.default:
        lowest, highest = -1 if lowest is None else lowest, 1 if highest is None else highest
    if (lowest, highest) == (0, 6):
        return call.tf.nn.relu6(value)
    if lowest is not None:
        value = call.tf.maximum(value, float(lowest))
    return value if highest is None else call.tf.minimum(value, float(highest))


@operator("hardsigmoid.default", maps=True)
@_keep_maps
def _hardsigmoid(call: Call, value: Any) -> Any:
    return call.tf.nn.relu6(value + 3.0) * (1 / 6)


@operator("hardswish.default", maps=True)
@_keep_maps
def _hardswish(call: Call, value: Any) -> Any:
    return value * call.tf.nn.relu6(value + 3.0) * (1 / 6)


@operator("leaky_relu.default", maps=True)
@_keep_maps
def _leaky_relu(call: Call, value: Any, slope: float = 0.01) -> Any:
    return call.tf.nn.leaky_relu(value, slope)


@operator("gelu.default", maps=True)
@_keep_maps
def _gelu(call: Call, value: Any, approximate: str = "none") -> Any:
    return call.tf.nn.gelu(value, approximate=approximate == "tanh")


@operator("alias.default", "clone.default", "detach.default", "lift_fresh_copy.default", maps=True)
def _keep(call: Call, value: Any, **options: Any) -> Any:
    return value


@operator("_to_copy.default", maps=True)
@_keep_maps
def _to_copy(call: Call, value: Any, **options: Any) -> Any:
    return call.tf.cast(value, str(call.node.meta["val"].dtype).removeprefix("torch."))
