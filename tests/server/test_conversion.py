from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.errors import ConfigurationError, StorageError, UsageError
from marwright.server.conversion import import_properties
from marwright.server.deployment import Deployment
from marwright.server.properties import render_properties
from marwright.server.rendering import render_deployment


def write(folder: Path, **properties: str) -> Path:
    path = folder / "config.properties"
    path.write_text(render_properties(properties), encoding="utf-8")
    return path


def test_rendering_and_importing_is_a_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, **render_deployment(Deployment()))
    assert import_properties(path)[0] == Deployment()


def test_the_repository_s_own_file_is_the_default(root: Path) -> None:
    deployment, notes = import_properties(root / "config.properties")
    assert deployment == Deployment()
    assert notes == ["load_models is not said: every archive of the store is served"]


PORTS = st.lists(st.integers(1, 65535), min_size=5, max_size=5, unique=True).filter(
    lambda ports: 8083 not in ports
)
DEPLOYMENTS = st.fixed_dictionaries(
    {
        "ports": PORTS.map(
            lambda ports: dict(
                zip(
                    ("inference", "management", "metrics", "grpc_inference", "grpc_management"),
                    ports,
                    strict=True,
                )
            )
        ),
        "limits": st.fixed_dictionaries(
            {
                "request_bytes": st.integers(1024, 2**31 - 1),
                "response_bytes": st.integers(1024, 2**31 - 1),
                "queue": st.integers(1, 1_000_000),
                "large_images": st.booleans(),
            }
        ),
        "access": st.fixed_dictionaries(
            {
                "tokens": st.booleans(),
                "token_minutes": st.integers(1, 525_600),
                "models": st.sampled_from(["supervisor", "off"]),
            }
        ),
        "properties": st.dictionaries(
            st.sampled_from(["io_ratio", "metrics_config", "cors_allowed_origin"]),
            st.text(min_size=1).filter(lambda text: text == text.strip() and text.isprintable()),
        ),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=DEPLOYMENTS)
def test_all_that_both_files_can_say_comes_back(tmp_path: Path, values: dict[str, object]) -> None:
    deployment = Deployment.model_validate(values)
    path = write(tmp_path, **render_deployment(deployment))
    assert import_properties(path)[0] == deployment


def test_models_become_entries(tmp_path: Path) -> None:
    models = {
        "cnn": {
            "1.0": {
                "marName": "cnn.mar",
                "defaultVersion": True,
                "minWorkers": 2,
                "maxWorkers": 4,
                "batchSize": 8,
                "maxBatchDelay": 50,
                "responseTimeout": 120,
                "parallelLevel": 2,
            }
        }
    }
    path = write(tmp_path, load_models="cnn.mar,big=other.mar", models=json.dumps(models))
    deployment, notes = import_properties(path)
    assert deployment.models is not None
    first, second = deployment.models
    assert (first.archive, first.default, first.workers, first.batch_size) == (
        "cnn.mar",
        True,
        2,
        8,
    )
    assert (first.batch_delay_ms, first.response_timeout) == (50, 120)
    assert second.archive == "other.mar"
    assert "models: cnn 1.0 has up to 4 workers; it will have 2" in notes
    assert any("cnn 1.0 will wait for company for 50 microseconds" in note for note in notes)
    assert any("parallelLevel of cnn 1.0 is not kept" in note for note in notes)


def test_workers_of_which_only_the_most_is_said_are_named(tmp_path: Path) -> None:
    models = json.dumps({"b": {"1": {"marName": "b.mar", "maxWorkers": 3}}})
    deployment, notes = import_properties(write(tmp_path, load_models="b.mar", models=models))
    assert [entry.workers for entry in deployment.models or ()] == [None]
    assert any("b 1 has up to 3 workers and no minWorkers" in note for note in notes)


@pytest.mark.parametrize(
    ("properties", "start"),
    [
        ({"disable_token_authorization": "true"}, "disable_token_authorization is kept: whoever"),
        ({"metrics_address": "https://127.0.0.1:9"}, "metrics_address is https and becomes http"),
        (
            {
                "metrics_address": "http://127.0.0.1:9",
                "certificate_file": "/c.pem",
                "private_key_file": "/k.pem",
            },
            "metrics_address is http and becomes https",
        ),
    ],
)
def test_what_becomes_more_or_less_open_is_named(
    tmp_path: Path, properties: dict[str, str], start: str
) -> None:
    _, notes = import_properties(write(tmp_path, load_models="none", **properties))
    assert [note.startswith(start) for note in notes] == [True]
    harmless = {"metrics_address": "http://127.0.0.1:9", "disable_token_authorization": "false"}
    assert import_properties(write(tmp_path, load_models="none", **harmless))[1] == []


def test_all_of_a_store_is_served_where_some_have_settings(tmp_path: Path) -> None:
    for name in ("a.mar", "b.mar"):
        (tmp_path / name).touch()
    models = json.dumps({"b": {"1": {"marName": "b.mar", "minWorkers": 3}}})
    path = write(tmp_path, load_models="all", model_store=".", models=models)
    entries = import_properties(path)[0].models or []
    assert [(entry.archive, entry.workers) for entry in entries] == [("b.mar", 3), ("a.mar", None)]


def test_what_is_not_kept_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        inference_address="http://0.0.0.0:9090",
        metrics_address="unix:/tmp/x.sock",
        grpc_inference_address="10.0.0.1",
        keystore="keystore.p12",
        keystore_pass="changeit",
        blacklist_env_vars="AWS_.*",
        cors_allowed_origin="*",
        python="/usr/bin/python3",
        job_queue_sise="7",
        vmargs="-Xmx2g -XX:+UseG1GC",
        async_logging="true",
    )
    deployment, notes = import_properties(path)
    assert deployment.ports != "free"
    assert deployment.ports.inference == 9090
    assert deployment.jvm.heap == 2 << 30
    assert deployment.jvm.options == ["-XX:+UseG1GC"]
    assert deployment.properties == {"cors_allowed_origin": "*", "async_logging": "true"}
    text = "\n".join(notes)
    for start in (
        "inference_address listens on 0.0.0.0",
        "metrics_address is a Unix socket",
        "grpc_inference_address listens on 10.0.0.1",
        "keystore is a Java keystore",
        "blacklist_env_vars is not kept",
        "cors_allowed_origin lets pages of that site",
        "python is not kept",
        "job_queue_sise is no key of TorchServe's, which passes over it; did you mean job_queue_s",
    ):
        assert start in text


def test_certificates_become_tls(tmp_path: Path) -> None:
    path = write(tmp_path, certificate_file="/c.pem", private_key_file="/k.pem")
    tls = import_properties(path)[0].tls
    assert tls is not None
    assert str(getattr(tls, "certificate", "")) == "/c.pem"


def test_all_wrong_values_are_said_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, job_queue_size="many", inference_address="here", models="{")
    with pytest.raises(ConfigurationError) as caught:
        import_properties(path)
    assert [line.split("=")[0] for line in caught.value.detail.splitlines()] == [
        "inference_address",
        "job_queue_size",
        "models",
    ]
    with pytest.raises(ConfigurationError, match=r"limits\.queue"):
        import_properties(write(tmp_path, job_queue_size="0"))


def test_a_file_that_is_none_is_ours_to_say(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        import_properties(tmp_path / "gone")
    (tmp_path / "broken").write_text("what\n")
    with pytest.raises(UsageError):
        import_properties(tmp_path / "broken")
