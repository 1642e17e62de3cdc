"""A network as a TensorFlow SavedModel, which TensorFlow Serving loads, and as a TFLite file.

The network is exported to torch's core ATen operators, and its graph is walked once inside a
tf.function: each operator becomes TensorFlow's (tensorflow_operators.py), each weight a variable.
No file in between, and no converter between two versions of something.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.export.graph_signature import OutputKind

from marwright.errors import ExportError, UsageError
from marwright.storage import write_file, write_folder

from ..origin import read_first_line
from . import tensorflow_layers, tensorflow_shapes  # noqa: F401 - they fill the table
from .tensorflow_operators import OPERATORS, Call, put_channels_second

__all__ = [
    "convert_saved_model",
    "export_saved_model",
    "export_tflite",
    "run_saved_model",
    "run_tflite",
]

SIGNATURE = "serving_default"
INPUTS, OUTPUTS = "inputs", "outputs"

WHOLE = ("hardsigmoid", "hardswish", "linear", "scaled_dot_product_attention", "silu")
"""Operators that are kept whole: TensorFlow has a shorter way for each than torch's parts."""

EMPTY = {
    "aten._assert_scalar.default",
    "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
}
"""Checks of what the export has settled."""


def export_saved_model(
    model: nn.Module, example: torch.Tensor, folder: Path, *, classes: Sequence[str] = ()
) -> None:
    """Write a network as a SavedModel: `serving_default`, float32 `inputs` to `outputs`.

    The batch, the example's first axis, is free; the other sizes are the example's. `classes` go
    into assets.extra/classes.json, which TensorFlow leaves alone. TensorFlow Serving wants the
    folder to be named by a version: MODEL/1.

    Raises:
        ExportError: with every operator that TensorFlow has no function for here, and its layer.
        StorageError: where the folder exists.
        UsageError: where TensorFlow is not installed.
    """
    with _open_tensorflow() as tf, write_folder(folder) as temporary:
        program = _export_program(model, example)
        _check_operators(program)
        module, signature = _translate(tf, program, example)
        tf.saved_model.save(module, str(temporary), signatures={SIGNATURE: signature})
        if classes:
            extra = temporary / "assets.extra"
            extra.mkdir()
            text = json.dumps(list(classes), ensure_ascii=False, indent=2) + "\n"
            (extra / "classes.json").write_text(text, encoding="utf-8")


def export_tflite(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write a network as a TFLite file of builtin operators, float32, whose batch can be resized.

    Raises:
        ExportError: with what TensorFlow, or TFLite, has no operator for.
        UsageError: where TensorFlow is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_saved_model(model, example, folder)
        convert_saved_model(folder, path)


def convert_saved_model(folder: Path, path: Path) -> None:
    """Write a SavedModel as a TFLite file: export_tflite's second half, for who has the first."""
    with _open_tensorflow() as tf:
        try:
            converter = tf.lite.TFLiteConverter.from_saved_model(
                str(folder), signature_keys=[SIGNATURE]
            )
            content = converter.convert()
        except Exception as exc:  # the converter's own kinds, and RuntimeError
            raise ExportError(
                "TFLite cannot express this network",
                found=read_first_line(exc),
                remedy="serve it as a SavedModel, which has more operators",
                detail=str(exc),
            ) from exc
    with write_file(path) as stream:
        stream.write(content)


def run_saved_model(folder: Path, inputs: np.ndarray, *, batch: int = 256) -> np.ndarray:
    """Return the outputs, float32, of a SavedModel's serving signature, `batch` rows at a time."""
    with _open_tensorflow() as tf:
        try:
            loaded = tf.saved_model.load(str(folder))
            serve = loaded.signatures[SIGNATURE]
        except (OSError, KeyError, ValueError) as exc:
            raise ExportError(
                f"{folder} is no SavedModel with a {SIGNATURE} signature",
                found=read_first_line(exc),
            ) from exc
        parts = [serve(**{INPUTS: tf.constant(part)}) for part in _cut(inputs, batch)]
        return np.concatenate([part[OUTPUTS].numpy() for part in parts])


def run_tflite(path: Path, inputs: np.ndarray, threads: int = 1, *, batch: int = 256) -> np.ndarray:
    """Return the outputs, float32, of a TFLite file, `batch` rows at a time."""
    litert = _import("ai_edge_litert.interpreter", "litert")
    with _hush():  # what it runs on is told on descriptor 2
        try:
            interpreter = litert.Interpreter(model_path=str(path), num_threads=threads)
        except (OSError, ValueError, RuntimeError) as exc:
            raise ExportError(f"{path} is no TFLite file", found=read_first_line(exc)) from exc
        outputs = [_invoke(interpreter, part) for part in _cut(inputs, batch)]
    return np.concatenate(outputs)


def _invoke(interpreter: Any, rows: np.ndarray) -> np.ndarray:
    taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    if tuple(taken["shape"]) != rows.shape:
        interpreter.resize_tensor_input(taken["index"], rows.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], rows)
    interpreter.invoke()
    outputs: np.ndarray = interpreter.get_tensor(given["index"])
    return outputs


def _cut(inputs: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    rows = np.ascontiguousarray(inputs, np.float32)
    return (rows[start : start + batch] for start in range(0, len(rows), batch))


def _export_program(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """Return the network as core ATen operators with a free batch."""
    # A batch of one would be taken for a size that is always one.
    pair = example[:1].expand(2, *example.shape[1:]).contiguous()
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    table = torch.export.default_decompositions()
    for name in WHOLE:
        for spelling in (name, f"{name}_"):  # and where it writes into its input
            if hasattr(torch.ops.aten, spelling):
                table.pop(getattr(torch.ops.aten, spelling).default, None)
    with warnings.catch_warnings(), torch.no_grad():
        # torch.export copies its own deprecated LeafSpec.
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        try:
            program: torch.export.ExportedProgram = torch.export.export(
                model.eval(), (pair,), dynamic_shapes=sizes
            )
            program = program.run_decompositions(table)
        except Exception as exc:  # torch.export raises many kinds, some of them private
            raise ExportError(
                "torch.export cannot read this network",
                found=read_first_line(exc),
                remedy="its forward may not branch on values, or on the batch's size",
                detail=str(exc),
            ) from exc
    return program


def _check_operators(program: torch.export.ExportedProgram) -> None:
    """Raise ExportError naming every operator that the table lacks, each with its layers."""
    missing: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if _is_operator(node) and str(node.target) not in OPERATORS:
            layers = missing.setdefault(str(node.target), [])
            if _name_layer(node) not in layers:
                layers.append(_name_layer(node))
    if missing:
        raise ExportError(
            "this network has operators that have no translation to TensorFlow",
            found="; ".join(_list_layers(name, layers) for name, layers in missing.items()),
            remedy="replace those layers, or export to another form",
        )


def _list_layers(name: str, layers: Sequence[str]) -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"{name} in {', '.join(layers[:3])}{more}"


def _is_operator(node: fx.Node) -> bool:
    """Return whether a node computes something: not arithmetic on sizes, not a check."""
    if node.op != "call_function" or isinstance(node.target, types.BuiltinFunctionType):
        return False
    return str(node.target) not in EMPTY


def _name_layer(node: fx.Node) -> str:
    """Return the path and the class of the layer that a node comes from: "conv1 (Conv2d)"."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "the network"
    path, kind = stack[-1]
    kind = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return f"{path} ({kind})" if path else kind


def _translate(
    tf: Any, program: torch.export.ExportedProgram, example: torch.Tensor
) -> tuple[Any, Any]:
    """Return the tf.Module that holds the weights, and the function that serves."""
    module = tf.Module()
    module.weights = {}

    def serve(inputs: Any) -> dict[str, Any]:
        return {OUTPUTS: _walk(tf, program, inputs, module.weights)}

    spec = tf.TensorSpec([None, *example.shape[1:]], tf.float32, name=INPUTS)
    module.serve = tf.function(serve, input_signature=[spec], autograph=False)
    return module, module.serve.get_concrete_function()


def _walk(tf: Any, program: torch.export.ExportedProgram, inputs: Any, variables: Any) -> Any:
    """Return the program's one output for a tensor of inputs, node by node."""
    signature = program.graph_signature
    tensors = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            values[node] = inputs if name is None else tensors[name].detach().cpu().numpy()
        elif node.op == "call_function" and str(node.target) not in EMPTY:
            values[node] = _apply(Call(tf, node, values, variables))
        elif node.op == "output":
            kinds = [output.kind for output in signature.output_specs]
            if kinds.count(OutputKind.USER_OUTPUT) != 1:
                raise ExportError("the network has more than one output", expected="logits alone")
            result = values[node.args[0][kinds.index(OutputKind.USER_OUTPUT)]]
            return tf.identity(put_channels_second(tf, result), name=OUTPUTS)
    raise AssertionError("an exported program ends in its output")


def _apply(call: Call) -> Any:
    """Return what one node is in TensorFlow; ExportError where it has no form there."""
    node = call.node
    args, options = fx.map_arg((node.args, node.kwargs), call.read)
    if isinstance(node.target, types.BuiltinFunctionType):
        return node.target(*args, **options)
    function, takes_maps = OPERATORS[str(node.target)]
    try:
        if not takes_maps:
            args, options = fx.node.map_aggregate(
                (args, options), lambda value: put_channels_second(call.tf, value)
            )
        return function(call, *args, **options)
    except Exception as exc:  # TensorFlow's own kinds for a size, a stride, a type it does not take
        raise ExportError(
            f"{node.target} in {_name_layer(node)} has no translation to TensorFlow",
            found=read_first_line(exc),
            remedy="replace that layer, or export to another form",
        ) from exc


def _import(name: str, extra: str) -> types.ModuleType:
    """Import what an extra brings; UsageError, with the command, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not name.startswith(exc.name):
            raise
        raise UsageError(
            f"{name.partition('.')[0]} is not installed", remedy=f"pip install 'marwright[{extra}]'"
        ) from exc


@contextlib.contextmanager
def _open_tensorflow() -> Iterator[Any]:
    """Yield TensorFlow, its reports unheard: they go to descriptor 2, before any log level.

    What was written there is shown after all where the block fails with what no one expected.
    """
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = level or "3"
    try:
        with _hush():
            tf = _import("tensorflow", "tf")
            logger = tf.get_logger()
            if tf.test.is_built_with_cuda():
                with contextlib.suppress(RuntimeError):  # whoever used it before has decided
                    tf.config.set_visible_devices([], "GPU")
            before = logger.level
            logger.setLevel("ERROR")
            try:
                yield tf
            finally:
                logger.setLevel(before)
    finally:
        if level is None:
            os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)
        else:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = level


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    """Keep what is written to descriptor 2 to itself, unless the block fails unexpectedly."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except (ExportError, UsageError):
            raise
        except BaseException:
            heard.seek(0)
            os.write(kept, heard.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
