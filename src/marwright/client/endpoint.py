"""Where a server answers, and which file holds its tokens."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from marwright.errors import NoServerError
from marwright.storage import write_file

__all__ = ["Endpoint"]


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
    log_file: Path | None = None
    """The server's log, where it is on this machine; workers leave their tracebacks there."""
    policy: Path | None = None
    """What archives must fulfil that are registered with it, where it has a policy."""

    def write(self, path: Path) -> None:
        """Write the endpoint as JSON; it names the key file and holds no token."""
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
                inference_url=_read_url(values, "inference_url"),
                management_url=_read_url(values, "management_url"),
                metrics_url=values.get("metrics_url") or "",
                key_file=Path(values["key_file"]) if values.get("key_file") else None,
                model_store=Path(values["model_store"]) if values.get("model_store") else None,
                log_file=Path(values["log_file"]) if values.get("log_file") else None,
                policy=Path(values["policy"]) if values.get("policy") else None,
            )
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise NoServerError(
                f"cannot read the endpoint {path}",
                found=f"{type(exc).__name__}: {exc}",
                remedy="start a server: marwright serve",
            ) from exc


def _read_url(values: dict[str, object], key: str) -> str:
    url = values[key]
    if not isinstance(url, str):
        raise TypeError(f"{key} is {url!r}")
    return url
