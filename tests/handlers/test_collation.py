from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

CALLS = 500


@pytest.mark.parametrize("name", ["scatter", "group_shapes", "stack"])
def test_a_batch_leaves_no_spare_tuples_behind(
    handlers: Callable[[str], ModuleType], name: str
) -> None:
    """Only a full collection empties CPython's store of them; until then memory grows."""
    function = getattr(handlers("collation"), name)
    tensors = [torch.zeros(2, side, 2) for side in (2, 3, 4, 5, 6, 7)]
    arguments: dict[str, tuple[Any, ...]] = {
        "scatter": (tuple(torch.zeros(3, 2) for _ in range(7)), 3),
        "group_shapes": ([tuple(torch.zeros(1) for _ in range(7))], "bucket"),
        "stack": (tensors,),
    }
    function(*arguments[name])
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for _ in range(CALLS):
            function(*arguments[name])
        grown = sys.getallocatedblocks() - before
    finally:
        gc.enable()
    assert grown < CALLS / 5
