from __future__ import annotations

import pytest
import torch

from marwright.errors import DataError
from marwright.training.federated.shares import FEWEST_ITEMS, share_items

LABELS = torch.arange(1000) % 10


def count_labels(shares: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([torch.bincount(LABELS[share], minlength=10) for share in shares])


@pytest.mark.parametrize("alpha", [0.05, 0.5, 100.0])
def test_every_item_is_in_exactly_one_share(alpha: float) -> None:
    shares = share_items(LABELS, 5, alpha=alpha, seed=0)
    assert torch.cat(shares).sort().values.tolist() == list(range(1000))


def test_a_seed_gives_the_same_shares_and_another_gives_others() -> None:
    first, again, other = (share_items(LABELS, 5, alpha=0.5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_small_alpha_is_uneven_and_a_large_one_is_not() -> None:
    uneven = count_labels(share_items(LABELS, 5, alpha=0.1, seed=0))
    even = count_labels(share_items(LABELS, 5, alpha=1000.0, seed=0))
    assert (uneven == 0).float().mean() > 0.2  # many clients lack a label
    assert even.min() >= 14  # of the 20 that each would have of each
    assert even.max() <= 26


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_left_with_next_to_nothing(seed: int) -> None:
    shares = share_items(LABELS, 20, alpha=0.01, seed=seed)
    assert min(map(len, shares)) >= FEWEST_ITEMS


def test_too_few_items_are_refused() -> None:
    with pytest.raises(DataError, match="20 items are too few for 5 clients"):
        share_items(LABELS[:20], 5, alpha=0.5, seed=0)
