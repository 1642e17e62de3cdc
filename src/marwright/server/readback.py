"""What TorchServe says at its start that it runs with, compared with what it was given.

org.pytorch.serve.util.ConfigManager.dumpConfigurations writes it as one message of some forty
lines, "Inference address: http://127.0.0.1:8080" and so on. Not every key is among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["compare_properties", "read_configuration"]

_FIRST = "Torchserve version:"

_LABELS = {
    "inference_address": "Inference address",
    "management_address": "Management address",
    "metrics_address": "Metrics address",
    "model_store": "Model Store",
    "workflow_store": "Workflow Store",
    "load_models": "Initial Models",
    "models": "Model config",
    "number_of_netty_threads": "Netty threads",
    "netty_client_threads": "Netty client threads",
    "default_workers_per_model": "Default workers per model",
    "blacklist_env_vars": "Blacklist Regex",
    "max_response_size": "Maximum Response Size",
    "max_request_size": "Maximum Request Size",
    "limit_max_image_pixels": "Limit Maximum Image Pixels",
    "prefer_direct_buffer": "Prefer direct buffer",
    "allowed_urls": "Allowed Urls",
    "install_py_dep_per_model": "Custom python dependency for model allowed",
    "enable_metrics_api": "Enable metrics API",
    "metrics_mode": "Metrics mode",
    "disable_system_metrics": "Disable system metrics",
    "cpp_log_config": "CPP log config",
    "system_metrics_cmd": "System metrics command",
    "enable_model_api": "Model API enabled",
    "metrics_config": "Metrics config path",
}
"""Keys of config.properties, and what dumpConfigurations calls them."""


def compare_properties(log: Path, properties: Mapping[str, str]) -> list[str]:
    """Return where TorchServe runs with another value than it was given, a line each.

    `log` is its server.log, which may hold earlier starts: the last one counts. Keys that it does
    not tell are not compared.
    """
    live = read_configuration(log)
    if not live:  # another log level, or a disk that is full
        return []
    found = []
    for key, wanted in properties.items():
        label = _LABELS.get(key)
        if label is None or (key in _THREADS and wanted == "0"):  # then TorchServe chooses
            continue
        if label not in live:
            found.append(f"{key}: TorchServe does not say what it is, wanted {wanted}")
        elif _FORMS.get(key, _plain)(live[label]) != _FORMS.get(key, _plain)(wanted):
            found.append(f"{key}: TorchServe runs with {live[label]}, wanted {wanted}")
    return found


def read_configuration(log: Path) -> dict[str, str]:
    """Return what the last start in a log told of its configuration; nothing where none did."""
    try:
        # No device: one that stands in for a full disk can be read without an end.
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    except OSError:
        return {}
    lines = text.splitlines()
    for line in reversed(lines):
        if _FIRST in line and (message := _read_message(line)) is not None:
            return _read_lines(message)
    return {}


def _read_message(line: str) -> str | None:
    """Return the message of a log's line, where it is the one that is looked for."""
    try:
        message = json.loads(line)["message"]
    except (ValueError, TypeError, LookupError):
        return None
    return message if isinstance(message, str) and message.lstrip().startswith(_FIRST) else None


def _read_lines(message: str) -> dict[str, str]:
    """Return labels and values; a value that holds line breaks goes on below its label."""
    values: dict[str, str] = {}
    label = ""
    known = set(_LABELS.values())
    for line in message.strip().splitlines():
        name, colon, value = line.partition(":")
        if colon and (name in known or re.fullmatch(r"[A-Z][A-Za-z ]{2,40}", name)):
            label = name
            values[label] = value.strip()
        elif label:
            values[label] += "\n" + line
    return values


def _plain(value: str) -> str:
    """Return a value as it is compared: "N/A" is none."""
    return "" if value.strip() == "N/A" else value.strip()


def _lower(value: str) -> str:
    return _plain(value).lower()


def _list(value: str) -> str:
    """Return a list as Java prints it, "[a, b]", and as it is written, "a,b", alike."""
    return ",".join(part.strip() for part in value.strip().strip("[]").split(","))


def _document(value: str) -> str:
    try:
        return json.dumps(json.loads(value), sort_keys=True)
    except ValueError:
        return _plain(value)


_FORMS: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(
        (
            "limit_max_image_pixels",
            "prefer_direct_buffer",
            "install_py_dep_per_model",
            "enable_metrics_api",
            "disable_system_metrics",
            "enable_model_api",
            "metrics_mode",
        ),
        _lower,
    ),
    "allowed_urls": _list,
    "models": _document,
}
_THREADS = {"number_of_netty_threads", "netty_client_threads", "default_workers_per_model"}
