"""The settings that TorchServe would take: file, variables and its own defaults put together."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from marwright.server.keys import KEYS

__all__ = ["Effective", "is_loopback"]

_VARIABLE = re.compile(r"\$\$([^$]+[^$])\$\$")  # as ConfigManager.resolveEnvVarVals reads it


class Effective:
    """What each key of a configuration amounts to in an environment."""

    def __init__(
        self, properties: Mapping[str, str], environment: Mapping[str, str], folder: Path | None
    ) -> None:
        self.written = dict(properties)
        self.environment = environment
        self.folder = folder
        """Where relative paths begin; None where that is not known."""
        self.missing = {
            key: name
            for key, value in properties.items()
            for name in _VARIABLE.findall(value)
            if name not in environment
        }
        """Keys whose value names a variable that is not set, with its name."""
        self._taken = {
            key: _VARIABLE.sub(lambda match: environment.get(match[1], ""), value)
            for key, value in properties.items()
        }
        if self.is_on("enable_envvars_config"):
            self._taken.update(self.overrides)

    @property
    def overrides(self) -> dict[str, str]:
        """What TS_ variables say, by key; it counts where enable_envvars_config is on."""
        return {
            key.name: self.environment[key.variable]
            for key in KEYS.values()
            if key.variable in self.environment
            and (key.name != "allowed_urls" or self.is_on("use_env_allowed_urls"))
        }

    def __contains__(self, key: str) -> bool:
        return key in self._taken

    def __getitem__(self, key: str) -> str:
        """Return the value that counts, TorchServe's default where there is none."""
        return self._taken.get(key, KEYS[key].default)

    def is_on(self, key: str) -> bool:
        """Return whether a switch is on; Java takes `true` alone, in any case, as that."""
        return self[key].lower() == "true"

    def read_number(self, key: str) -> float | None:
        """Return a number, or None where it is none."""
        try:
            return float(self[key])
        except ValueError:
            return None

    def find_path(self, key: str) -> Path | None:
        """Return the path that a key names; None where it names none, or nobody knows where."""
        if not self[key]:
            return None
        path = Path(self[key])
        if path.is_absolute():
            return path
        return None if self.folder is None else self.folder / path

    def read_host(self, key: str) -> str | None:
        """Return an address's host, "" for a Unix socket, None for what TorchServe refuses."""
        value = self[key]
        if key.startswith("grpc"):
            return value
        if re.match(r"unix:/", value, re.IGNORECASE):
            return ""
        # ConfigManager.ADDRESS_PATTERN: no IPv6 and no path.
        match = re.fullmatch(r"https?://([^:^/]+)(:[0-9]+)?", value, re.IGNORECASE)
        return match[1] if match else None

    def is_encrypted(self, key: str) -> bool:
        """Return whether an address is served with TLS."""
        if key.startswith("grpc"):
            return self.is_on("enable_grpc_ssl")
        return urlsplit(self[key]).scheme.lower() == "https"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host; a name but localhost does not count."""
    if host.lower() in ("", "localhost"):  # Java takes an empty host as loopback
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
