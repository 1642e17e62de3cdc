"""What torch's layers are in TensorFlow: linear, convolution, norm, attention, pooling.

Importing this module adds them to the table in tensorflow_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from .tensorflow_operators import Call, Maps, operator, pad_maps, put_channels_last

__all__: list[str] = []

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
CONVOLUTION = "aten.convolution.default"


def _hold(call: Call, purpose: str, value: Any) -> Any:
    return call.hold(purpose, value) if isinstance(value, np.ndarray) else value


@operator("linear.default")
def _linear(call: Call, rows: Any, weight: Any, bias: Any = None) -> Any:
    # As (in, out), so that nothing is transposed at every request.
    transpose = np.transpose if isinstance(weight, np.ndarray) else call.tf.transpose
    product = call.tf.linalg.matmul(rows, _hold(call, "kernel", transpose(weight)))
    return product if bias is None else product + _hold(call, "bias", bias)


@operator("addmm.default")
def _addmm(call: Call, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _multiply(call, left, right) * float(alpha) + bias * float(beta)


@operator("mm.default", "bmm.default")
def _multiply(call: Call, left: Any, right: Any) -> Any:
    return call.tf.linalg.matmul(_hold(call, "left", left), _hold(call, "right", right))


@operator("scaled_dot_product_attention.default")
def _attend(
    call: Call, query: Any, key: Any, value: Any, mask: Any = None, *rest: Any, **options: Any
) -> Any:
    if any(rest) or options.get("is_causal") or options.get("enable_gqa"):
        raise NotImplementedError("attention that is causal, grouped, or with dropout")
    if mask is not None and call.node.args[3].meta["val"].dtype is torch.bool:  # type: ignore[union-attr]  # it is a node
        raise NotImplementedError("attention with a mask of booleans")
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = call.tf.linalg.matmul(query, key, transpose_b=True) * scale  # (N, heads, L, S)
    return call.tf.linalg.matmul(
        call.tf.nn.softmax(scores if mask is None else scores + mask), value
    )


def _find_norm(convolution: Any, call: Call) -> fx.Node | None:
    """Return the batch norm that a convolution's weights can take in, if there is one."""
    if not isinstance(convolution, fx.Node) or str(convolution.target) != CONVOLUTION:
        return None
    users = list(convolution.users)
    if len(users) != 1 or str(users[0].target) != BATCH_NORM:
        return None
    arrays = (call.read(argument) for argument in convolution.args[1:3])
    return users[0] if all(isinstance(array, np.ndarray | None) for array in arrays) else None


def _read_norm(call: Call, norm: fx.Node) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch norm as scale and shift, each (C,)."""
    weight, bias, mean, variance = (call.read(argument) for argument in norm.args[1:5])
    scale = 1 / np.sqrt(variance + norm.args[6])
    scale = scale if weight is None else scale * weight
    return scale, (0 if bias is None else bias) - mean * scale


@operator(BATCH_NORM.removeprefix("aten."), maps=True)
def _batch_norm(call: Call, value: Any, *rest: Any) -> Any:
    if _find_norm(call.node.args[0], call) is call.node:
        return value, None, None  # its convolution has taken it in
    scale, shift = _read_norm(call, call.node)
    if isinstance(value, Maps):
        return Maps(value.tensor * scale + shift), None, None
    shape = (1, -1) + (1,) * (len(call.node.args[0].meta["val"].shape) - 2)  # type: ignore[union-attr]  # it is a node
    return value * scale.reshape(shape) + shift.reshape(shape), None, None


@operator("native_layer_norm.default")
def _layer_norm(call: Call, value: Any, over: Sequence[int], *affine: Any) -> Any:
    axes = list(range(-len(over), 0))
    mean, variance = call.tf.nn.moments(value, axes, keepdims=True)
    weight, bias, epsilon = affine
    return call.tf.nn.batch_normalization(value, mean, variance, bias, weight, epsilon), None, None


@operator(CONVOLUTION.removeprefix("aten."), maps=True)
def _convolve(
    call: Call,
    value: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if transposed or not isinstance(weight, np.ndarray) or weight.ndim != 4:
        raise NotImplementedError("a convolution transposed, of computed weights, or not in 2-D")
    norm = _find_norm(call.node, call)
    if norm is not None:
        scale, shift = _read_norm(call, norm)
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    maps = put_channels_last(call.tf, value)
    sizes = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    maps, mode = _pad(call.tf, maps, padding, sizes, stride)
    if groups == maps.shape[3] and groups > 1 and len(set(stride)) == 1:
        kernel = weight.reshape(groups, -1, *weight.shape[2:]).transpose(2, 3, 0, 1)
        maps = call.tf.nn.depthwise_conv2d(
            maps, call.hold("kernel", kernel), [1, *stride, 1], mode, dilations=dilation
        )
    else:  # TensorFlow reads the number of groups off the weights' shape
        kernel = call.hold("kernel", weight.transpose(2, 3, 1, 0))
        maps = call.tf.nn.conv2d(maps, kernel, stride, mode, dilations=dilation)
    return Maps(maps if bias is None else maps + call.hold("bias", bias))


def _pad(
    tf: Any, maps: Any, padding: Sequence[int], sizes: Sequence[int], stride: Sequence[int]
) -> tuple[Any, str]:
    """Return maps and the mode that pad as torch does: SAME where it means that, else zeros."""
    same = True
    for size, before, window, step in zip(maps.shape[1:3], padding, sizes, stride, strict=True):
        total = max((math.ceil(size / step) - 1) * step + window - size, 0)
        same &= (total // 2, total - total // 2) == (before, before)
    if same:
        return maps, "SAME"
    return pad_maps(tf, maps, [(p, p) for p in padding], 0.0), "VALID"


# Pooling


@operator("max_pool2d_with_indices.default", maps=True)
def _max_pool(
    call: Call,
    value: Any,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    if set(dilation) != {1}:
        raise NotImplementedError("max pooling with a dilation")
    stride, maps = stride or window, put_channels_last(call.tf, value)
    spans = _measure_spans(maps, window, stride, padding, ceil_mode)
    maps = pad_maps(call.tf, maps, spans, -math.inf)
    return Maps(call.tf.nn.max_pool2d(maps, window, stride, "VALID")), None


@operator("avg_pool2d.default", maps=True)
def _average_pool(
    call: Call,
    value: Any,
    window: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    tf, stride, maps = call.tf, stride or window, put_channels_last(call.tf, value)
    spans = _measure_spans(maps, window, stride, padding, ceil_mode)
    means = tf.nn.avg_pool2d(pad_maps(tf, maps, spans, 0.0), window, stride, "VALID")
    if divisor is not None:
        return Maps(means * (math.prod(window) / divisor))
    # What torch divides by: the window's share inside the maps, or inside them and their padding.
    # What ceil_mode lets hang over the far edge never counts.
    counted = padding if count_padding else (0, 0)
    ones = np.ones((1, *(s + 2 * p for s, p in zip(maps.shape[1:3], counted, strict=True)), 1))
    rest = [(b - p, a - p) for (b, a), p in zip(spans, counted, strict=True)]
    ones = np.pad(ones, [(0, 0), *((b, max(a, 0)) for b, a in rest), (0, 0)])
    shares = _average(ones[0, :, :, 0], window, stride)[: means.shape[1], : means.shape[2]]
    return Maps(means if (shares == 1).all() else means / shares[None, :, :, None])


def _average(plane: np.ndarray, window: Sequence[int], stride: Sequence[int]) -> np.ndarray:
    """Return the windows' means over one (H, W) plane, float32."""
    views = np.lib.stride_tricks.sliding_window_view(plane, tuple(window))
    means: np.ndarray = views[:: stride[0], :: stride[1]].mean((2, 3), dtype=np.float32)
    return means


def _measure_spans(
    maps: Any, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool
) -> list[tuple[int, int]]:
    """Return what to pad before and after, per axis, so that VALID windows are torch's."""
    spans = []
    for size, width, step, pad in zip(maps.shape[1:3], window, stride, padding, strict=True):
        count = (size + 2 * pad - width) / step
        windows = (math.ceil(count) if ceil else math.floor(count)) + 1
        if ceil and (windows - 1) * step >= size + pad:
            windows -= 1  # a window that starts in the far padding is none
        spans.append((pad, max(pad, (windows - 1) * step + width - size - pad)))
    return spans


@operator("_adaptive_avg_pool2d.default")
def _adaptive_average_pool(call: Call, value: Any, sizes: Sequence[int]) -> Any:
    channels, height, width = value.shape[1:]
    if (height, width) == tuple(sizes):
        return value
    shares = np.kron(_compute_shares(height, sizes[0]), _compute_shares(width, sizes[1]))
    planes = call.tf.reshape(value, [-1, channels, height * width])
    return call.tf.reshape(call.tf.linalg.matmul(planes, shares.T), [-1, channels, *sizes])


def _compute_shares(size: int, bins: int) -> np.ndarray:
    """Return (bins, size): each bin's mean as weights, the bins where torch has them."""
    shares = np.zeros((bins, size), np.float32)
    for index in range(bins):
        start, stop = index * size // bins, -(-(index + 1) * size // bins)
        shares[index, start:stop] = 1 / (stop - start)
    return shares
