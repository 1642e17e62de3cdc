"""The files that a handler opens, as far as its source names them."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from marwright.archive.checks.expressions import JOINS, MAKERS, Expressions, Target
from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.modules import Closure

__all__ = ["check_paths", "RULES"]

ABSOLUTE = Rule(
    "H320",
    Severity.WARNING,
    "an absolute path",
    "pack the file and open it below model_dir: context.system_properties['model_dir']",
)
NOT_INSIDE = Rule(
    "H321",
    Severity.ERROR,
    "a file that the handler opens is not inside",
    "pack the file as an extra file",
)
PICKLE = Rule(
    "H322",
    Severity.WARNING,
    "a pickle is loaded, which runs what it says",
    "save tensors alone (a state dict) and load them with weights_only=True",
)
RULES = (ABSOLUTE, NOT_INSIDE, PICKLE)

# Where every Linux has something of its own, or anybody may write.
_EVERYWHERE = re.compile(r"/(dev|etc|proc|sys|tmp|usr|var)(/|$)|/$|//")
_PERSONAL = re.compile(
    r"(/(home|Users|root|mnt|media|workspace)/|[A-Za-z]:[\\/]+|~/)\w[^\n\0]{0,250}"
)

# Functions by the names they are imported from.
_OPENERS = re.compile(r"((io|codecs|gzip|bz2|lzma)\.)?open|zipfile\.ZipFile")
_READERS = re.compile(
    r"torch\.(jit\.|export\.)?load|tarfile\.open|numpy\.(load|loadtxt|genfromtxt)|PIL\.Image\.open|cv2\.imread"
    r"|pandas\.read_(csv|json|parquet|pickle)|joblib\.load|onnxruntime\.InferenceSession"
    r"|safetensors\.(safe_open|torch\.load_file)"
)
_COPIERS = re.compile(r"torch\.save|shutil\.copy(2|file)?")
_PICKLES = re.compile(
    r"(pickle|dill|cloudpickle)\.loads?|pickle\.Unpickler|joblib\.load|pandas\.read_pickle"
    r"|torch\.package\.PackageImporter"
)
_READ_METHODS = ("read_text", "read_bytes", "open")
_WRITE_METHODS = ("write_text", "write_bytes", "mkdir", "touch")
_TESTS = ("exists", "isfile", "isdir", "is_file", "is_dir", "glob", "rglob", "iterdir")
_UNPACKERS = ("extractall", "extract", "unpack_archive", "snapshot_download")
_ENTRY_POINTS = frozenset(
    ["initialize", "__init__", "handle", "preprocess", "inference", "postprocess"]
)

# What runs all that stands in it; `if`, loops, `try`, comprehensions and the like may not.
_ALWAYS = (
    *(ast.Module, ast.ClassDef, ast.With, ast.withitem, ast.Assign, ast.AnnAssign, ast.Expr),
    *(ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Starred, ast.Return, ast.NamedExpr),
    *(ast.List, ast.Tuple, ast.Dict, ast.Set, ast.BinOp, ast.FormattedValue, ast.JoinedStr),
)


@dataclass(frozen=True)
class _Use:
    """One call that opens, writes or tests a file."""

    call: ast.Call
    target: Target
    kind: str
    """`read`, `write`, `test`, or `name` where a path is only made."""


def check_paths(
    closure: Closure, folder: Path, *, entry_points: Iterable[str] = ()
) -> list[Finding]:
    """Return files that a handler names by an absolute path, or that are not in `folder`.

    `entry_points` are functions that a worker calls, beside the usual methods.
    """
    findings: list[Finding] = []
    for module in closure.modules:
        if module.is_local and not module.problem:
            source = Expressions.read(module)
            uses = list(_find_uses(source))
            is_handler = module is closure.modules[0]
            called = _ENTRY_POINTS.union(entry_points) if is_handler else frozenset[str]()
            findings += _check_absolute(source, uses)
            findings += _check_inside(source, uses, folder, called)
            findings += _check_pickles(source)
    return findings


def _find_uses(source: Expressions) -> Iterator[_Use]:
    for call in source.calls:
        kind, subject = _classify(call, source.full_name(call.func))
        if kind and (target := source.resolve(subject)) is not None:
            yield _Use(call, target, kind)


def _classify(call: ast.Call, name: str) -> tuple[str, ast.expr | None]:
    """Return what a call does with a file, and the expression that names the file."""
    first, second = (*call.args[:2], None, None)[:2]
    if _OPENERS.fullmatch(name):
        return ("write" if _writes(call, position=1) else "read"), first
    if _READERS.fullmatch(name):
        return "read", first
    if _COPIERS.fullmatch(name):
        return "write", second
    if name in ("os.makedirs", "os.mkdir"):
        return "write", first
    if MAKERS.fullmatch(name):
        return "name", first
    if JOINS.fullmatch(name):
        return "name", call
    if not isinstance(call.func, ast.Attribute):
        return "", None
    method, owner = call.func.attr, call.func.value
    if method in _TESTS:
        return "test", first if name.startswith("os.") else owner
    if method in _WRITE_METHODS:
        return "write", owner
    if method in _READ_METHODS:
        return ("write" if method == "open" and _writes(call, position=0) else "read"), owner
    return ("name", call) if method == "joinpath" else ("", None)


def _check_absolute(source: Expressions, uses: list[_Use]) -> Iterator[Finding]:
    """Find paths of another machine: wherever they stand, or where something opens them."""
    found: dict[str, int] = {}
    for use in uses:
        text = use.target.text
        if use.kind != "test" and use.target.is_absolute and not _EVERYWHERE.match(text):
            found.setdefault(text, use.call.lineno)
    for node in source.texts:
        text = str(node.value)
        is_docstring = isinstance(source.parents.get(node), ast.Expr)
        if not is_docstring and _PERSONAL.fullmatch(text):
            found[text] = min(node.lineno, found.get(text, node.lineno))
    for path, line in found.items():
        yield ABSOLUTE.at(f"{path!r}", member=source.module.member, line=line)


def _check_inside(
    source: Expressions, uses: list[_Use], folder: Path, entry_points: frozenset[str]
) -> Iterator[Finding]:
    """Find files that are opened and not inside; those that may be absent are left alone."""
    optional = {use.target.member for use in uses if use.kind in ("test", "write")}
    unpacks = any(_called_name(call) in _UNPACKERS for call in source.calls)
    found: dict[str, tuple[Severity, int]] = {}
    for use in uses:
        name = use.target.member
        is_file = use.kind == "read" or (use.target.is_rooted and "." in posixpath.basename(name))
        if use.kind in ("test", "write") or not is_file or not _could_be_inside(use.target):
            continue
        if (folder / name).exists() or any(_covers(other, name) for other in optional):
            continue
        certain = use.kind == "read" and not unpacks and _is_certain(source, use.call, entry_points)
        severity = Severity.ERROR if certain else Severity.WARNING
        known = found.get(name, (severity, use.call.lineno))
        found[name] = max(known[0], severity), min(known[1], use.call.lineno)
    for name, (severity, line) in found.items():
        yield NOT_INSIDE.at(
            f"{name!r} is opened and not inside", member=source.module.member, line=line,
            severity=severity,
        )  # fmt: skip


def _check_pickles(source: Expressions) -> Iterator[Finding]:
    for call in source.calls:
        name = source.full_name(call.func)
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        given = arguments.get("weights_only")
        found = ""
        if name == "torch.load" and None not in arguments:
            if given is None:
                found = (
                    "torch.load without weights_only: torch 2.6 and newer load only tensors, "
                    "older ones run what the file says"
                )
            elif isinstance(given, ast.Constant) and given.value is False:
                found = "torch.load with weights_only=False"
        elif name == "numpy.load":
            allowed = arguments.get("allow_pickle")
            if isinstance(allowed, ast.Constant) and allowed.value is True:
                found = "numpy.load with allow_pickle=True"
        elif _PICKLES.fullmatch(name):
            found = name
        if found:
            yield PICKLE.at(found, member=source.module.member, line=call.lineno)


def _could_be_inside(target: Target) -> bool:
    text = target.text
    is_plain = bool(text) and "://" not in text and "\n" not in text and "\0" not in text
    return is_plain and not target.is_absolute and not target.member.startswith("..")


def _covers(other: str, name: str) -> bool:
    """Whether a file that may be absent, or is written, is `name` or a folder of it."""
    return other == name or (other != "." and name.startswith(f"{other}/"))


def _is_certain(source: Expressions, call: ast.Call, entry_points: frozenset[str]) -> bool:
    """Whether a worker surely comes to a call: nothing around or before it decides otherwise."""
    if not source.module.required:
        return False
    node: ast.AST = call
    while (parent := source.parents.get(node)) is not None:
        if isinstance(parent, ast.FunctionDef):
            is_called = parent.name in entry_points and source.function_of(parent) is None
            return is_called and not _may_return_before(parent, call.lineno)
        if not isinstance(parent, _ALWAYS):
            return False
        node = parent
    return True


def _may_return_before(function: ast.FunctionDef, line: int) -> bool:
    return any(isinstance(node, ast.Return) and node.lineno < line for node in ast.walk(function))


def _called_name(call: ast.Call) -> str:
    """Return the last part of what is called: `extractall` of `ZipFile(x).extractall`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _writes(call: ast.Call, *, position: int) -> bool:
    """Whether an `open` is for writing, or its mode is not known."""
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[position : position + 1]
    if not modes:
        return False
    mode = modes[0]
    if not isinstance(mode, ast.Constant):
        return True
    return isinstance(mode.value, str) and any(letter in mode.value for letter in "wax+")
