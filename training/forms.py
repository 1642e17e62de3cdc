"""Writing a network in the form that a backend loads."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from marwright.errors import ExportError, MarwrightError, UsageError
from marwright.storage import write_file

from .extras import import_extra
from .origin import find_layer, find_operator, name_layer, read_first_line

__all__ = [
    "check_compiler",
    "convert_openvino",
    "explain_failure",
    "export_model",
    "export_program",
    "quieten",
    "SUFFIXES",
    "write_openvino",
]

SUFFIXES = {
    "torchscript": ".pt",
    "onnx": ".onnx",
    "exported": ".pt2",
    "aotinductor": ".pt2",
    "openvino": ".xml",
}
"""Of the file that each backend loads; OpenVINO's has a .bin of the same name beside it."""
ONNX_OPSET = 20
"""Operator set of the ONNX files: the newest that onnxruntime 1.17 of February 2024 reads."""
LARGEST_BATCH = 1024
"""What exported programs take at most: torch.export wants a bound, and enforces it."""

_log = logging.getLogger(__name__)


def export_model(model: nn.Module, backend: str, path: Path, example: torch.Tensor) -> None:
    """Write a model that takes batches of any size, of items shaped like those of `example`.

    The file appears whole or not at all. For openvino its weights appear before it, as a .bin.

    Raises:
        UsageError: no such backend, or what it needs is not installed.
        ExportError: the backend cannot express the model; names the operator and the layer.
        StorageError: the file cannot be written.
    """
    if backend not in _WRITERS:
        raise UsageError(
            f"no model can be exported for backend {backend!r}", expected=", ".join(_WRITERS)
        )
    if not isinstance(model, torch.fx.GraphModule):  # made for inference, and may refuse eval()
        model.eval()
    _WRITERS[backend](model, path, _make_batch(example))


def export_program(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """Return the program of a model, of a free batch size, for items like those of `example`.

    Raises:
        ExportError: torch.export cannot follow the model; names the layer.
    """
    sizes = ({0: torch.export.Dim("batch", max=LARGEST_BATCH)},)
    with explain_failure("torch.export", model), quieten(), torch.no_grad():
        return torch.export.export(model, (_make_batch(example),), dynamic_shapes=sizes)


def _make_batch(example: torch.Tensor) -> torch.Tensor:
    """Return two items of zeros: a program keeps its example, and no training item may travel so.

    Two, because a batch of 1 would be taken for a constant.
    """
    return torch.zeros(2, *example.shape[1:])


@contextlib.contextmanager
def quieten() -> Iterator[None]:
    """Keep what exporters print, log and warn of away from the user; errors still rise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def explain_failure(
    exporter: str, model: nn.Module, program: torch.export.ExportedProgram | None = None
) -> Iterator[None]:
    """Raise ExportError, naming the operator and the layer, for whatever an exporter raises."""
    try:
        yield
    except MarwrightError:
        raise
    except Exception as exc:  # exporters raise whatever their parts came upon
        operator = find_operator(exc)
        layer = name_layer(program, operator) if program is not None and operator else ""
        layer = layer or find_layer(model, exc)
        what = f"has no operator {operator}" if operator else "cannot follow this network"
        raise ExportError(
            f"{exporter} {what}" + (f", used by {layer}" if layer else ""),
            found=read_first_line(_find_cause(exc)),
            remedy="replace that operation in the network, or choose another backend",
        ) from exc


def _find_cause(error: BaseException) -> BaseException:
    """Return the error that others were raised from: theirs only say that it happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _write_torchscript(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    script = _script(model, example)
    buffer = io.BytesIO()
    with quieten():
        torch.jit.save(script, buffer)
    _write(path, buffer.getvalue())


def _script(model: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    """Script the model; trace it where it cannot be scripted and has no branches either."""
    try:
        with quieten():
            scripted: torch.jit.ScriptModule = torch.jit.script(model)
            return scripted
    except Exception as exc:  # the compiler raises of many kinds
        refusal = exc
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)
            # It warns of what it takes for constant though it depends on the input.
            warnings.simplefilter("error", TracerWarning)
            script: torch.jit.ScriptModule = torch.jit.trace(model, example)
    except Exception as exc:
        # The compiler's error names the source; the tracer's says what depends on the input.
        with explain_failure("TorchScript", model):
            raise refusal from exc
    _log.info("scripting failed (%s): traced instead", read_first_line(refusal))
    return script


def _write_onnx(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    import_extra("onnxscript", "writing ONNX files")
    program = export_program(model, example)
    with explain_failure("ONNX", model, program), quieten():
        converted = torch.onnx.export(
            program,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=ONNX_OPSET,
            input_names=["inputs"],
            output_names=["logits"],
        )
        if converted is None:
            raise ValueError("the exporter gave no program")
        # One file; above protobuf's 2 GB this raises.
        data = converted.model_proto.SerializeToString()
    _write(path, data)


def _write_exported(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    program = export_program(model, example)
    buffer = io.BytesIO()
    with explain_failure("torch.export", model), quieten():
        torch.export.save(program, buffer)
    _write(path, buffer.getvalue())


def _write_aotinductor(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    check_compiler()
    program = export_program(model, example)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.pt2"
        with explain_failure("AOTInductor", model, program), quieten():
            # Constants folded into the code made it slower; int8 kernels need their weights folded.
            options = {"freezing": _is_quantised(program)}
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(made), inductor_configs=options
            )
        _write(path, made.read_bytes())


def check_compiler() -> None:
    """Refuse to compile without a C++ compiler.

    Raises:
        UsageError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as exc:  # InvalidCxxCompiler has moved between torch's modules
        raise UsageError(
            "the aotinductor backend needs a C++ compiler",
            found=read_first_line(exc),
            remedy="apt install g++, or set CXX",
        ) from exc


def _is_quantised(program: torch.export.ExportedProgram) -> bool:
    return any("quantize_per" in str(node.target) for node in program.graph.nodes)


def _write_openvino(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    write_openvino(convert_openvino(model, example), path)


def convert_openvino(model: nn.Module, example: torch.Tensor) -> Any:
    """Return the model as OpenVINO's, of a free batch size.

    Raises:
        UsageError: OpenVINO is not installed.
        ExportError: OpenVINO lacks an operator; names the layer.
    """
    openvino = import_extra("openvino", "the openvino backend")
    program = export_program(model, example)
    with explain_failure("OpenVINO", model, program), quieten():
        converted = openvino.convert_model(program)
        return converted


def write_openvino(converted: Any, path: Path) -> None:
    """Write OpenVINO's two files: the weights first, for the .xml is of no use without them."""
    openvino = import_extra("openvino", "the openvino backend")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.xml"
        openvino.save_model(converted, made, compress_to_fp16=False)
        _write(path.with_suffix(".bin"), made.with_suffix(".bin").read_bytes())
        _write(path, made.read_bytes())


def _write(path: Path, data: bytes) -> None:
    with write_file(path) as stream:
        stream.write(data)


_WRITERS: dict[str, Callable[[nn.Module, Path, torch.Tensor], None]] = {
    "torchscript": _write_torchscript,
    "onnx": _write_onnx,
    "exported": _write_exported,
    "aotinductor": _write_aotinductor,
    "openvino": _write_openvino,
}
