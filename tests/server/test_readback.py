from __future__ import annotations

import json
from pathlib import Path

import pytest

from marwright.server import TorchServe
from marwright.server.properties import read_properties
from marwright.server.readback import compare_properties, read_configuration


def write(folder: Path, *messages: str) -> Path:
    path = folder / "server.log"
    lines = [json.dumps({"time": "", "level": "INFO", "message": text}) for text in messages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.server
def test_a_real_server_runs_with_what_it_was_given(server: TorchServe) -> None:
    properties = read_properties(server.run_folder / "config.properties")
    assert len(read_configuration(server.log_file)) > 30
    assert compare_properties(server.log_file, properties) == []


@pytest.mark.server
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inference_address", "http://127.0.0.1:1"),
        ("max_request_size", "7"),
        ("enable_model_api", "false"),
        ("models", "{}"),
        ("allowed_urls", "https://a.example/.*,https://b.example/.*"),
        ("metrics_mode", "log"),
    ],
)
def test_a_difference_names_key_and_both_values(server: TorchServe, key: str, value: str) -> None:
    properties = read_properties(server.run_folder / "config.properties")
    (line,) = compare_properties(server.log_file, {**properties, key: value})
    assert line.startswith(f"{key}: TorchServe runs with ")
    assert line.endswith(f", wanted {value}")


def test_the_last_start_counts(tmp_path: Path) -> None:
    log = write(
        tmp_path,
        "\nTorchserve version: 0.12.0\nMaximum Request Size: 1",
        "\nTorchserve version: 0.12.0\nMaximum Request Size: 2\nAllowed Urls: [a, b]",
        "something of Torchserve version: 9",
    )
    assert compare_properties(log, {"max_request_size": "2", "allowed_urls": "a,b"}) == []
    assert compare_properties(log, {"max_request_size": "1"}) == [
        "max_request_size: TorchServe runs with 2, wanted 1"
    ]


def test_what_torchserve_keeps_to_itself_is_said(tmp_path: Path) -> None:
    log = write(tmp_path, "\nTorchserve version: 0.12.0")
    (line,) = compare_properties(log, {"max_request_size": "2", "keystore_pass": "x"})
    assert line == "max_request_size: TorchServe does not say what it is, wanted 2"
    assert compare_properties(tmp_path / "none", {"max_request_size": "2"}) == []
    assert compare_properties(Path("/dev/zero"), {"max_request_size": "2"}) == []
