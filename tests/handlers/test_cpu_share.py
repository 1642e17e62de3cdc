from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Import = Callable[[str], Any]

# The files of a control group, and the cores it may use; None where it says nothing.
GROUPS: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "200000 100000\n"}, 2.0),
    ({"cpu.max": "150000 100000\n"}, 1.5),
    ({"cpu.max": "50000 100000\n"}, 0.5),
    ({"cpu.max": "100000\n"}, None),
    ({"cpu.max": "100000 0\n"}, None),
    ({"cpu.max": "many 100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
    ({"cpu/cpu.cfs_quota_us": "250000\n"}, None),
    (
        {
            "cpu.max": "300000 100000",
            "cpu/cpu.cfs_quota_us": "1",
            "cpu/cpu.cfs_period_us": "1",
        },
        3.0,
    ),
]


@pytest.fixture
def cpu_share(handlers: Import, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on a machine of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return handlers("cpu_share")


@pytest.mark.parametrize(("files", "cores"), GROUPS)
def test_a_containers_quota_is_read_from_its_own_files(
    cpu_share: Any, tmp_path: Path, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_share.count_cores(tmp_path) == (64 if cores is None else cores)


def test_cores_that_the_process_may_not_use_do_not_count(
    cpu_share: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text("800000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert cpu_share.count_cores(tmp_path) == 2


def test_where_affinity_is_unknown_the_machines_cores_count(
    cpu_share: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpu_share.count_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_share.count_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [(8, 1, 8), (8, 2, 4), (8, 3, 2), (2, 4, 1), (0.5, 1, 1), (3.5, 1, 3), (3.5, 2, 1), (4, 0, 4)],
)
def test_workers_share_the_cores_and_each_has_one_thread_at_least(
    cpu_share: Any, monkeypatch: pytest.MonkeyPatch, cores: float, workers: int, threads: int
) -> None:
    monkeypatch.setattr(cpu_share, "count_cores", lambda: cores)
    assert cpu_share.count_threads(workers) == threads


@pytest.mark.parametrize(
    ("limit", "workers", "threads"),
    [("1", 2, 1), ("16", 8, 8), ("4", 8, 4), ("", 8, 8), ("0", 8, 8), ("2,1", 8, 8), ("x", 8, 8)],
)
def test_who_started_the_server_may_know_of_others_that_share_the_cores(
    cpu_share: Any, monkeypatch: pytest.MonkeyPatch, limit: str, workers: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    monkeypatch.setattr(cpu_share, "count_cores", lambda: 64.0)
    assert cpu_share.count_threads(workers) == threads
