"""The five ports of a TorchServe."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from marwright.errors import PortTakenError, UsageError

if TYPE_CHECKING:
    from marwright.server.deployment import Deployment

__all__ = ["is_free", "list_taken", "Ports"]

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Ports:
    """TCP ports on loopback, one for each API."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    def __post_init__(self) -> None:
        """Raise UsageError for numbers that are no ports."""
        for item in fields(self):
            port = getattr(self, item.name)
            if not 0 < port < 1 << 16:
                raise UsageError(
                    f"no such {item.name} port", expected="1 to 65535", found=str(port)
                )

    @classmethod
    def find_free(cls) -> Ports:
        """Return ports that nobody listens on now; somebody may take one before the server does."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in fields(cls)]
            for sock in sockets:
                sock.bind((HOST, 0))
            return cls(*(sock.getsockname()[1] for sock in sockets))

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> Ports:
        """Read the ports from TorchServe's properties; absent ones are TorchServe's defaults."""
        keys = {
            api: f"{api}_port" if api.startswith("grpc") else f"{api}_address"
            for api in (item.name for item in fields(cls))
        }
        ports = {
            api: _read_port(key, properties[key]) for api, key in keys.items() if key in properties
        }
        return cls(**ports)

    @classmethod
    def from_deployment(cls, deployment: Deployment) -> Ports:
        """Return a deployment's ports; TorchServe's own numbers where it says free."""
        if deployment.ports == "free":
            return cls()
        return cls(*(getattr(deployment.ports, item.name) for item in fields(cls)))

    def to_properties(self, *, scheme: Literal["http", "https"] = "http") -> dict[str, str]:
        """Return TorchServe's properties for these ports, all of them on loopback."""
        properties = {
            f"{api}_address": f"{scheme}://{HOST}:{getattr(self, api)}"
            for api in ("inference", "management", "metrics")
        }
        for api in ("grpc_inference", "grpc_management"):
            properties[f"{api}_address"] = HOST
            properties[f"{api}_port"] = str(getattr(self, api))
        return properties

    def check_free(self) -> None:
        """Raise PortTakenError naming every port that somebody listens on."""
        if taken := list_taken(asdict(self)):
            raise PortTakenError(
                f"port {', '.join(taken)} is taken",
                remedy="stop what listens there, or let us choose: marwright serve --free-ports",
            )


def list_taken(ports: Mapping[str, int]) -> list[str]:
    """Return those of some named ports that somebody listens on, as `8080 (inference)`."""
    return [f"{port} ({name})" for name, port in ports.items() if not is_free(port)]


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of loopback now."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def _read_port(key: str, value: str) -> int:
    try:
        port = urlsplit(value).port if key.endswith("_address") else int(value)
        if port is None:
            raise ValueError("no port")
    except ValueError as exc:
        raise UsageError(
            "the configuration has an address without a usable port",
            expected="such as inference_address=http://127.0.0.1:8080 or grpc_inference_port=7070",
            found=f"{key}={value} ({exc})",
        ) from exc
    return port
