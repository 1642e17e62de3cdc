from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from marwright.errors import ExportError
from marwright.training.forms import export_model
from marwright.training.models import Exported
from marwright.training.optimise.result import BATCHES
from marwright.training.optimise.trials import Trial, open_trial, time_trials


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, trained: Exported) -> Path:
    path = tmp_path_factory.mktemp("trial") / "model.pt"
    export_model(trained, "torchscript", path, torch.zeros(2, 3, 12, 12))
    return path


def test_a_fresh_process_answers_what_the_network_does(
    file: Path, trained: Exported, items: tuple[torch.Tensor, torch.Tensor]
) -> None:
    inputs = items[0][:70]  # two batches of 32, and six
    with open_trial("torchscript", file) as trial:
        answers = trial.answer(inputs)
    with torch.no_grad():
        assert torch.allclose(answers, trained(inputs), atol=1e-4)
    assert trial.process.pid != os.getpid()
    assert trial.load_seconds > 0
    assert trial.memory_bytes > 0


def test_every_trial_is_timed_in_every_round_at_every_batch_size(file: Path) -> None:
    counted = []
    with open_trial("torchscript", file) as one, open_trial("torchscript", file) as two:
        timings = time_trials([one, two], (3, 12, 12), rounds=3, progress=lambda: counted.append(1))
    assert len(counted) == 6
    for found in timings:
        assert [timing.batch for timing in found] == list(BATCHES)
        for timing in found:
            assert 0 < timing.lowest_ms <= timing.p50_ms <= timing.highest_ms
            assert timing.p99_ms >= timing.p50_ms


def test_the_process_ends_with_the_block_whatever_happens(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_trial("torchscript", file) as trial:
        raise KeyboardInterrupt
    assert not psutil.pid_exists(trial.process.pid)


def test_a_file_that_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with (
        pytest.raises(ExportError, match=r"model\.onnx cannot be run: found .+") as error,
        open_trial("onnx", tmp_path / "model.onnx"),
    ):
        pass
    assert "\n" not in str(error.value)


def kill_and_ask(trial: Trial) -> None:
    trial.process.kill()
    trial.answer(torch.zeros(1, 3, 12, 12))


def test_a_process_that_dies_is_told_with_its_status(file: Path) -> None:
    with (
        pytest.raises(ExportError, match="ended with status -9"),
        open_trial("torchscript", file) as trial,
    ):
        kill_and_ask(trial)


def test_wrong_inputs_are_an_error_and_the_process_goes_on(file: Path) -> None:
    with open_trial("torchscript", file) as trial:
        with pytest.raises(ExportError, match="cannot be run"):
            trial.answer(torch.zeros(1, 5, 12, 12))
        assert trial.answer(torch.zeros(1, 3, 12, 12)).shape == (1, 4)


def test_a_round_lasts_about_as_long_as_it_was_given(file: Path) -> None:
    with open_trial("torchscript", file) as trial:
        started = time.perf_counter()
        taken = trial.time([1, 3, 12, 12], 0.3)
        assert time.perf_counter() - started >= 0.3
    assert np.sum(taken) <= 1.05 * 1000 * (time.perf_counter() - started)
