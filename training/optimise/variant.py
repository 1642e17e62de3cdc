"""What one variant of a trained network is to be, and plans of several."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from marwright.archive.document import Document
from marwright.errors import ArchiveError, UsageError

__all__ = ["BACKENDS", "BASELINES", "DEFAULT_PLAN", "fingerprint", "Plan", "read_plan", "Variant"]

BACKENDS = ("torchscript", "onnx", "exported", "aotinductor", "openvino")
"""What executes a variant in a server; `eager` is the baselines' alone."""
QUANTISATIONS = ("", "dynamic", "static", "aware")
DYNAMIC_BACKENDS = ("torchscript", "onnx")
MAX_NAME = 64
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Variant:
    """One way to shrink or speed up a network; raises UsageError with all that is wrong in it."""

    name: str
    """Of its file and of its row: small letters, digits, dots and hyphens."""
    backend: str = "torchscript"
    keep: float = 1.0
    """Share of channels that structured pruning keeps."""
    sparsity: float = 0.0
    """Share of weights that unstructured pruning zeroes, the smallest first."""
    quantise: str = ""
    """"", "dynamic" (weights only), "static" (calibrated) or "aware" (trained as int8)."""
    distil: bool = False
    """Fine-tune with the network as it was trained for the teacher."""
    epochs: int = 0
    """Of fine-tuning after pruning, or while weights are quantised."""
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Refuse what no builder could build."""
        if problems := _list_problems(asdict(self)):
            raise UsageError(f"no variant is like {self.name!r}", found="; ".join(problems))

    @property
    def is_plain(self) -> bool:
        """Whether the network stays as it was trained: nothing pruned, quantised or tuned."""
        return self.keep == 1 and not (self.sparsity or self.quantise or self.epochs)

    def describe(self) -> str:
        """Return what is done to the network, in words."""
        parts = [self.backend]
        parts += ["channels last"] if self.channels_last else []
        parts += [f"{self.keep:.0%} of channels".replace("%", " %")] if self.keep < 1 else []
        parts += [f"{self.sparsity:.0%} zeros".replace("%", " %")] if self.sparsity else []
        parts += [f"int8 {self.quantise}"] if self.quantise else []
        parts += ["distilled"] if self.distil else []
        parts += [f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"] if self.epochs else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Plan:
    """The variants to build and measure."""

    variants: tuple[Variant, ...]
    rounds: int = 5
    """How often each is measured, in turn with the others."""


def fingerprint(variant: Variant) -> str:
    """Return the SHA-256 of all that a variant says, in hexadecimal: equal for 1 and 1.0."""
    values = asdict(variant)
    numbers = {key: float(values[key]) for key in ("keep", "sparsity")}
    return hashlib.sha256(json.dumps({**values, **numbers}, sort_keys=True).encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan from YAML: a list `variants` of mappings, and `rounds` if it is not 5.

    Raises:
        UsageError: it is no plan; every problem at once, with its line and its variant.
        StorageError: it cannot be read.
    """
    try:
        document = Document.read(path)
    except ArchiveError as exc:
        raise UsageError(exc.message, expected=exc.expected, found=exc.found) from exc
    values = dict(document.values)
    variants, rounds = values.pop("variants", None), values.pop("rounds", Plan.rounds)
    problems = [str(problem) for problem in document.list_doubles()]
    problems += _list_unknown(values, ("rounds", "variants"))
    if not _fits(rounds, "int") or not 1 <= rounds <= MAX_ROUNDS:
        problems.append(f"rounds: expected 1 to {MAX_ROUNDS}, found {rounds!r}")
    if not isinstance(variants, list) or not variants:
        problems.append(f"variants: expected a list of one or more, found {variants!r}")
        variants = []
    made, seen = [], {variant.name: "the baseline" for variant in BASELINES}
    for number, entry in enumerate(variants, start=1):
        found = list(_list_entry_problems(entry))
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str):
            if name in seen:
                found.append(f"name: {name} is also that of {seen[name]}")
            seen.setdefault(name, f"variant {number}")
        line = document.line(["variants", number - 1])
        label = f"line {line}, variant {number}{f' ({name})' if name else ''}"
        problems += [f"{label}: {problem}" for problem in found]
        made += [] if found else [Variant(**entry)]
    if problems:
        several = len(problems) > 1
        raise UsageError(
            f"{path} is no plan",
            found=f"{len(problems)} problems" if several else problems[0],
            detail="\n".join(problems) if several else "",
        )
    return Plan(tuple(made), rounds)


def _list_entry_problems(entry: Any) -> Iterator[str]:
    """Yield what is wrong with one variant of a plan."""
    if not isinstance(entry, dict):
        yield f"expected a mapping, found {entry!r}"
        return
    defaults = {field.name: field.default for field in fields(Variant)}
    yield from _list_unknown(entry, tuple(defaults))
    if "name" not in entry:
        yield "name: missing"
    if entry.get("backend") == "eager":
        yield "backend: eager is measured anyway, as the baseline"
    given = {key: value for key, value in entry.items() if key in defaults}
    yield from _list_problems({**defaults, "name": "unnamed", **given})


def _list_unknown(values: Mapping[Any, Any], known: tuple[str, ...]) -> list[str]:
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{key}: no such key; {hint}")
    return problems


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value is of a field's type; YAML's `yes` is no number."""
    if kind == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == kind


def _list_problems(values: Mapping[str, Any]) -> list[str]:
    """Return all that is wrong with a variant's values."""
    words = {"str": "text", "float": "a number", "int": "a whole number", "bool": "true or false"}
    kinds = {field.name: str(field.type) for field in fields(Variant)}
    problems = {
        key: f"{key}: expected {words[kind]}, found {values[key]!r}"
        for key, kind in kinds.items()
        if not _fits(values[key], kind)
    }
    if not problems:
        return [*_check_values(**values), *_check_together(**values)]
    # A value of the wrong type says nothing of what belongs together with it.
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Variant)}
    defaults["name"] = "unnamed"
    return [
        *problems.values(),
        *_check_values(**{key: defaults[key] if key in problems else values[key] for key in kinds}),
    ]


def _check_values(
    *, name: str, backend: str, keep: float, sparsity: float, quantise: str, epochs: int, **_: bool
) -> Iterator[str]:
    """Yield what is wrong with values, each by itself."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or len(name) > MAX_NAME:
        expected = f"a letter or digit, then letters, digits, dots, hyphens, at most {MAX_NAME}"
        yield f"name: expected {expected}, all of them small, found {name!r}"
    if backend not in (*BACKENDS, "eager"):
        yield f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}"
    if not 0 < keep <= 1:
        yield f"keep: expected above 0 and at most 1, found {keep}"
    if not 0 <= sparsity < 1:
        yield f"sparsity: expected at least 0 and below 1, found {sparsity}"
    if quantise not in QUANTISATIONS:
        yield f"quantise: expected one of {', '.join(QUANTISATIONS[1:])}, found {quantise!r}"
    if epochs < 0:
        yield f"epochs: expected 0 or more, found {epochs}"


def _check_together(
    *,
    backend: str,
    keep: float,
    sparsity: float,
    quantise: str,
    distil: bool,
    epochs: int,
    channels_last: bool,
    **_: str,
) -> Iterator[str]:
    """Yield what does not go together."""
    changes = {"keep below 1": keep < 1, "quantise: aware": quantise == "aware"}
    tuned = [what for what, so in {**changes, "distil": distil}.items() if so]
    if tuned and not epochs:
        yield f"epochs: expected 1 or more with {' and '.join(tuned)}, found 0"
    if not (any(changes.values()) or sparsity):
        # Nothing would be changed, so nothing could be mended; NaN has been named already.
        need = "expected keep below 1, sparsity, or quantise: aware beside it"
        yield from ["distil: " + need] if distil else []
        yield from ["epochs: " + need] if epochs > 0 and not distil else []
    if quantise == "dynamic" and backend in BACKENDS and backend not in DYNAMIC_BACKENDS:
        yield f"quantise: dynamic is for {' and '.join(DYNAMIC_BACKENDS)}, found {backend}"
    plain = keep == 1 and not (sparsity or quantise or distil or epochs)
    if backend == "eager" and not plain and not math.isnan(keep):
        yield "backend: eager is the baseline, the network as it was trained"
    if channels_last and backend != "eager":
        yield "channels_last: is for the baseline's backend, eager"


BASELINES = (
    Variant("eager", backend="eager"),
    Variant("eager-channels-last", backend="eager", channels_last=True),
)

DEFAULT_PLAN = Plan(
    (
        Variant("torchscript"),
        Variant("torchscript-int8-dynamic", quantise="dynamic"),
        Variant("torchscript-int8", quantise="static"),
        Variant("torchscript-int8-aware", quantise="aware", epochs=4),
        Variant("torchscript-sparse", sparsity=0.8, epochs=4),
        Variant("torchscript-half", keep=0.5, epochs=24),
        Variant("onnx", "onnx"),
        Variant("onnx-int8", "onnx", quantise="static"),
        Variant("onnx-half", "onnx", keep=0.5, epochs=24),
        Variant("onnx-half-int8", "onnx", keep=0.5, quantise="static", epochs=24),
        Variant("onnx-quarter", "onnx", keep=0.25, epochs=32),
        Variant("onnx-quarter-distilled", "onnx", keep=0.25, epochs=32, distil=True),
        Variant("onnx-quarter-int8", "onnx", keep=0.25, quantise="static", epochs=32),
        Variant("exported", "exported"),
        Variant("aotinductor", "aotinductor"),
        Variant("aotinductor-int8", "aotinductor", quantise="static"),
        Variant("openvino", "openvino"),
        Variant("openvino-int8", "openvino", quantise="static"),
    )
)
