from __future__ import annotations

import ast
import importlib.util
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from marwright.errors import ServerError
from marwright.server import Ports
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.launch import Launch, clear_run_folder, find_package, make_run_folder
from marwright.server.sections import REDACTABLE, AccessSettings, PredictionSettings
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


def test_a_run_folder_keeps_nothing_that_could_be_taken_for_this_starts(tmp_path: Path) -> None:
    for name in ("tmp", "workflows", "classes", "logs", "store"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("by an earlier start")
    (tmp_path / "key_file.json").write_text("{}")
    clear_run_folder(tmp_path)
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert kept == {"tmp", "workflows", "logs", "logs/left", "store", "store/left"}
    for name in ("tmp", "workflows"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    clear_run_folder(tmp_path)  # nor does what is missing trouble it


def test_without_torchserve_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (find_package() / "frontend/model-server.jar").is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'torchserve==0\.12\.0'"):
        find_package()


@pytest.mark.parametrize("is_long", [False, True])
def test_a_run_folder_lies_where_a_sockets_path_has_room(
    monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        base = Path(name) / ("x" * 60 if is_long else "x")
        base.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(base))  # as TMPDIR has it
        folder = make_run_folder()
        try:
            assert folder.parent == (Path("/tmp") if is_long else base)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert len(str(folder)) <= 80
        finally:
            folder.rmdir()


def test_versions_without_workers_are_not_among_those_that_a_start_loads(tmp_path: Path) -> None:
    files = [write_archive(tmp_path, name, "minWorkers: 1") for name in ("busy", "idle")]
    deployment = Deployment(
        store=tmp_path,
        models=[ModelEntry(archive=files[0]), ModelEntry(archive=files[1], workers=0)],
    )
    wanted = list_wanted(deployment)
    launch = Launch(
        deployment=deployment,
        policy=None,
        wanted=wanted,
        files={item.key: item.path.name for item in wanted},
        run_folder=tmp_path,
        log_file=tmp_path / "server.log",
    )
    properties = launch.write_properties(Ports())
    assert properties["load_models"] == "busy.mar"
    assert list(json.loads(properties["models"])) == ["busy"]
    assert "load_models=busy.mar" in (tmp_path / "config.properties").read_text("utf-8")


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


def test_workers_are_told_of_the_prediction_log_and_its_bounds(tmp_path: Path) -> None:
    def find(**monitoring: object) -> str | None:
        deployment = Deployment.model_validate({"store": tmp_path, "models": [], **monitoring})
        launch = Launch(deployment, None, [], {}, tmp_path, tmp_path / "server.log")
        return launch.make_environment().get("MARWRIGHT_PREDICTIONS")

    assert find() is None
    predictions = {"folder": "seen", "most_bytes": "8 MiB", "redact": ["input"], "share": 2.5}
    told = json.loads(find(monitoring={"predictions": predictions}) or "")
    assert told == {
        "folder": str(Path("seen").absolute()),
        "share": 2.5,
        "inputs": "digest",
        "input_bytes": 1 << 16,
        "redact": ["input"],
        "score": "none",
        "spool_bytes": 2 << 20,
    }


def test_what_can_be_redacted_is_what_the_handlers_leave_out(root: Path) -> None:
    source = (root / "handlers/prediction_log.py").read_text("utf-8")
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FIELDS"
    )
    fields = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
    assert fields == set(REDACTABLE)
    with pytest.raises(ValidationError, match="'mood' is no field"):
        PredictionSettings.model_validate({"redact": ["features.red", "mood"]})
