from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from marwright.server import memory
from marwright.server.deployment import Deployment
from marwright.server.memory import MIB, compute_direct_memory, compute_heap, read_memory

GIB = 1024 * MIB


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container's limit on a machine of 1 TiB."""
    path = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "MEMORY_LIMIT", path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1024 * GIB))
    return path


def deploy(request: int = MIB, response: int = MIB, **jvm: int) -> Deployment:
    limits = {"request_bytes": request, "response_bytes": response}
    return Deployment.model_validate({"limits": limits, "jvm": jvm})


@pytest.mark.parametrize(
    ("text", "total"),
    [
        (None, 1024 * GIB),
        ("max\n", 1024 * GIB),
        (f"{3 * GIB}\n", 3 * GIB),
        (f"{2048 * GIB}\n", 1024 * GIB),
    ],
)
def test_a_containers_limit_counts_where_it_is_below_the_machines_memory(
    limit: Path, text: str | None, total: int
) -> None:
    if text is not None:
        limit.write_text(text, encoding="ascii")
    assert read_memory() == total


@pytest.mark.parametrize(
    ("memory_bytes", "queues", "heap"),
    [
        (64 * GIB, 0, 512),  # never less, where there is memory
        (64 * GIB, 1000, 256 + 1000 + 64),  # its own, those that wait, answers on their way
        (4 * GIB, 100_000, 1024),  # a quarter
        (GIB // 2, 1000, 256),  # less does not start
    ],
)
def test_the_heap_has_room_for_full_queues_within_a_quarter_of_memory(
    limit: Path, memory_bytes: int, queues: int, heap: int
) -> None:
    limit.write_text(f"{memory_bytes}\n", encoding="ascii")
    assert compute_heap(deploy(), queues) == heap * MIB


def test_larger_requests_and_larger_answers_take_more_heap(limit: Path) -> None:
    assert compute_heap(deploy(request=10 * MIB), 100) == (256 + 100 * 10 + 64) * MIB
    assert compute_heap(deploy(response=10 * MIB), 100) == (256 + 100 + 64 * 10) * MIB


@pytest.mark.parametrize(
    ("memory_bytes", "request_mib", "size"),
    [
        (64 * GIB, 1, 128 + 64 * 2),
        (64 * GIB, 10, 128 + 64 * 11),
        (4 * GIB, 10, 512),  # an eighth
        (GIB // 2, 10, 128),
    ],
)
def test_direct_memory_holds_what_is_on_its_way_within_an_eighth_of_memory(
    limit: Path, memory_bytes: int, request_mib: int, size: int
) -> None:
    limit.write_text(f"{memory_bytes}\n", encoding="ascii")
    assert compute_direct_memory(deploy(request=request_mib * MIB)) == size * MIB


def test_small_requests_leave_direct_memory_at_its_least(limit: Path) -> None:
    assert compute_direct_memory(deploy(request=1024, response=1024)) == 256 * MIB


def test_what_the_user_says_stands(limit: Path) -> None:
    limit.write_text(f"{GIB}\n", encoding="ascii")
    own = deploy(heap=9 * GIB, direct_memory=8 * GIB)
    assert compute_heap(own, 10) == 9 * GIB
    assert compute_direct_memory(own) == 8 * GIB


def test_sizes_are_whole_mebibytes(limit: Path) -> None:
    own = deploy(request=5 * MIB // 2 + 1)
    assert compute_heap(own, 333) % MIB == 0
    assert compute_direct_memory(own) % MIB == 0
