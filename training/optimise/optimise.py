"""Optimising a run: try every variant of a plan, measure all of them, choose one.

Run as `marwright optimize RUN`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marwright.archive.run import CHOSEN_NAME, Run
from marwright.errors import MarwrightError, RunError
from marwright.storage import hold_path, translate_os_errors, write_file

from ..calibration import fit_temperature
from ..data import DataSet, Split, scale
from ..forms import SUFFIXES
from ..loop import compute_logits, measure, train_model
from ..models import Exported
from ..network import load_network
from ..recipe import Recipe
from ..report import list_versions
from ..settings import Settings
from ..train import prepare_data
from .gates import Decision, Gates, Preference, choose
from .parity import check_parity
from .prune import scan_sensitivity
from .report import SCHEMA, write_report
from .result import Result
from .trials import Trial, open_trial, time_trials
from .variant import BASELINES, DEFAULT_PLAN, Plan, Variant, fingerprint
from .workshop import Workshop

__all__ = ["Optimised", "optimise_run", "prepare_run"]

CALIBRATION_ITEMS = 256
CLIP = 1.0
"""Largest norm of the gradient in fine-tuning, where the training had none: what has just lost its
channels may have gradients that throw it out (shapes: a quarter came to 0.68, with it to 0.95)."""

Progress = Callable[[str, int, int], None]
"""Called before each piece of work: what it is, pieces done, pieces in all."""


@dataclass(frozen=True)
class Optimised:
    """What optimising a run gave."""

    folder: Path
    decision: Decision
    report: dict[str, Any]
    """What report.json holds."""


@dataclass(frozen=True)
class Prepared:
    """A run with the data it was trained on, in the same split."""

    run: Run
    model: Exported
    data: DataSet
    split: Split
    settings: Settings

    def take(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (N, ...) float32 inputs, as a model file takes them, and (N,) int64 labels."""
        return scale(self.data.inputs[part]).contiguous(), self.data.labels[part]


def optimise_run(
    run: Run,
    *,
    plan: Plan = DEFAULT_PLAN,
    gates: Gates | None = None,
    prefer: Preference = "balance",
    threads: int = 1,
    data_root: str = "",
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Optimised:
    """Build and measure the plan's variants, write RUN/optimised, and choose what is packed.

    A variant that was built before, of the same weights, data and versions, is taken as it lies
    there, unless `force`; times are always measured anew, all side by side. One that cannot be
    built or answers wrongly is reported, not raised.

    Raises:
        RunError: the run has no weights, or its data are no longer those it was trained on.
        StorageError: the folder cannot be written, or another process is at it.
    """
    gates = gates or Gates()
    folder = (run.path / CHOSEN_NAME).parent
    with translate_os_errors(f"write {folder}"):
        folder.mkdir(exist_ok=True)
    with hold_path(folder):
        prepared = prepare_run(run, data_root=data_root)
        work = _Work(prepared, folder, len(plan.variants), progress, force=force)
        # Rows of a table have no channels to lay out in another order.
        baselines = [each for each in BASELINES if not (run.is_table and each.channels_last)]
        results = [work.try_baseline(variant) for variant in baselines]
        results += [work.try_variant(variant) for variant in plan.variants]
        results, tests = work.time(results, rounds=plan.rounds, threads=threads)
        baseline = results[0]
        decision = choose(results[len(baselines) :], baseline, gates, prefer)
        work.say("sensitivity")
        report = write_report(
            folder,
            results=results,
            baseline=baseline,
            gates=gates,
            decision=decision,
            prefer=prefer,
            threads=threads,
            scan=work.scan(),
            subject={
                "run": run.path.name,
                "data": str(run.config["dataset"]),
                "model": str(run.config["model"]),
            },
            notes=_describe_tests(decision, baseline, tests),
        )
        _write_choice(run, decision)
    return Optimised(folder, decision, {**report, "test_accuracy": tests})


def prepare_run(run: Run, *, data_root: str = "") -> Prepared:
    """Load a run's network and its data.

    Raises:
        RunError: the data are no longer those that the run was trained on.
    """
    model = load_network(run)
    config = dict(run.config)
    names = {field.name for field in fields(Recipe)}
    values = {name: value for name, value in config.items() if name in names}
    if data_root:
        values["data_root"] = data_root
    if not run.is_table:
        values["height"], values["width"] = run.image_size
    settings = Settings(**{f.name: config[f.name] for f in fields(Settings) if f.name in config})
    data, split = prepare_data(Recipe(**values), seed=settings.seed)
    if data.digest != config.get("data_digest"):
        raise RunError(
            f"{data.name} is no longer the data that {run.path} was trained on",
            expected=f"digest {str(config.get('data_digest'))[:12]}",
            found=data.digest[:12],
            remedy="train again, so that validation items are not among those it learnt from",
        )
    return Prepared(run, model, data, split, settings)


class _Work:
    """The files of one optimisation, built or found, and where they are tried."""

    def __init__(
        self, prepared: Prepared, folder: Path, variants: int, progress: Progress, *, force: bool
    ) -> None:
        self.prepared = prepared
        self.folder = folder
        self.force = force
        self.progress = progress
        self.pieces = variants + len(BASELINES) + 2
        self.done = 0
        self.inputs, self.labels = prepared.take(prepared.split.validation)
        train = prepared.split.train
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        calibration, _ = prepared.take(train[chosen[:CALIBRATION_ITEMS]])
        self.shop = Workshop(prepared.model, self.inputs[:2], calibration, self.fit)
        weights = prepared.run.weights_path.read_bytes()
        self.content = {
            "schema": SCHEMA,
            "weights": hashlib.sha256(weights).hexdigest(),
            "data": prepared.data.digest,
            "settings": asdict(prepared.settings),
            "versions": list_versions(),
        }

    def say(self, what: str) -> None:
        """Tell what comes next."""
        self.progress(what, self.done, self.pieces)
        self.done += 1

    def fit(self, model: nn.Module, epochs: int, teacher: nn.Module | None, rate: float) -> None:
        """Train further in place, with the training's own settings but for a share of its rate."""
        before = self.prepared.settings
        settings = replace(
            before,
            epochs=epochs,
            lr=before.lr * rate,
            clip=before.clip or CLIP,
            schedule="cosine",
            patience=0,
            checkpoint_steps=0,
            device="cpu",
            precision="float32",
        )
        data, split = self.prepared.data, self.prepared.split
        train, validation = (
            (data.inputs[part], data.labels[part]) for part in (split.train, split.validation)
        )
        torch.manual_seed(settings.seed)
        train_model(model, train, validation, settings, teacher=teacher)
        if isinstance(model, Exported):  # else torch.fx's, in which the temperature is a constant
            logits = compute_logits(model, validation[0])
            model.temperature.mul_(fit_temperature(logits, validation[1]))

    def try_baseline(self, variant: Variant) -> Result:
        """Return the untimed result of the network as it was trained, run eagerly."""
        self.say(variant.name)
        model = self.prepared.model
        logits = compute_logits(model, self.prepared.data.inputs[self.prepared.split.validation])
        right = logits.argmax(1) == self.labels
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return replace(
            Result.of_failure(variant, ""),
            size_bytes=self.prepared.run.weights_path.stat().st_size,
            accuracy=right.double().mean().item(),
            correct=tuple(right.tolist()),
            parameters=parameters,
            nonzero=parameters,
        )

    def try_variant(self, variant: Variant) -> Result:
        """Return the untimed result of a variant, built now or before."""
        self.say(variant.name)
        path = self.folder / f"{variant.name}{SUFFIXES[variant.backend]}"
        note = self.folder / f"{variant.name}.json"
        key = self._make_key(variant)
        if not self.force and (found := _read_note(note, key, path)):
            return found
        started = time.perf_counter()
        for stale in (note, path):
            stale.unlink(missing_ok=True)
        try:
            result = self._build(variant, path)
        except MarwrightError as exc:
            return Result.of_failure(variant, str(exc), build_seconds=time.perf_counter() - started)
        result = replace(result, build_seconds=time.perf_counter() - started)
        values = {"key": key, "sha256": _digest(path), "result": result.to_json()}
        with write_file(note) as stream:
            stream.write(json.dumps(values, indent=2).encode())
        return result

    def time(
        self, results: Sequence[Result], *, rounds: int, threads: int
    ) -> tuple[list[Result], dict[str, float]]:
        """Time everything that was built, side by side; also return the test part's accuracies."""
        self.say("measure")
        inputs, labels = self.prepared.take(self.prepared.split.test)
        tests: dict[str, float] = {}
        measured = list(results)
        with ExitStack() as stack:
            trials: list[tuple[int, Trial]] = []
            for index, result in enumerate(results):
                if result.failure:
                    continue
                trial = stack.enter_context(self._open(result, threads))
                answers = trial.answer(inputs)
                right = (answers.argmax(1) == labels).double().mean().item()
                tests[result.variant.name] = right
                trials.append((index, trial))
            total, done = rounds * len(trials), 0

            def count() -> None:
                nonlocal done
                done += 1
                self.progress(f"measure, {done} of {total}", self.done, self.pieces)

            timings = time_trials(
                [trial for _, trial in trials], inputs.shape[1:], rounds=rounds, progress=count
            )
            for (index, trial), timing in zip(trials, timings, strict=True):
                measured[index] = replace(
                    results[index],
                    timings=timing,
                    memory_bytes=trial.memory_bytes,
                    load_seconds=trial.load_seconds,
                )
        return measured, tests

    def scan(self) -> dict[str, dict[float, float]]:
        """Return the accuracy left when one layer alone loses channels."""
        data, part = self.prepared.data, self.prepared.split.validation
        tensors = data.inputs[part], data.labels[part]
        try:
            return scan_sensitivity(
                self.shop.model, self.inputs[:2], lambda model: measure(model, tensors)[1]
            )
        except MarwrightError:
            return {}  # a network that cannot be pruned: its variants have said why

    def _build(self, variant: Variant, path: Path) -> Result:
        built = self.shop.build(variant, path)
        with open_trial(variant.backend, path) as trial:
            answers = trial.answer(self.inputs)
        with torch.inference_mode():
            reference = built.reference.eval()(self.inputs)
        parity = check_parity(reference, answers, self.labels, quantised=bool(variant.quantise))
        right = answers.argmax(1) == self.labels
        files = (path, *built.companions)
        return replace(
            Result.of_failure(variant, ""),
            file=path.name,
            size_bytes=sum(file.stat().st_size for file in files),
            accuracy=right.double().mean().item(),
            correct=tuple(right.tolist()),
            parity=parity,
            parameters=built.parameters,
            nonzero=built.nonzero,
        )

    @contextmanager
    def _open(self, result: Result, threads: int) -> Iterator[Trial]:
        variant = result.variant
        eager = variant.backend == "eager"
        backend = variant.name if eager else variant.backend
        path = self.prepared.run.path if eager else self.folder / result.file
        with open_trial(backend, path, threads=threads, name=variant.name) as trial:
            yield trial

    def _make_key(self, variant: Variant) -> str:
        content = {**self.content, "variant": fingerprint(variant)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_note(note: Path, key: str, path: Path) -> Result | None:
    """Return what was built before, if it is the same and still lies there unchanged."""
    try:
        values = json.loads(note.read_text(encoding="utf-8"))
        if values["key"] != key or values["sha256"] != _digest(path):
            return None
        return Result.from_json(values["result"])
    except (OSError, ValueError, KeyError, TypeError, MarwrightError):
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_choice(run: Run, decision: Decision) -> None:
    path = run.path / CHOSEN_NAME
    if decision.chosen is None:
        path.unlink(missing_ok=True)
        return
    choice = {
        "variant": decision.chosen.variant.name,
        "file": decision.chosen.file,
        "backend": decision.chosen.variant.backend,
        "why": decision.line,
    }
    with write_file(path) as stream:
        stream.write((json.dumps(choice, indent=2) + "\n").encode())


def _describe_tests(decision: Decision, baseline: Result, tests: dict[str, float]) -> list[str]:
    """Say what the choice is worth on items that nothing was chosen by."""
    if decision.chosen is None:
        return []
    name = decision.chosen.variant.name
    return [
        f"On the test part, by which nothing was chosen, {name} has accuracy {tests[name]:.4f} "
        f"and {baseline.variant.name} {tests[baseline.variant.name]:.4f}."
    ]
