from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from marwright.server.certificate import Certificate
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.ports import Ports
from marwright.server.rendering import render_deployment, render_java_options, render_models
from marwright.server.wanted import Wanted


def want(version: str, *, name: str = "cnn", default: bool = False, **settings: Any) -> Wanted:
    file = f"{name}-{version}.mar"
    whole = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1, **settings}
    return Wanted(name, version, Path(file), ModelEntry(archive=file), {}, whole, default)


def name_files(*wanted: Wanted) -> dict[tuple[str, str], str]:
    return {item.key: f"staged-{item.path.name}" for item in wanted}


def render(*wanted: Wanted) -> tuple[str, Any]:
    properties = render_models(wanted, name_files(*wanted))
    return properties["load_models"], json.loads(properties["models"])


def test_nothing_is_named_where_nothing_is_loaded() -> None:
    assert render_models([], {}) == {}
    assert render_models([want("1.0")], {}) == {}  # it could not be staged


def test_each_version_is_loaded_by_its_staged_name_and_one_is_the_default() -> None:
    loaded, models = render(want("2.0", default=True), want("1.0"), want("1.0", name="other"))
    assert loaded == "staged-cnn-2.0.mar,staged-cnn-1.0.mar,staged-other-1.0.mar"
    assert {name: list(versions) for name, versions in models.items()} == {
        "cnn": ["2.0", "1.0"],
        "other": ["1.0"],
    }
    assert models["cnn"]["2.0"]["defaultVersion"] is True
    assert models["cnn"]["1.0"]["defaultVersion"] is False
    assert models["cnn"]["1.0"]["marName"] == "staged-cnn-1.0.mar"


def test_what_is_not_staged_is_in_neither_property() -> None:
    good, bad = want("1.0"), want("2.0", default=True)
    properties = render_models([bad, good], name_files(good))
    assert properties["load_models"] == "staged-cnn-1.0.mar"
    assert list(json.loads(properties["models"])["cnn"]) == ["1.0"]


def test_settings_that_torchserve_takes_for_a_version_are_said_and_no_others() -> None:
    item = want("1.0", minWorkers=2, maxWorkers=3, responseTimeout=60, jobQueueSize=5, handler={})
    _, models = render(item)
    assert models["cnn"]["1.0"] == {
        "marName": "staged-cnn-1.0.mar",
        "defaultVersion": False,
        "minWorkers": 2,
        "maxWorkers": 3,
        "batchSize": 8,
        "maxBatchDelay": 1,
        "responseTimeout": 60,
    }


def render_properties(**values: Any) -> Mapping[str, str]:
    return render_deployment(Deployment.model_validate(values), ports=Ports())


def test_a_deployment_that_says_nothing_is_closed() -> None:
    properties = render_properties()
    assert properties["disable_token_authorization"] == "false"
    assert properties["allowed_urls"] == "none"
    assert properties["install_py_dep_per_model"] == "false"
    assert properties["enable_envvars_config"] == "false"
    assert properties["limit_max_image_pixels"] == "true"
    assert properties["inference_address"] == "http://127.0.0.1:8080"
    assert "certificate_file" not in properties


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"access": {"models": "off"}}, "enable_model_api", "false"),
        ({"access": {"models": "token"}}, "enable_model_api", "true"),
        ({"access": {"tokens": False}}, "disable_token_authorization", "true"),
        ({"access": {"token_minutes": 5}}, "token_expiration_min", "5"),
        ({"limits": {"queue": 7}}, "job_queue_size", "7"),
        ({"limits": {"request_bytes": 2048}}, "max_request_size", "2048"),
        ({"limits": {"response_bytes": 4096}}, "max_response_size", "4096"),
        ({"limits": {"large_images": True}}, "limit_max_image_pixels", "false"),
        ({"properties": {"number_of_netty_threads": 3}}, "number_of_netty_threads", "3"),
    ],
)
def test_what_a_deployment_says_becomes_a_property(
    values: dict[str, Any], key: str, value: str
) -> None:
    assert render_properties(**values)[key] == value


def test_with_a_certificate_all_apis_are_encrypted(tmp_path: Path) -> None:
    made = Certificate(tmp_path / "certificate.pem", tmp_path / "key.pem")
    deployment = Deployment(tls="development")
    properties = render_deployment(deployment, ports=Ports(), certificate=made)
    for api in ("inference", "management", "metrics"):
        assert properties[f"{api}_address"].startswith("https://127.0.0.1:")
    assert properties["enable_grpc_ssl"] == "true"
    assert properties["certificate_file"] == str(made.certificate)
    assert properties["private_key_file"] == str(made.key)


def test_java_hears_of_its_memory_the_door_and_the_log(tmp_path: Path) -> None:
    deployment = Deployment.model_validate(
        {
            "jvm": {"heap": "700 MiB", "direct_memory": "300 MiB", "options": ["-Xss1m"]},
            "access": {"paths_denied": ["/workflows", "/explanations"]},
            "limits": {"request_seconds": 9, "connections": 8, "retry_after": 7},
            "logging": {"requests": "all"},
        }
    )
    options = render_java_options(deployment, queues=1, key_file=tmp_path / "key")
    assert {"-Xmx700m", "-XX:MaxDirectMemorySize=300m", "-XX:-UsePerfData"} <= set(options)
    assert f"-Dmarwright.key.file={tmp_path / 'key'}" in options
    assert "-Dmarwright.deny=/workflows,/explanations" in options
    assert "-Dmarwright.request.seconds=9" in options
    assert "-Dmarwright.max.connections=8" in options
    assert "-Dmarwright.retry.after=7" in options
    assert "-Dmarwright.log.requests=all" in options
    assert options[-1] == "-Xss1m"  # the user's come last, and win


def test_longer_queues_take_more_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marwright.server.memory.read_memory", lambda: 1 << 40)

    def read_heap(queues: int) -> int:
        options = render_java_options(Deployment(), queues=queues, key_file=None)
        (heap,) = (option for option in options if option.startswith("-Xmx"))
        return int(heap.removeprefix("-Xmx").removesuffix("m"))

    assert read_heap(1000) - read_heap(100) in (5624, 5625)  # 900 requests of 6,553,500 bytes


def test_without_a_key_the_door_asks_for_none() -> None:
    options = render_java_options(Deployment(), queues=1, key_file=None)
    assert not [option for option in options if option.startswith("-Dmarwright.key.file")]
