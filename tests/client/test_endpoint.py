from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint
from marwright.errors import NoServerError, StorageError

FULL = Endpoint(
    "http://127.0.0.1:8080",
    "http://127.0.0.1:8081",
    "http://127.0.0.1:8082",
    key_file=Path("/run/keys ü.json"),
    model_store=Path("/srv/store"),
    log_file=Path("/run/logs/server.log"),
    policy=Path("/run/policy.yaml"),
    supervisor_key=Path("/run/supervisor.key"),
    grpc_inference="127.0.0.1:7070",
    grpc_management="127.0.0.1:7071",
    certificate=Path("/run/certificate.pem"),
    health_url="http://127.0.0.1:8083",
)


@pytest.mark.parametrize("endpoint", [FULL, Endpoint("http://a:1", "http://a:2")])
def test_what_is_written_is_what_is_read(tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.write(tmp_path / "deep" / "endpoint.json")
    assert Endpoint.read(tmp_path / "deep" / "endpoint.json") == endpoint


def test_the_file_names_the_key_file_and_holds_no_token(tmp_path: Path, write_keys: Any) -> None:
    endpoint = dataclasses.replace(FULL, key_file=write_keys(API="aP1kEy", inference="1nFeR"))
    endpoint.write(tmp_path / "endpoint.json")
    text = (tmp_path / "endpoint.json").read_text(encoding="utf-8")
    assert "key_file.json" in text
    assert "aP1kEy" not in text + repr(endpoint)
    assert "1nFeR" not in text + repr(endpoint)


def test_a_missing_file_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(NoServerError, match="marwright serve"):
        Endpoint.read(tmp_path / "endpoint.json")


@pytest.mark.parametrize(
    "values",
    [
        [],
        7,
        "text",
        None,
        {},
        {"inference_url": "http://a"},
        {"inference_url": None, "management_url": None},
        {"inference_url": 8080, "management_url": 8081},
        {"inference_url": "http://a", "management_url": "http://a", "key_file": 7},
    ],
)
def test_a_file_of_another_shape_is_no_server(tmp_path: Path, values: Any) -> None:
    (tmp_path / "endpoint.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(NoServerError, match=r"cannot read the endpoint .*endpoint\.json"):
        Endpoint.read(tmp_path / "endpoint.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_no_json_is_no_server(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "endpoint.json").write_bytes(content)
    with pytest.raises(NoServerError):
        Endpoint.read(tmp_path / "endpoint.json")


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        FULL.write(tmp_path / "file" / "endpoint.json")
