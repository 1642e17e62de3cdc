"""What executes the network: TorchScript, ONNX Runtime, an exported program, OpenVINO, eager torch.

Each takes tensors in the order of the model's inputs and gives a tensor, or a tuple or mapping of
them, on the CPU or on the worker's device.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Backend", "load_backend", "ModelInput"]


@dataclass(frozen=True)
class ModelInput:
    """What a model file says of one of its inputs."""

    name: str
    shape: tuple[int | None, ...] | None = None
    """Without the batch axis; None for a free dimension, or where the file does not say."""
    dtype: str = ""
    """numpy's name, such as float32; empty where the file does not say."""


@dataclass(frozen=True)
class Backend:
    """A loaded model."""

    name: str
    run: Callable[..., Any]
    """Tensors in, in the model's order; a tensor, a tuple or a mapping of tensors out."""
    device: torch.device
    module: Callable[..., Any] | None = None
    """The same model where gradients can flow through it; None where they cannot."""
    inputs: tuple[ModelInput, ...] = ()
    """The model's inputs where the file says them."""


def load_backend(
    name: str, path: Path, *, device: torch.device, threads: int, architecture: Path | None = None
) -> Backend:
    """Load a model file; `threads` is what one inference may compute with.

    Raises:
        ValueError: no such backend, or one that needs another file.
        ModuleNotFoundError: the backend's library is not installed; says how to install it.
    """
    if name != "eager" and name not in _LOADERS:
        raise ValueError(f"expected a backend of {', '.join([*_LOADERS, 'eager'])}, found {name!r}")
    torch.set_num_threads(threads)
    if name != "eager":
        return _LOADERS[name](path, device, threads)
    if architecture is None:
        raise ValueError("backend eager needs the Python file of the model's class")
    return _load_eager(path, device, architecture)


def _load_torchscript(path: Path, device: torch.device, threads: int) -> Backend:
    with warnings.catch_warnings():
        # torch asks for torch.export instead; TorchScript still works, and needs no compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(path), map_location="cpu").eval()
        if device.type != "cpu" and not _is_quantized(module):
            module = torch.jit.load(str(path), map_location=device).eval()
        else:  # its operators are the processor's: on a GPU it would end the process
            device = torch.device("cpu")
        run = module
        if device.type == "cpu" and not _is_quantized(module):
            # Convolutions in the processor's own layout: 3 times faster at batch size 32.
            run = torch.jit.optimize_for_inference(torch.jit.freeze(module))
    # Without this each new batch size compiles the model again, in front of a waiting client.
    torch.jit.set_fusion_strategy([("DYNAMIC", 1)])
    return Backend("torchscript", run, device, module, _list_arguments(module))


def _is_quantized(module: torch.jit.ScriptModule) -> bool:
    return any("quantized::" in kind for kind in _list_kinds(module.inlined_graph))


def _list_kinds(block: Any) -> Iterator[str]:
    """Return the operators of a graph, also those below an `if` or in a loop."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _list_kinds(inner)


def _list_arguments(module: torch.jit.ScriptModule) -> tuple[ModelInput, ...]:
    method: Any = module.forward
    return tuple(ModelInput(argument.name) for argument in method.schema.arguments[1:])


def _load_onnx(path: Path, device: torch.device, threads: int) -> Backend:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores from the other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), *providers]
    session = runtime.InferenceSession(str(path), options, providers=providers)
    inputs = tuple(
        ModelInput(
            item.name,
            tuple(size if isinstance(size, int) else None for size in item.shape[1:]) or None,
            _ONNX_TYPES.get(item.type, ""),
        )
        for item in session.get_inputs()
    )
    names = [item.name for item in inputs]

    def run(*tensors: torch.Tensor) -> Any:
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return _from_arrays(session.run(None, feed))

    return Backend("onnx", run, torch.device("cpu"), None, inputs)


def _load_openvino(path: Path, device: torch.device, threads: int) -> Backend:
    # It reports each use to its maker as soon as it is imported, unless this is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # Python's own way
    core = _import("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # On processors with bfloat16 it would be the default: answers differ by 0.06.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(str(path), "CPU", settings)
    inputs = tuple(_describe_port(port) for port in compiled.inputs)
    request = compiled.create_infer_request()

    def run(*tensors: torch.Tensor) -> Any:
        feed = {i: tensor.cpu().numpy() for i, tensor in enumerate(tensors)}
        outputs = request.infer(feed)  # the arrays are copies: share_outputs is off
        return _from_arrays([outputs[i] for i in range(len(compiled.outputs))])

    return Backend("openvino", run, torch.device("cpu"), None, inputs)


def _describe_port(port: Any) -> ModelInput:
    sizes = port.partial_shape
    shape = None
    if sizes.rank.is_static and sizes.rank.get_length() > 1:
        shape = tuple(size.get_length() if size.is_static else None for size in list(sizes)[1:])
    return ModelInput(port.any_name, shape, port.element_type.to_dtype().name)


def _load_exported(path: Path, device: torch.device, threads: int) -> Backend:
    # A program with quantised operators cannot be read before they are registered.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    module = torch.export.load(str(path)).module().to(device)
    return Backend("exported", module, device, module, _list_parameters(module.forward))


def _load_aotinductor(path: Path, device: torch.device, threads: int) -> Backend:
    made_for = _read_device(path)
    if made_for != "cpu" and device.type != made_for:
        raise ValueError(f"expected a worker with a GPU: {path.name} is compiled for {made_for}")
    if made_for == "cpu":  # given tensors of a GPU, it would end the process
        return Backend(
            "aotinductor", torch._inductor.aoti_load_package(str(path)), torch.device("cpu")
        )
    package = torch._inductor.aoti_load_package(str(path), device_index=device.index or 0)
    return Backend("aotinductor", package, device)


def _read_device(path: Path) -> str:
    """Return what a package of AOTInductor is compiled for: "cpu", "cuda"."""
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith("_metadata.json")]
        said = [json.loads(package.read(name)).get("AOTI_DEVICE_KEY") for name in names]
    return next((str(device) for device in said if device), "cpu")


def _load_eager(path: Path, device: torch.device, architecture: Path) -> Backend:
    """Load a state_dict into the one torch.nn.Module that a file of the archive defines."""
    if str(architecture.parent) not in sys.path:
        sys.path.insert(0, str(architecture.parent))
    source = importlib.import_module(architecture.stem)
    classes = [
        value
        for value in vars(source).values()
        if inspect.isclass(value)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == source.__name__
    ]
    if len(classes) != 1:
        raise ValueError(
            f"expected one torch.nn.Module in {architecture.name}, "
            f"found {[item.__name__ for item in classes]}"
        )
    module = classes[0]()
    module.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    module = module.to(device).eval()
    return Backend("eager", module, device, module, _list_parameters(module.forward))


def _list_parameters(forward: Callable[..., Any]) -> tuple[ModelInput, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(ModelInput(item.name) for item in parameters if item.kind in kinds)


def _from_arrays(arrays: list[Any]) -> Any:
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    return tensors[0] if len(tensors) == 1 else tensors


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            f"this model needs {name} in the server's environment: pip install {name}", name=name
        ) from exc


_ONNX_TYPES = {
    "tensor(bool)": "bool",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}

_LOADERS: dict[str, Callable[[Path, torch.device, int], Backend]] = {
    "torchscript": _load_torchscript,
    "onnx": _load_onnx,
    "exported": _load_exported,
    "aotinductor": _load_aotinductor,
    "openvino": _load_openvino,
}
