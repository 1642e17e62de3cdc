"""The static pass: what a worker would stumble over, found without running anything."""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from marwright.archive.checks import entry_point, paths
from marwright.archive.checks.configuration import check_configuration
from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.modules import Closure, Missing, Module, find_local
from marwright.archive.checks.requirements import Requirements, name_requirement
from marwright.archive.checks.syntax import module_level, walk
from marwright.archive.manifest import Manifest
from marwright.errors import UsageError

__all__ = ["check_closure", "check_source", "RULES"]

NO_HANDLER = Rule(
    "H301",
    Severity.ERROR,
    "the handler is not inside",
    "pack the handler's file, or name one of TorchServe's own handlers",
)
UNREADABLE = Rule(
    "H302", Severity.ERROR, "a module cannot be parsed", "mend the module and pack again"
)
RELATIVE = Rule(
    "H307",
    Severity.ERROR,
    "a relative import outside a package",
    "import the module by its bare name: import sibling",
)
MISSING = Rule(
    "H308",
    Severity.ERROR,
    "a module is missing",
    "pack the module, or name what brings it in a requirements file",
)
HIDDEN = Rule(
    "H309",
    Severity.WARNING,
    "a module hides one that workers need",
    "rename the module: a worker finds it before the installed one",
)
MODEL_FILE = Rule(
    "H310",
    Severity.ERROR,
    "the model file does not define exactly one class",
    "leave the network's class in the model file and move others to a file beside it",
)
WEIGHTS = Rule(
    "H311",
    Severity.ERROR,
    "TorchServe's own handler cannot load these weights",
    "export the model as TorchScript, or pack its class as --model-file",
)
RULES = (
    NO_HANDLER,
    UNREADABLE,
    *entry_point.RULES,
    RELATIVE,
    MISSING,
    HIDDEN,
    MODEL_FILE,
    WEIGHTS,
    *paths.RULES,
)


def check_source(folder: Path, manifest: Manifest, *, python: str | None = None) -> list[Finding]:
    """Return what is wrong with the sources and settings of an unpacked or staged archive.

    `python` is the version they are written for, such as "3.9"; by default the running one.

    Raises:
        UsageError: `python` is no version.
        StorageError: a file cannot be read.
    """
    version = _parse_version(python)
    if manifest.runtime == "LSP":  # the handler is C++
        return check_configuration(folder, manifest)
    requirements = Requirements.read(folder, manifest.requirements_file)
    findings = list(_check_hidden(folder))
    closure = _follow_handler(folder, manifest, version)
    if closure is None:
        return [*findings, NO_HANDLER.at(manifest.handler), *check_configuration(folder, manifest)]
    function = manifest.handler.partition(":")[2]
    findings += check_closure(closure, requirements=requirements, function=function, python=python)
    findings += paths.check_paths(closure, folder, entry_points={function} if function else set())
    findings += _check_model_file(folder, manifest, closure, version)
    findings += _check_weights(folder, manifest, closure)
    return [*findings, *check_configuration(folder, manifest, sources=closure.modules)]


def check_closure(
    closure: Closure,
    *,
    requirements: Requirements | None = None,
    function: str = "",
    python: str | None = None,
) -> Iterator[Finding]:
    """Yield why a worker could not import a handler, or what it reaches."""
    handler = closure.modules[0]
    for module in closure.modules:
        if module.problem:
            yield UNREADABLE.at(
                module.problem + (f" in Python {python}" if python else ""),
                member=module.member,
                line=module.problem_line,
                severity=Severity.ERROR if module.required else Severity.WARNING,
            )
    if handler.is_local and not handler.problem:
        yield from entry_point.check_entry_point(handler, function)
    for module, line in closure.relative:
        yield RELATIVE.at("the worker knows no package here", member=module.member, line=line)
    finds_elsewhere = any(_changes_path(module) for module in closure.modules)
    for missing in closure.missing:
        yield _describe_missing(missing, requirements or Requirements(""), finds_elsewhere)


def _parse_version(python: str | None) -> tuple[int, int] | None:
    if python is None:
        return None
    match = re.fullmatch(r"3\.(\d{1,2})(\.\d+)?", python)
    if match is None:
        raise UsageError("no version of Python", expected='such as "3.9"', found=repr(python))
    return 3, int(match[1])


def _follow_handler(
    folder: Path, manifest: Manifest, python: tuple[int, int] | None
) -> Closure | None:
    """Read the handler that a manifest names: a file inside, or one of TorchServe's own."""
    # ts/model_loader.py, _load_handler_file: the last part of its path, with or without ".py".
    name = manifest.handler.split(":")[0].removesuffix(".py").split("/")[-1]
    if not name or name.startswith("."):
        return None
    place = find_local(folder, name)
    if place is not None and place.is_dir():
        place = place / "__init__.py"
    if place is not None and place.is_file():
        return Closure.follow(place, folder=folder, python=python)
    return Closure.follow_torchserve(name)


def _changes_path(module: Module) -> bool:
    """Whether a module changes where Python looks for modules, so that others may be found."""
    if not module.is_local:
        return False
    for node in walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("sys", "site"):
            return True
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = node.attr in ("path", "modules", "meta_path", "addsitedir")
            if known and node.value.id in ("sys", "site"):
                return True
    return False


def _describe_missing(
    missing: Missing, requirements: Requirements, finds_elsewhere: bool
) -> Finding:
    name, module = missing.name, missing.module
    if "." in name:
        top = name.split(".")[0]
        return MISSING.at(
            f"import of {name!r}, which {top} does not hold",
            member=module.member,
            line=missing.line,
            remedy=f"pack {name.replace('.', '/')}.py with its package",
            severity=Severity.WARNING if finds_elsewhere else Severity.ERROR,
        )
    requirement = name_requirement(name)
    if not module.is_local:
        return MISSING.at(
            f"import of {name!r} at {module.name}:{missing.line}, not installed here: "
            "TorchServe's own handler needs it, and does not declare it",
            remedy=f"see that the server has it: pip install {requirement}",
            severity=Severity.WARNING,
        )
    severity, reason = Severity.ERROR, "not installed here"
    remedy = f"pack {name}.py, or add {requirement} to --requirements-file"
    if (brought := requirements.bring(name)) is not False:
        named = "though {} names it" if brought else "something in {} may bring it"
        severity, reason = Severity.WARNING, f"{reason}, {named.format(requirements.member)}"
        remedy = f"install {requirement} here to have the handler tried"
    elif finds_elsewhere:
        severity, reason = Severity.WARNING, f"{reason}; the handler changes sys.path"
    return MISSING.at(
        f"import of {name!r}, {reason}",
        member=module.member,
        line=missing.line,
        remedy=remedy,
        severity=severity,
    )


def _check_hidden(folder: Path) -> Iterator[Finding]:
    """Find members that a worker imports in place of Python's or TorchServe's own modules."""
    needed = sys.stdlib_module_names - set(sys.builtin_module_names) - {"test", "this"}
    grave = {"ts", "torch", "yaml"}
    for path in sorted(folder.iterdir()):
        is_module = path.suffix == ".py" or (path / "__init__.py").is_file()
        name = path.stem if path.suffix == ".py" else path.name
        if is_module and name in needed | grave:
            yield HIDDEN.at(
                f"{name} is also the name of an installed module",
                member=path.name,
                severity=Severity.ERROR if name in grave else Severity.WARNING,
            )


def _inherits_loading(closure: Closure) -> Severity | None:
    """Say how surely TorchServe's BaseHandler.initialize loads the model."""
    handler = closure.modules[0]
    if not handler.is_local:
        return Severity.ERROR
    reached = any(module.name == "ts.torch_handler.base_handler" for module in closure.modules)
    return Severity.WARNING if reached and not handler.problem else None


def _check_model_file(
    folder: Path, manifest: Manifest, closure: Closure, python: tuple[int, int] | None
) -> Iterator[Finding]:
    """Judge the eager model's file as BaseHandler._load_pickled_model does."""
    severity = _inherits_loading(closure)
    if not manifest.model_file or severity is None:
        return
    path = folder / manifest.model_file
    if not path.is_file() or path.suffix != ".py":
        return
    model = Closure.follow(path, python=python)
    if model.modules[0].problem:
        yield from check_closure(model)
        return
    classes = entry_point.defined_classes(module_level(model.modules[0].tree))
    if len(classes) != 1:
        found = entry_point.list_classes(classes)
        yield MODEL_FILE.at(found, member=manifest.model_file, severity=severity)


def _check_weights(folder: Path, manifest: Manifest, closure: Closure) -> Iterator[Finding]:
    """Judge the weights as BaseHandler.initialize does, where no model file is given."""
    severity = _inherits_loading(closure)
    name = manifest.serialized_file
    if severity is None or not name or manifest.model_file or not name.endswith(".pt"):
        return
    try:
        with zipfile.ZipFile(folder / name) as weights:
            members = weights.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        members = []
    if not any("/code/" in member or member.endswith("/constants.pkl") for member in members):
        yield WEIGHTS.at(
            "no TorchScript, and no model file that would define the network",
            member=name,
            severity=severity,
        )
