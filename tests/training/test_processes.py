from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from marwright.archive import Run
from marwright.errors import MarwrightError
from marwright.training import processes
from marwright.training.processes import ALONE, Group, join_group, start_others
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import list_arguments, train_run

# Batches of 8 and 16 leave a last batch of 7: an uneven part for each, then an odd one.
SETTINGS = Settings(epochs=4, batch_size=8, lr=0.02)


@pytest.fixture(scope="module")
def recipe(measurements: Path) -> Recipe:
    return Recipe(f"table:{measurements}")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Run:
    """What one process trains."""
    return train_run(tmp_path_factory.mktemp("runs") / "single", recipe=recipe, settings=SETTINGS)


def train_together(
    out: Path, recipe: Recipe, progress: Callable[[int, int, float, float], None] | None = None
) -> Run:
    arguments = list_arguments(out, recipe=recipe, settings=SETTINGS)
    with start_others(arguments, 2):
        return train_run(out, recipe=recipe, settings=SETTINGS, progress=progress)


def find_other() -> psutil.Process:
    """Return the second process, which this one started."""
    (other,) = (
        child
        for child in psutil.Process().children()
        if "marwright.training.train" in child.cmdline()
    )
    return other


def assert_alike(found: Run, expected: Run) -> None:
    weights = [torch.load(run.weights_path, weights_only=True) for run in (found, expected)]
    for name, tensor in weights[1].items():
        if name != "temperature":  # fitted afterwards
            torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-4)
    assert found.report["accuracy"] == expected.report["accuracy"]
    assert found.report["processes"] == 2
    assert expected.report["processes"] == 1


def test_two_processes_train_what_one_does(tmp_path: Path, recipe: Recipe, single: Run) -> None:
    assert_alike(train_together(tmp_path / "run", recipe), single)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch.distributed.run"), reason="no torchrun")
def test_torchrun_trains_what_one_process_does(tmp_path: Path, recipe: Recipe, single: Run) -> None:
    arguments = list_arguments(tmp_path / "run", recipe=recipe, settings=SETTINGS)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*program, "-m", "marwright.training.train", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_alike(Run.open(tmp_path / "run"), single)


@pytest.mark.slow  # tests/cli/test_train.py has another such death
def test_a_second_process_that_dies_is_told_and_leaves_nothing(
    tmp_path: Path, recipe: Recipe
) -> None:
    seen: list[psutil.Process] = []

    def kill(done: int, *_: float) -> None:
        if done == 5:
            seen.append(find_other())
            seen[0].kill()

    with pytest.raises(MarwrightError, match="process 1 of 2 ended with status -9") as caught:
        train_together(tmp_path / "run", recipe, kill)
    assert "\n" not in str(caught.value)
    assert not psutil.pid_exists(seen[0].pid)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_the_other_process_too(tmp_path: Path, recipe: Recipe) -> None:
    seen: list[psutil.Process] = []

    def stop(done: int, *_: float) -> None:
        if done == 5:
            seen.append(find_other())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(tmp_path / "run", recipe, stop)
    assert not psutil.pid_exists(seen[0].pid)
    assert not list(tmp_path.iterdir())


def test_a_process_that_never_joins_is_not_awaited_for_long(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(processes, "JOIN_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(MarwrightError, match="process 1 of 2 ended with status 1"):
        train_together(tmp_path / "run", recipe)
    assert time.monotonic() - started < 20
    assert not list(tmp_path.iterdir())


def test_parts_of_a_batch_make_it_up_again() -> None:
    chosen = torch.randperm(11)
    groups = [Group(rank, 3) for rank in range(3)]
    parts = [group.share(chosen) for group in groups]
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert torch.equal(ALONE.share(chosen), chosen)


def test_a_batch_too_small_to_part_is_everybodys() -> None:
    chosen = torch.arange(5)
    assert not Group(0, 3).parts(chosen)
    assert torch.equal(Group(2, 3).share(chosen), chosen)
    assert Group(0, 2).parts(chosen)


def test_only_the_first_leads() -> None:
    assert ALONE.leads
    assert [Group(rank, 2).leads for rank in range(2)] == [True, False]


def test_a_place_told_by_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    told = pytest.raises(MarwrightError, match=r"found no RANK, MASTER_ADDR, MASTER_PORT")
    with told, join_group(torch.device("cpu")):
        pytest.fail("it joined")
