"""The preflight: what a worker would do with an archive, done before anybody boots it.

A process of its own loads the model and answers samples: alone and in batches, whole ones and
broken ones mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.archive.checks import answers, ending
from marwright.archive.checks.configuration import read_settings
from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.requirements import Requirements
from marwright.archive.checks.samples import Sample, check_files
from marwright.archive.checks.trial import Batch, Trial, try_worker
from marwright.archive.manifest import Manifest
from marwright.errors import ArchiveError, UsageError

__all__ = ["PreflightReport", "RULES", "run_preflight", "TIMEOUT"]

NO_SAMPLES = Rule(
    "W531",
    Severity.NOTE,
    "no samples: only that the model loads is proved",
    "give it a request to answer: --sample FILE, or samples in model.yaml",
)
SAMPLES = Rule(
    "W532", Severity.ERROR, "the samples cannot be read", "pack the model again with its samples"
)
UNFINISHED = Rule(
    "W533",
    Severity.NOTE,
    "time was too short for all samples",
    "give it more: --timeout",
)
SLOW = Rule(
    "W534",
    Severity.WARNING,
    "it takes more than half of the time that TorchServe allows",
    "raise startupTimeout or responseTimeout in model-config.yaml: a busy server is slower",
)
NOT_TRIED = Rule(
    "W535",
    Severity.NOTE,
    "the model was not tried",
    "mend what was found, and check again",
)
RULES = (*ending.RULES, *answers.RULES, NO_SAMPLES, SAMPLES, UNFINISHED, SLOW, NOT_TRIED)

TIMEOUT = 120.0
"""Seconds for loading and all batches together."""
MAX_TIMEOUT = 86_400
MAX_SAMPLES = 16
"""That are tried; more would prove little more."""
BROKEN = ("empty", "cut", "random")
"""What is sent besides whole requests: no body, its first half, random bytes."""
TORCHSERVE_TIMEOUT = 120
"""Its default startupTimeout and responseTimeout (ModelConfig), in seconds."""


@dataclass(frozen=True)
class PreflightReport:
    """What a preflight found and measured."""

    findings: tuple[Finding, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    """`load_seconds` (from the start of Python to a loaded model), `import_seconds` and
    `initialize_seconds` of it, `peak_memory_bytes`, `seconds_per_request` by batch size."""


def run_preflight(
    folder: Path,
    manifest: Manifest,
    *,
    samples: Sequence[Path] = (),
    timeout: float = TIMEOUT,
) -> PreflightReport:
    """Load the model of an unpacked or staged archive in a process of its own, and try it.

    `samples` are sent besides those that the archive carries.

    Raises:
        UsageError: a time limit that is none.
        ArchiveError: one of `samples` is no file.
        StorageError: the process cannot be started.
    """
    if not 0 < timeout <= MAX_TIMEOUT:
        raise UsageError(
            "the preflight needs a time limit",
            expected=f"seconds above 0, up to {MAX_TIMEOUT:,}",
            found=f"{timeout:g}",
        )
    check_files(samples)
    if manifest.runtime == "LSP":
        return PreflightReport((ending.UNTRIED.at("its handler is C++, which only a server runs"),))
    given = [Sample.of_file(path) for path in samples]
    findings: list[Finding] = []
    try:
        known = Sample.read_all(folder)
    except ArchiveError as exc:
        findings.append(SAMPLES.at(exc.found, member="MAR-INF/samples.json"))
        known = []
    tried = [*given, *known][:MAX_SAMPLES]
    settings = read_settings(folder, manifest.config_file)
    batch_size = _read_positive(settings.get("batchSize"), default=1)
    trial = try_worker(
        folder,
        samples=[(sample.path, sample.content_type) for sample in tried],
        batches=plan_batches(len(tried), batch_size),
        timeout=timeout,
    )
    requirements = Requirements.read(folder, manifest.requirements_file)
    findings += ending.judge_ending(trial, folder, requirements)
    findings += answers.judge_answers(trial, tried, folder=folder, batch_size=batch_size)
    findings += _judge_course(trial, tried, settings)
    return PreflightReport(tuple(findings), _measure(trial))


def plan_batches(samples: int, batch_size: int) -> list[Batch]:
    """Return the batches to try, the most telling first: alone, 2 and `batch_size` together.

    Whole requests come first: a broken one may end the worker.
    """
    if not samples:
        return []
    sizes = sorted({2, batch_size} - {1})
    plan = [_whole([0]), _whole([0])]
    plan += [_whole([number % samples for number in range(size)]) for size in sizes]
    plan += [Batch(((0, kind),)) for kind in BROKEN]
    plan += [Batch(((0, "whole"), (0, kind))) for kind in BROKEN]
    if batch_size > 2:
        kinds = ("whole", *BROKEN)
        mixed = [(n % samples, kinds[n % len(kinds)]) for n in range(batch_size)]
        plan.append(Batch(tuple(mixed)))
    rest = [[number] for number in range(1, samples)]
    rest += [[number, (number + 1) % samples] for number in range(2, samples, 2)]
    rest += [[number % samples for number in range(size)] for size in sizes]  # warm by now
    return [*plan, *(_whole(numbers, is_optional=True) for numbers in rest)]


def _whole(numbers: Sequence[int], *, is_optional: bool = False) -> Batch:
    return Batch(tuple((number, "whole") for number in numbers), is_optional)


def _judge_course(
    trial: Trial, samples: Sequence[Sample], settings: dict[Any, Any]
) -> Iterator[Finding]:
    """Judge what was not tried, and what took long."""
    loaded = trial.find("loaded")
    if loaded is None:
        return
    if not samples:
        yield NO_SAMPLES.at("nothing was asked of it")
    if trial.find("left_out"):
        yield UNFINISHED.at("the most telling batches were tried, the others were not")
    slowest = max((seconds for _, seconds in answers.read_batches(trial)), default=0.0)
    for key, seconds in (("startupTimeout", loaded["seconds"]), ("responseTimeout", slowest)):
        limit = _read_positive(settings.get(key), default=TORCHSERVE_TIMEOUT)
        if seconds > limit / 2:
            yield SLOW.at(f"{seconds:.1f} s, where {key} is {limit} s")


def _measure(trial: Trial) -> dict[str, Any]:
    loaded = trial.find("loaded")
    if loaded is None:
        return {}
    fastest: dict[int, float] = {}
    for size, seconds in answers.read_batches(trial):
        fastest[size] = min(fastest.get(size, seconds), seconds)
    return {
        "load_seconds": round(loaded["seconds"], 3),
        "import_seconds": round(loaded["import_seconds"], 3),
        "initialize_seconds": round(loaded["initialize_seconds"], 3),
        "peak_memory_bytes": trial.events[-1]["memory_bytes"],
        "seconds_per_request": {
            size: round(seconds / size, 6) for size, seconds in sorted(fastest.items())
        },
    }


def _read_positive(value: Any, *, default: int) -> int:
    return value if type(value) is int and value > 0 else default
