from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

Import = Callable[[str], Any]

LOGITS = np.random.default_rng(0).normal(0, 4, (50, 10)).astype(np.float32)


def test_the_best_has_the_probability_that_softmax_gives(handlers: Import) -> None:
    best, confidence = handlers("logits").find_best(LOGITS)
    values, indices = torch.softmax(torch.from_numpy(LOGITS), 1).max(1)
    assert best.tolist() == indices.tolist()
    assert confidence == pytest.approx(values.numpy(), abs=2e-6)


def test_scores_are_what_they_are_defined_as(handlers: Import) -> None:
    score = handlers("logits").score_logits
    energy = -torch.logsumexp(torch.from_numpy(LOGITS).double(), 1)
    assert score(LOGITS, "energy") == pytest.approx(energy.numpy(), abs=1e-6)
    highest = torch.softmax(torch.from_numpy(LOGITS).double(), 1).amax(1)
    assert score(LOGITS, "softmax") == pytest.approx(1 - highest.numpy(), abs=1e-6)


def test_large_logits_do_not_overflow(handlers: Import) -> None:
    module = handlers("logits")
    huge = np.array([[1e30, -1e30, 3e5]], dtype=np.float32)
    assert np.isfinite(module.score_logits(huge, "energy")).all()
    assert module.find_best(huge)[1].tolist() == [1.0]


def test_few_logits_are_the_embedding_themselves(handlers: Import) -> None:
    assert handlers("logits").fold_logits(LOGITS) == pytest.approx(LOGITS, abs=1e-4)


def test_many_are_folded_and_keep_their_distances_on_average(handlers: Import) -> None:
    logits = np.random.default_rng(1).normal(size=(40, 1000))
    folded = handlers("logits").fold_logits(logits)
    assert folded.shape == (40, 64)
    own, kept = (
        np.square(values[:20] - values[20:]).sum(axis=1).mean() for values in (logits, folded)
    )
    assert kept == pytest.approx(own, rel=0.25)


def test_probabilities_become_logits_of_the_same_probabilities(handlers: Import) -> None:
    module = handlers("logits")
    shares = torch.softmax(torch.from_numpy(LOGITS), 1).numpy()
    found = module.to_logits(shares)
    assert module.find_best(found)[1] == pytest.approx(shares.max(1), abs=2e-6)
    assert module.to_logits(LOGITS) is LOGITS
    assert np.isfinite(module.to_logits(np.array([[1.0, 0.0]]))).all()
