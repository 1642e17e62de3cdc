"""What torch's reductions, and what only moves values, are in TensorFlow.

Importing this module adds them to the table in tensorflow_operators.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .tensorflow_operators import AXES, Call, Maps, operator, pad_maps, put_channels_last
from .tensorflow_operators import put_channels_second as put_second

__all__: list[str] = []


# Reductions


def _register_reduction(name: str, function_name: str) -> None:
    @operator(name, maps=True)
    def reduce(call: Call, value: Any, axes: Any = (), keep: bool = False, **options: Any) -> Any:
        function = getattr(call.tf, function_name)
        axes = [axes] if isinstance(axes, int) else list(axes or range(len(_shape(value))))
        if isinstance(value, Maps):
            kept = Maps(function(value.tensor, [AXES[a % 4] for a in axes], keepdims=True))
            if keep:
                return kept
            return call.tf.squeeze(put_second(call.tf, kept), axes)
        return function(value, axes, keepdims=keep)


for _name, _function in {
    "amax.default": "reduce_max",
    "amin.default": "reduce_min",
    "mean.dim": "reduce_mean",
    "sum.dim_IntList": "reduce_sum",
}.items():
    _register_reduction(_name, _function)


def _shape(value: Any) -> Any:
    return value.tensor.shape if isinstance(value, Maps) else value.shape


@operator("_softmax.default")
def _softmax(call: Call, value: Any, axis: int, half: bool) -> Any:
    return call.tf.nn.softmax(value, axis)


@operator("_log_softmax.default")
def _log_softmax(call: Call, value: Any, axis: int, half: bool) -> Any:
    return call.tf.nn.log_softmax(value, axis)


# What moves values and computes none


@operator("sym_size.int", maps=True)
def _size(call: Call, value: Any, axis: int) -> Any:
    if isinstance(value, Maps):
        return call.tf.shape(value.tensor)[AXES[axis % 4]]
    return call.tf.shape(value)[axis]


@operator("view.default", "_unsafe_view.default", "reshape.default")
def _view(call: Call, value: Any, shape: Sequence[Any]) -> Any:
    known = call.shape
    # One unknown size, the batch, stays out of the graph: TFLite then knows the others.
    if known.count(-1) > 1:
        known = list(shape)
    return call.tf.reshape(value, known)


@operator("as_strided.default")
def _restride(call: Call, value: Any, *rest: Any) -> Any:
    now, before = call.node.meta["val"], call.node.args[0].meta["val"]  # type: ignore[union-attr]  # it is a node
    strides = [
        [step for step, size in zip(fake.stride(), fake.shape, strict=True) if size != 1]
        for fake in (now, before)
    ]
    if now.shape != before.shape or strides[0] != strides[1]:
        raise NotImplementedError("as_strided that moves values")
    return value


@operator("permute.default", maps=True)
def _permute(call: Call, value: Any, order: Sequence[int]) -> Any:
    order = [axis % len(order) for axis in order]
    if isinstance(value, Maps):
        if order == [0, 2, 3, 1]:  # torch wants the channels last itself
            return value.tensor
        value = put_second(call.tf, value)
    elif order == list(AXES):
        return Maps(value)
    return (
        np.transpose(value, order)
        if isinstance(value, np.ndarray)
        else call.tf.transpose(value, order)
    )


@operator("cat.default", maps=True)
def _concatenate(call: Call, values: Sequence[Any], axis: int = 0) -> Any:
    if any(isinstance(value, Maps) for value in values):
        maps = [put_channels_last(call.tf, value) for value in values]
        return Maps(call.tf.concat(maps, AXES[axis % 4]))
    return call.tf.concat(values, axis)


@operator("stack.default")
def _stack(call: Call, values: Sequence[Any], axis: int = 0) -> Any:
    return call.tf.stack(values, axis)


@operator("split_with_sizes.default", maps=True)
def _split(call: Call, value: Any, sizes: Sequence[int], axis: int = 0) -> Any:
    if isinstance(value, Maps):
        parts = call.tf.split(value.tensor, list(sizes), AXES[axis % 4])
        return [Maps(part) for part in parts]
    return call.tf.split(value, list(sizes), axis)


@operator("slice.Tensor")
def _slice(
    call: Call, value: Any, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Any:
    axis %= len(value.shape)
    if isinstance(stop, int) and stop > 2**31 - 1:  # torch's way of saying to the end
        stop = None
    return value[(slice(None),) * axis + (slice(start, stop, step),)]


@operator("select.int")
def _select(call: Call, value: Any, axis: int, index: Any) -> Any:
    return (
        call.tf.gather(value, index, axis=axis)
        if not isinstance(index, int)
        else value[(slice(None),) * (axis % len(value.shape)) + (index,)]
    )


@operator("unsqueeze.default")
def _unsqueeze(call: Call, value: Any, axis: int) -> Any:
    return call.tf.expand_dims(value, axis)


@operator("squeeze.dims", "squeeze.dim")
def _squeeze(call: Call, value: Any, axes: Any) -> Any:
    axes = [axes] if isinstance(axes, int) else axes
    return call.tf.squeeze(value, [axis for axis in axes if value.shape[axis] == 1])


@operator("expand.default")
def _expand(call: Call, value: Any, shape: Sequence[Any]) -> Any:
    present, added = call.tf.shape(value), len(shape) - len(value.shape)
    sizes = [
        known if known != -1 else present[axis - added] if isinstance(given, int) else given
        for axis, (given, known) in enumerate(zip(shape, call.shape, strict=True))
    ]
    return call.tf.broadcast_to(value, sizes)


@operator("constant_pad_nd.default", maps=True)
def _constant_pad(call: Call, value: Any, pad: Sequence[int], fill: float = 0.0) -> Any:
    if min(pad) < 0:
        raise NotImplementedError("padding by less than nothing")
    spans = [(pad[index], pad[index + 1]) for index in range(0, len(pad), 2)][::-1]
    if isinstance(value, Maps) and len(spans) == 2:
        return Maps(pad_maps(call.tf, value.tensor, spans, float(fill)))
    value = put_second(call.tf, value)
    spans = [(0, 0)] * (len(value.shape) - len(spans)) + spans
    return call.tf.pad(value, spans, constant_values=float(fill))
