"""config.properties: TorchServe's configuration file, read and written.

Keys are those of docs/configuration.md and org.pytorch.serve.util.ConfigManager.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from marwright.errors import StorageError, UsageError
from marwright.server.ports import Ports

__all__ = ["DEFAULTS", "read_properties", "render_properties"]

DEFAULTS: dict[str, str] = {
    **Ports().to_properties(),
    "enable_model_api": "true",
    "disable_token_authorization": "false",
    # Archives are registered by their file name in the store, so no URL is ever allowed.
    "allowed_urls": "none",
    "install_py_dep_per_model": "false",
    "enable_envvars_config": "false",
    "default_workers_per_model": "1",
    "job_queue_size": "100",
    "max_request_size": "6553500",
    "max_response_size": "6553500",
    "limit_max_image_pixels": "true",
    "metrics_mode": "prometheus",
}
"""What `marwright serve` gives TorchServe; the repository's config.properties is its rendering."""

_HEADER = """\
# The configuration that `marwright serve` and the server tests use: everything on loopback, tokens
# on, models registered from the store only. A copy in the working folder is taken instead of the
# built-in one; `marwright serve --config FILE` names another.
"""


def read_properties(path: Path) -> dict[str, str]:
    """Read a properties file: `key=value` lines, `#` and `!` begin comments.

    Raises:
        StorageError: the file cannot be read.
        UsageError: lines that are neither; all of them are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise StorageError(f"cannot read {path}", found=str(exc)) from exc
    properties: dict[str, str] = {}
    broken = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith(("#", "!")):
            continue
        key, separator, value = text.partition("=")
        if not separator:
            broken.append(f"line {number}: {text!r}")
        properties[key.strip()] = value.strip()
    if broken:
        raise UsageError(f"{path} cannot be read", expected="key=value", found="; ".join(broken))
    return properties


def render_properties(properties: Mapping[str, str]) -> str:
    """Return the text of a properties file; backslashes are escaped as Java wants them."""
    lines = [f"{key}={value}" for key, value in properties.items()]
    return _HEADER + "\n".join(lines) + "\n"
