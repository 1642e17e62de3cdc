"""One training: data in, a run folder out.

Run as `marwright train`, or `python -m marwright.training.train --help`; under torchrun, or with
`--processes`, several processes train together.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from marwright.archive.run import CONFIG_NAME, REPORT_NAME, Run
from marwright.errors import MarwrightError, RunError, StorageError
from marwright.storage import hold_path, write_folder

from .checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from .data import DataSet, Split, split_data
from .loop import Progress, Training, find_device
from .models import Exported, build_model, load_weights
from .processes import Group, join_group
from .recipe import Recipe
from .report import describe_commit
from .run_files import Trained, write_json, write_run
from .settings import Settings
from .sources import load_data
from .tracking import track

__all__ = ["list_arguments", "make_model", "open_run", "prepare_data", "reproducible", "train_run"]

_log = logging.getLogger(__name__)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation by channel that torchvision's weights were trained with."""
ELSEWHERE = ("data_root", "download", "most_unreadable")
"""Of a recipe: where the data come from. What they are is said by their digest."""


def train_run(
    out: Path,
    *,
    recipe: Recipe | None = None,
    settings: Settings | None = None,
    force: bool = False,
    resume: bool = False,
    trackers: str = "",
    progress: Progress | None = None,
) -> Run:
    """Train a network and write its run folder, which appears only when it is whole.

    With `resume` it goes on from the checkpoint that an interrupted training left beside `out`.
    Of several processes only the first writes; for the others the run is there when this returns.

    Raises:
        StorageError: `out` exists and `force` is false, is in use, or cannot be written.
        RunError: `out` is a folder that is no run, which is never replaced; or no checkpoint, or
            one of another training.
        DataError: the data cannot be used, or the loss stopped being a number or exploded.
        UsageError: no such model, setting or device.
    """
    recipe, settings = recipe or Recipe(), settings or Settings()
    started = time.perf_counter()
    device = find_device(settings.device)
    with join_group(device) as group:
        with open_run(out, force=force) if group.leads else nullcontext() as folder:
            commit = describe_commit(Path())  # now: the files may change during the training
            with reproducible(settings):
                trained = _train(
                    out,
                    recipe,
                    settings,
                    group=group,
                    resume=resume,
                    trackers=trackers,
                    progress=progress,
                )
                if folder is not None:
                    report = write_run(folder, trained, {"git": commit} if commit else {})
                    report["processes"] = group.size
                    report["seconds"] = round(time.perf_counter() - started, 3)
                    write_json(folder / REPORT_NAME, report)
        group.add_up(torch.zeros(1))  # nobody goes on before the folder is there
    find_checkpoint(out).unlink(missing_ok=True)
    return Run.open(out)


@contextmanager
def open_run(out: Path, *, force: bool) -> Iterator[Path]:
    """Hold the run folder and give the temporary one that will take its place."""
    _check_replaceable(out)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()  # somebody made the folder first; that costs nobody a file
    with hold_path(out):
        for left in out.parent.glob(f".{out.name}.????????"):  # by a training that was killed
            shutil.rmtree(left, ignore_errors=True)
        with write_folder(out, replace=force) as folder:
            try:
                yield folder
            except BaseException as exc:
                # An error of the user's would be met again.
                foreign = not isinstance(exc, MarwrightError) or isinstance(exc, StorageError)
                if foreign and find_checkpoint(out).is_file():
                    _log.warning("%s is kept: --resume goes on from it", find_checkpoint(out))
                raise


def _check_replaceable(out: Path) -> None:
    """Refuse to replace what is no run: --force must not cost anybody their files."""
    if not out.exists() or (out / CONFIG_NAME).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise RunError(
            f"{out} is something else than a run",
            expected="a run folder, an empty folder, or none",
            found=f"a folder without {CONFIG_NAME}" if out.is_dir() else "a file",
            remedy="choose another --out",
        )


@contextmanager
def reproducible(settings: Settings) -> Iterator[None]:
    """Seed torch and ask it for one order of additions; put its settings back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.manual_seed(settings.seed)
    # Warns, not raises: a network with an operator that has no such way still has to train.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


def prepare_data(recipe: Recipe, *, seed: int) -> tuple[DataSet, Split]:
    """Load and split what a recipe names; images channels last.

    An epoch then takes 0.75 times as long on a CPU (three interleaved rounds).
    """
    data = load_data(
        recipe.dataset,
        image_size=recipe.image_size,
        label=recipe.label or None,
        data_root=recipe.root,
        download=recipe.download,
        most_unreadable=recipe.most_unreadable,
    )
    if not data.is_table:
        inputs = data.inputs.contiguous(memory_format=torch.channels_last)
        data = replace(data, inputs=inputs)
    return data, split_data(data, seed=seed)


def _train(
    out: Path,
    recipe: Recipe,
    settings: Settings,
    *,
    group: Group,
    resume: bool,
    trackers: str,
    progress: Progress | None,
) -> Trained:
    data, split = prepare_data(recipe, seed=settings.seed)
    recipe = replace(recipe, model=recipe.model or ("mlp" if data.is_table else "cnn"))
    model = make_model(data, split, recipe)
    train, validation = (
        (data.inputs[part], data.labels[part]) for part in (split.train, split.validation)
    )
    training = Training(
        model, train, validation, settings, teacher=_load_teacher(recipe, data), group=group
    )
    checkpoint = find_checkpoint(out)
    # What must be the same for a checkpoint to be of this training.
    facts = {
        "data_digest": data.digest,
        **{k: v for k, v in asdict(recipe).items() if k not in ELSEWHERE},
        **{k: v for k, v in asdict(settings).items() if k not in ("threads", "checkpoint_steps")},
    }
    if resume:
        _resume(training, checkpoint, facts)
    elif group.leads and checkpoint.is_file():
        _log.warning("%s is not used: --resume would go on from it", checkpoint)

    def keep(state: dict[str, Any]) -> None:
        write_checkpoint(checkpoint, {**state, "facts": facts})

    with track(trackers if group.leads else "", out.parent, facts) as record:
        fit = training.run(
            progress or (lambda *_: None),
            on_checkpoint=keep if group.leads else None,
            on_epoch=record,
        )
    return Trained(data, split, model, fit, recipe, settings)


def make_model(data: DataSet, split: Split, recipe: Recipe) -> Exported:
    """Return the network that the recipe names, its normalisation in front."""
    network = build_model(
        recipe.model, classes=len(data.classes), input_shape=tuple(data.inputs.shape[1:])
    )
    if recipe.weights:
        fresh = load_weights(network, Path(recipe.weights))
        if fresh:
            _log.warning("%s start random: they are for other classes", ", ".join(fresh))
    if data.is_table:
        rows = data.inputs[split.train]
        # A column that never changes has no deviation; it stays 0.
        model = Exported(network, mean=rows.mean(0), deviation=rows.std(0).clamp(min=1e-6))
    elif recipe.model.startswith("torchvision:"):
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        model = Exported(network, mean=mean, deviation=deviation)
    else:
        model = Exported(network)
    if not data.is_table:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
    return model


def _load_teacher(recipe: Recipe, data: DataSet) -> torch.nn.Module | None:
    if not recipe.teacher:
        return None
    run = Run.open(Path(recipe.teacher))
    if run.classes != data.classes:
        raise RunError(
            f"the teacher {run.path} knows other classes",
            expected=", ".join(data.classes[:10]),
            found=", ".join(run.classes[:10]),
            remedy="pass a run that was trained on the same classes",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, TorchServe's own format
        module: torch.nn.Module = torch.jit.load(str(run.model_path))
    shape = list(data.columns) if run.is_table else list(data.inputs.shape[2:])
    own = list(run.columns) if run.is_table else list(run.image_size)
    if run.is_table != data.is_table or shape != own:
        raise RunError(
            f"the teacher {run.path} takes other inputs",
            expected=str(shape),
            found=str(own),
            remedy="train it with the same --height and --width, or columns",
        )
    return module


def _resume(training: Training, checkpoint: Path, facts: dict[str, Any]) -> None:
    state = read_checkpoint(checkpoint)
    before = state.get("facts", {})
    other = [
        f"{name} {before.get(name)!r}, now {value!r}"
        for name, value in facts.items()
        if before.get(name) != value
    ]
    if other:
        raise RunError(
            f"{checkpoint} is of another training",
            found="; ".join(other[:5]),
            remedy="resume with the options it was begun with, or train anew",
        )
    training.set_state(state)
    _log.warning("goes on in epoch %d, step %d", len(training.epochs) + 1, training.step + 1)


def list_arguments(
    out: Path,
    *,
    recipe: Recipe,
    settings: Settings,
    force: bool = False,
    resume: bool = False,
) -> list[str]:
    """Return the command line by which another process trains the same."""
    arguments = ["--out", str(out)]
    for value in (recipe, settings):
        for field in fields(value):
            option = f"--{field.name.replace('_', '-')}"
            chosen = getattr(value, field.name)
            if isinstance(chosen, bool):
                arguments += [option] if chosen else []
            elif chosen != field.default:
                arguments += [f"{option}={chosen}"]
    return arguments + ["--force"] * force + ["--resume"] * resume


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m marwright.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--force", action="store_true", help="replace the run folder")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--track", default="", help="tensorboard, mlflow")
    for field in (*fields(Recipe), *fields(Settings)):
        option = f"--{field.name.replace('_', '-')}"
        assert field.default is not MISSING
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train from the command line, without the toolkit's."""
    options = vars(_make_parser().parse_args(argv))
    try:
        run = train_run(
            options["out"],
            recipe=Recipe(**{field.name: options[field.name] for field in fields(Recipe)}),
            settings=Settings(**{field.name: options[field.name] for field in fields(Settings)}),
            force=options["force"],
            resume=options["resume"],
            trackers=options["track"],
        )
    except MarwrightError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_status
    sys.stdout.write(f"{run.path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
