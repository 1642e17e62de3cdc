"""Where a server answers, and which files hold its tokens, its key and its certificate."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from marwright.errors import NoServerError
from marwright.storage import write_file

__all__ = ["Endpoint", "SUPERVISOR_KEY_NAME"]

SUPERVISOR_KEY_NAME = "supervisor_key"
"""The file of the key, in the server's folder beside its key_file.json."""


@dataclass(frozen=True)
class Endpoint:
    """The addresses of one server."""

    inference_url: str
    management_url: str
    metrics_url: str = ""
    key_file: Path | None = None
    """TorchServe's key_file.json; None where token authorisation is off."""
    model_store: Path | None = None
    """The server's store, where it is on this machine."""
    staging: Path | None = None
    """The folder that TorchServe itself reads archives from, where that is another."""
    log_file: Path | None = None
    """The server's log, where it is on this machine; workers leave their tracebacks there."""
    policy: Path | None = None
    """What archives must fulfil that are registered with it, where it has a policy."""
    supervisor_key: Path | None = None
    """The file with the key that management calls carry which change something."""
    grpc_inference: str = ""
    """HOST:PORT of inference over gRPC, where it is on."""
    grpc_management: str = ""
    certificate: Path | None = None
    """The PEM file to trust for https and gRPC, in place of what the system trusts."""
    gateway_token: Path | None = None
    """The file with the token that a gateway asks for at `inference_url`; it does not expire."""
    health_url: str = ""
    """The supervisor's own address, of live, ready and started."""

    def write(self, path: Path) -> None:
        """Write the endpoint as JSON; it names the files of secrets and holds none."""
        values = {key: str(value) if value else None for key, value in asdict(self).items()}
        with write_file(path) as stream:
            stream.write(json.dumps(values, indent=2).encode())

    @classmethod
    def read(cls, path: Path) -> Endpoint:
        """Read what `write` wrote.

        Raises:
            NoServerError: the file is missing or broken.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                inference_url=_read_text(values, "inference_url"),
                management_url=_read_text(values, "management_url"),
                metrics_url=_read_text(values, "metrics_url", default=""),
                key_file=_read_path(values, "key_file"),
                model_store=_read_path(values, "model_store"),
                staging=_read_path(values, "staging"),
                log_file=_read_path(values, "log_file"),
                policy=_read_path(values, "policy"),
                supervisor_key=_read_path(values, "supervisor_key"),
                grpc_inference=_read_text(values, "grpc_inference", default=""),
                grpc_management=_read_text(values, "grpc_management", default=""),
                certificate=_read_path(values, "certificate"),
                gateway_token=_read_path(values, "gateway_token"),
                health_url=_read_text(values, "health_url", default=""),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise NoServerError(
                f"cannot read the endpoint {path}",
                found=f"{type(exc).__name__}: {exc}",
                remedy="start a server: marwright serve",
            ) from exc


def _read_text(values: dict[str, object], key: str, *, default: str | None = None) -> str:
    """Return a text; where it may be missing, files of older servers are read too."""
    text = values[key] if default is None else values.get(key) or default
    if not isinstance(text, str):
        raise TypeError(f"{key} is {text!r}")
    return text


def _read_path(values: dict[str, object], key: str) -> Path | None:
    text = _read_text(values, key, default="")
    return Path(text) if text else None
