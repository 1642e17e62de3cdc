from __future__ import annotations

from pathlib import Path

import pytest

from marwright.errors import UsageError
from marwright.training.recipe import Recipe


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"height": 8}, "one of height and width, both or none"),
        ({"width": 8}, "one of height and width, both or none"),
        ({"height": -1, "width": -2}, "height -1, at least 1.*; width -2, at least 1"),
        ({"most_unreadable": 1.5}, "most unreadable 1.5, from 0 to 1"),
        ({"most_unreadable": float("nan")}, "most unreadable nan"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Recipe(**values)  # type: ignore[arg-type]


def test_what_is_not_stated_is_none() -> None:
    assert Recipe().image_size is None
    assert Recipe().root is None


def test_what_is_stated_is_given_as_it_is_used() -> None:
    recipe = Recipe(height=8, width=9, data_root="data")
    assert recipe.image_size == (8, 9)
    assert recipe.root == Path("data")
