from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from marwright.server.deployment import AccessSettings, Deployment, ModelEntry
from marwright.server.launch import Launch
from marwright.server.wanted import list_wanted


def build(store: Path, files: Sequence[str] = (), passed: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment of a server with these archives."""
    deployment = Deployment(
        store=store,
        models=[ModelEntry(archive=file) for file in files],
        access=AccessSettings(environment=list(passed)),
    )
    launch = Launch(
        deployment=deployment,
        policy=None,
        wanted=list_wanted(deployment),
        files={},
        run_folder=store,
        log_file=store / "server.log",
    )
    return launch.make_environment()


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.mark.parametrize(
    ("workers", "threads"), [([1], "8"), ([2], "4"), ([1, 2], "2"), ([16], "1"), ([], "1")]
)
def test_the_cores_are_divided_among_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: list[int], threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    files = [write_archive(tmp_path, f"m{n}", f"minWorkers: {n}") for n in workers]
    limits = build(tmp_path, files)
    assert {name: limits[name] for name in THREADS} == dict.fromkeys(THREADS, threads)


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", "8"), ("450000 100000", "4"), ("50000 100000", "1")]
)
def test_a_containers_quota_counts_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr("marwright.server.launch.CPU_LIMIT", tmp_path / "cpu.max")
    files = [write_archive(tmp_path, "m", "minWorkers: 1")]
    assert build(tmp_path, files)["OMP_NUM_THREADS"] == threads


def test_threads_do_not_spin_for_long_unless_the_user_says_how_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert build(tmp_path)["GOMP_SPINCOUNT"] == "30000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in build(tmp_path)


def test_the_threads_of_the_users_environment_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert build(tmp_path)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("config", [None, "", "[1]", "minWorkers: many", "minWorkers: {", "a: 1"])
def test_an_archive_that_does_not_say_its_workers_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    files = [write_archive(tmp_path, "m", config)]
    assert build(tmp_path, files)["OMP_NUM_THREADS"] == "8"


def test_secrets_stay_outside_unless_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "github_token", "DB_PASSWORD", "TS_NUMBER_OF_GPU")
    for name in (*names, "LANGUAGE_OF_USER"):
        monkeypatch.setenv(name, "x")
    assert not set(names) & build(tmp_path).keys()
    assert build(tmp_path, passed=["github_token"])["github_token"] == "x"
    assert build(tmp_path)["LANGUAGE_OF_USER"] == "x"


def write_archive(store: Path, name: str, config: str | None) -> str:
    """Write an archive that nobody will load; return its file name."""
    model = {"modelName": name, "handler": "h.py"}
    with zipfile.ZipFile(store / f"{name}.mar", "w") as archive:
        archive.writestr("h.py", "class Handler: pass")
        if config is not None:
            archive.writestr("model-config.yaml", config)
            model["configFile"] = "model-config.yaml"
        manifest = json.dumps({"runtime": "python", "model": model})
        archive.writestr("MAR-INF/MANIFEST.json", manifest)
    return f"{name}.mar"
