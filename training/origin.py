"""Where in a network an exporter's error comes from: the layer, and the line of its source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

__all__ = [
    "find_failing_layer",
    "find_layer",
    "find_operator",
    "list_frames",
    "name_layer",
    "read_first_line",
]

_COLOUR = re.compile(r"\x1b\[\d+m")
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_OPERATORS = (
    re.compile(r"op='([\w.]+)'"),
    re.compile(r"No conversion rule found for operations?:?\s*([\w:.]+)"),
    re.compile(r"Unknown builtin op: ([\w:.]+)"),
    re.compile(r"object has no attribute or method '(\w+)'"),
)
_NOISE = ("Check 'false' failed", "FrontEnd API failed")
"""How OpenVINO begins: places in its own source."""


def read_first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something; its class if none does."""
    lines = (line.strip() for line in _COLOUR.sub("", str(error)).splitlines())
    said = (line for line in lines if line and not line.startswith(_NOISE))
    return next(said, type(error).__name__)[:300]


def find_operator(error: BaseException) -> str:
    """Return the operator that the exporter names as missing; empty where it names none."""
    for text in map(str, _list_chain(error)):
        for pattern in _OPERATORS:
            found = pattern.search(_COLOUR.sub("", text))
            if found:
                return found.group(1)
    return ""


def find_layer(model: nn.Module, error: BaseException) -> str:
    """Return "layer NAME (FILE:LINE)" of where the error arose; empty where nothing tells.

    Looks for a layer of the model among the frames the error came through, then for a source line
    in its text that belongs to a layer's class.
    """
    names = {module: name for name, module in model.named_modules()}
    for item in reversed(list(_list_chain(error))):
        for frame, line in reversed(list(list_frames(item))):
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
            if code.co_name == "forward" and isinstance(owner, nn.Module) and names.get(owner):
                return _describe(names[owner], code.co_filename, line)
    for item in _list_chain(error):
        for file, text in reversed(_PLACE.findall(str(item))):
            for module, name in names.items():
                if name and _covers(module, file, int(text)):
                    return _describe(name, file, int(text))
    return ""


def find_failing_layer(model: nn.Module, example: torch.Tensor, error: BaseException) -> str:
    """Return " at layer NAME" where the error, or running the model, points at one."""
    found = find_layer(model, error)
    if not found:
        try:
            with torch.no_grad():
                model(example)
        except Exception as exc:  # whatever the layer raises is what we look for
            found = find_layer(model, exc)
    return f" at {found}" if found else ""


def name_layer(program: torch.export.ExportedProgram, operator: str) -> str:
    """Return "layer NAME (FILE:LINE)" of the first call of an operator; empty if there is none."""
    wanted = re.split(r"[.:]+", operator.removesuffix(".default"))[-1]
    for node in program.graph.nodes:
        # "aten.special_bessel_j0.default"; ONNX decomposes, and names it "prims.bessel_j0".
        called = str(node.target).split(".")[1:2] if node.op == "call_function" else []
        if called and (called[0] == wanted or called[0].endswith(f"_{wanted}")):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            places = _PLACE.findall(node.meta.get("stack_trace") or "")
            file, line = places[-1] if places else ("", "0")
            return _describe(stack[-1][0] if stack else "", file, int(line))
    return ""


def _describe(name: str, file: str, line: int) -> str:
    place = f" ({Path(file).name}:{line})" if file else ""
    return f"layer {name or '(the whole network)'}{place}"


def _list_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it was raised from, outermost first."""
    item: BaseException | None = error
    while item is not None:
        yield item
        item = item.__cause__ or item.__context__


def list_frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames that an error came through, outermost first, with the line of each."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _covers(module: nn.Module, file: str, line: int) -> bool:
    """Return whether a source line belongs to the class of a layer."""
    try:
        source, start = inspect.getsourcelines(type(module))
        return inspect.getfile(type(module)) == file and start <= line < start + len(source)
    except (OSError, TypeError):  # built in, or made at run time
        return False
