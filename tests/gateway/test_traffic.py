"""Splits: what they may be, and how they are kept in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import ConfigurationError, StorageError, UsageError
from marwright.gateway.traffic import Split, Traffic

GOOD: dict[str, Any] = {"model": "cnn", "stable": "1.0", "candidate": "2.0"}


@pytest.mark.parametrize(
    "changes",
    [
        *({"model": name} for name in ("", ".", "a b", 'a"b', "a$b", "a;b", "a/b", "a\n", "é")),
        {"model": "x" * 129},
        *({"stable": version} for version in ("", "..", "1 0", "1/0", "1%30", "1?", "1\n", "1\\")),
        {"candidate": "\ud800"},
        {"candidate": "x" * 129},
        {"candidate": "1.0"},
        *({"share": share} for share in (-1, 100.01, 0.001, float("nan"), float("inf"))),
        {"shadow": 101},
    ],
)
def test_what_can_be_no_split_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Split(**{**GOOD, **changes})


def test_traffic_is_read_as_it_was_written(tmp_path: Path) -> None:
    traffic = Traffic((Split("cnn", "1.0", '2"$;', share=12.5, shadow=0.01),))
    traffic = traffic.with_split(Split("other", "1", "2"))
    traffic.write(tmp_path / "traffic.json")
    assert Traffic.read(tmp_path / "traffic.json") == traffic
    assert traffic.without("cnn").splits == (Split("other", "1", "2"),)
    assert traffic.with_split(Split("cnn", "1.0", "3")).by_model["cnn"].candidate == "3"


def test_a_model_has_one_split() -> None:
    with pytest.raises(UsageError, match="two splits"):
        Traffic((Split(**GOOD), Split(**GOOD)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"splits": {}}',
        '{"splits": [], "more": 1}',
        json.dumps({"splits": [{"model": "cnn"}]}),
        json.dumps({"splits": [{**GOOD, "share": "25"}]}),
        json.dumps({"splits": [{**GOOD, "share": True}]}),
        json.dumps({"splits": [{**GOOD, "share": 101}]}),
        json.dumps({"splits": [{**GOOD, "share": float("nan")}]}),
        json.dumps({"splits": [{**GOOD, "more": 1}]}),
        json.dumps({"splits": [{**GOOD, "stable": 1.0}]}),
        json.dumps({"splits": [GOOD, GOOD]}),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        Traffic.read(path)
    assert caught.value.detail


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Traffic.read(tmp_path / "none.json")
