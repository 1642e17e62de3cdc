"""Quantisation: weights, and most activations, as 8-bit integers instead of float32.

Calibration is a (N, ...) float32 tensor of what the model takes, from the training split alone:
the ranges of the activations are read from it.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marwright.errors import ExportError
from marwright.storage import write_file

from ..extras import import_extra
from ..forms import explain_failure, export_program, quieten
from ..origin import read_first_line

__all__ = [
    "quantise_aware",
    "quantise_dynamic",
    "quantise_onnx",
    "quantise_onnx_dynamic",
    "quantise_openvino",
    "quantise_program",
    "quantise_static",
]

CALIBRATION_BATCH = 32
PERCENTILE = 99.9
"""Of the activations within the range of an ONNX file's int8; minimum and maximum lost a point more
on the shapes pruned to a half."""


def quantise_dynamic(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers have int8 weights; activations are quantised as they come.

    Raises:
        ExportError: it has no linear layers.
    """
    if not any(isinstance(layer, nn.Linear) for layer in model.modules()):
        raise ExportError("there is nothing to quantise dynamically", expected="linear layers")
    with _ignore_deprecation():
        from torch.ao.quantization import quantize_dynamic

        quantised: nn.Module = quantize_dynamic(
            copy.deepcopy(model).eval(), {nn.Linear}, dtype=torch.qint8
        )
    return quantised


def quantise_static(
    model: nn.Module, calibration: torch.Tensor, example: torch.Tensor
) -> torch.fx.GraphModule:
    """Return an int8 copy, for TorchScript.

    Normalisation and temperature stay float: they stand outside the first and the last layer.

    Raises:
        ExportError: torch.fx cannot follow the network; names the layer.
    """
    copied = copy.deepcopy(model).eval()
    with _ignore_deprecation(), explain_failure("quantisation", copied):
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        mapping = get_default_qconfig_mapping(_find_engine())
        prepared = prepare_fx(copied, mapping, (example,))
        _calibrate(prepared, calibration)
        return _strip_types(convert_fx(prepared))


def quantise_aware(
    model: nn.Module, fit: Callable[[nn.Module], None], example: torch.Tensor
) -> torch.fx.GraphModule:
    """Return an int8 copy that was trained while its weights and activations were rounded.

    `fit` trains in place a module that takes what `model` takes.

    Raises:
        ExportError: torch.fx cannot follow the network; names the layer.
    """
    copied = copy.deepcopy(model).train().requires_grad_(True)
    with _ignore_deprecation():
        from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

        with explain_failure("quantisation", copied):
            mapping = get_default_qat_qconfig_mapping(_find_engine())
            prepared = prepare_qat_fx(copied, mapping, (example,))
        fit(prepared)
        prepared.eval().apply(disable_observer)
        with explain_failure("quantisation", copied):
            return _strip_types(convert_fx(prepared))


def quantise_program(
    model: nn.Module, calibration: torch.Tensor, example: torch.Tensor
) -> torch.fx.GraphModule:
    """Return an int8 copy, for torch.export and AOTInductor.

    Raises:
        UsageError: torchao is not installed.
        ExportError: torch.export cannot follow the network; names the layer.
    """
    captured = export_program(_separate_calls(model), example).module()
    with explain_failure("quantisation", model), quieten():
        prepare, convert, quantizer = _import_torchao()
        prepared = prepare(captured, quantizer)
        _calibrate(prepared, calibration)
        return _drop_unused(convert(prepared))


def quantise_onnx(source: Path, target: Path, calibration: torch.Tensor) -> None:
    """Write an int8 copy of an ONNX file: QDQ, a scale for each channel of the weights.

    Raises:
        UsageError: onnxruntime is not installed.
        ExportError: onnxruntime cannot quantise it.
    """
    quantization = _import_onnx()
    with _write_onnx(source, target) as (prepared, made):
        base = quantization.CalibrationDataReader  # it wants a subclass of its own
        reader = _make_reader(base, _read_input(source), calibration)
        quantization.quantize_static(
            prepared,
            made,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            # The outermost values of a few items would take the range from all others.
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE},
            # Two int8 products added in 16 bits overflow on processors without VNNI.
            reduce_range=True,
        )


def quantise_onnx_dynamic(source: Path, target: Path) -> None:
    """Write a copy of an ONNX file whose linear layers have int8 weights.

    Convolutions stay float32: theirs would be slower than that.

    Raises:
        UsageError: onnxruntime is not installed.
        ExportError: onnxruntime cannot quantise it.
    """
    quantization = _import_onnx()
    with _write_onnx(source, target) as (prepared, made):
        quantization.quantize_dynamic(
            prepared,
            made,
            op_types_to_quantize=["MatMul"],
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


def quantise_openvino(converted: Any, calibration: torch.Tensor) -> Any:
    """Return an int8 copy of an OpenVINO model.

    Raises:
        UsageError: nncf is not installed.
        ExportError: nncf cannot quantise it.
    """
    nncf = import_extra("nncf", "quantising for openvino")
    batches = [batch.numpy() for batch in calibration.split(CALIBRATION_BATCH)]
    with _translate("nncf"), quieten():
        return nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))


def _strip_types(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Remove the annotations of a traced module: TorchScript reads them, and not all."""
    for node in module.graph.nodes:
        node.type = None
    module.recompile()
    return module


def _separate_calls(model: nn.Module) -> nn.Module:
    """Return the model, as torch.fx sees it, with a layer of its own for each activation.

    torchao takes all calls of one layer for one operation, and finds two outputs where there
    should be one: a residual network calls the same ReLU twice.
    """
    try:
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    except Exception:  # what torch.fx cannot follow stays as it is
        return model
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    called: set[str] = set()
    for node in calls:
        layer = traced.get_submodule(node.target)
        if node.target in called and not list(layer.parameters()):
            node.target = f"{node.target}_{node.name}"
            traced.add_submodule(node.target, copy.deepcopy(layer))
        called.add(node.target)
        node.meta.pop("nn_module_stack", None)  # the tracer's, in which both calls have one name
    traced.recompile()
    return traced


def _drop_unused(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Remove the float weights, which the int8 ones replaced: they would be written too."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    return module


def _calibrate(prepared: nn.Module, calibration: torch.Tensor) -> None:
    with torch.no_grad():
        for batch in calibration.split(CALIBRATION_BATCH):
            prepared(batch)


def _find_engine() -> str:
    """Return whose defaults to quantise for; x86's keep activations to 7 bits where there is need.

    Without VNNI two products of 8 bits are added in 16, which can overflow.
    """
    engines = torch.backends.quantized.supported_engines
    return "x86" if "x86" in engines else torch.backends.quantized.engine


@contextmanager
def _ignore_deprecation() -> Iterator[None]:
    """Silence what torch.ao says of its own end: it works, and TorchScript has no other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        # An observer's advice about arguments that torch.ao itself passed.
        warnings.filterwarnings("ignore", ".*reduce_range will be deprecated", UserWarning)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, ", UserWarning)
        yield


def _import_torchao() -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return how to prepare and convert a program, and the quantizer for this processor."""
    package, purpose = "torchao.quantization.pt2e", "quantising exported programs"
    steps = import_extra(f"{package}.quantize_pt2e", purpose)
    x86 = import_extra(f"{package}.quantizer.x86_inductor_quantizer", purpose)
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=True)
    return steps.prepare_pt2e, steps.convert_pt2e, x86.X86InductorQuantizer().set_global(config)


def _import_onnx(module: str = "quantization") -> Any:
    purpose = "quantising ONNX files"
    import_extra("onnx", purpose)
    with quieten():
        return import_extra(f"onnxruntime.{module}", purpose)


@contextmanager
def _write_onnx(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the source with known shapes and folded batch norm, and where to write the result."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, made = Path(folder) / "prepared.onnx", Path(folder) / "made.onnx"
        with _translate("onnxruntime"), quieten():
            shapes = _import_onnx("quantization.shape_inference")
            # Its symbolic inference is for transformers, and fails on free batch sizes elsewhere.
            shapes.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            yield prepared, made
        with write_file(target) as stream:
            stream.write(made.read_bytes())


@contextmanager
def _translate(tool: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # they raise of many kinds
        raise ExportError(
            f"{tool} cannot quantise this model",
            found=read_first_line(exc),
            remedy="leave out the quantised variants of this backend",
        ) from exc


def _read_input(source: Path) -> str:
    """Return the name of an ONNX file's one input."""
    model = import_extra("onnx", "quantising ONNX files").load(source, load_external_data=False)
    name: str = model.graph.input[0].name
    return name


def _make_reader(base: type, name: str, calibration: torch.Tensor) -> Any:
    """Return a reader that gives one item a call, then None, as onnxruntime asks for them.

    Its percentiles cannot be taken over batches of unlike sizes, such as a last smaller one.
    """
    batches = iter(calibration.split(1))

    class Reader(base):  # type: ignore[misc]  # onnxruntime is untyped
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()
