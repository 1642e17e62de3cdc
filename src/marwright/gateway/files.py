"""What a site keeps in its run folder: secrets, a certificate, the traffic, and where it answers.

The gateway's nginx has the same folder, so that its guard removes all of it where a killed site is
adopted by nobody. Each replica has a folder of its own in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterable
from pathlib import Path

from marwright.client import Endpoint
from marwright.errors import NoServerError
from marwright.gateway.configuration import Settings
from marwright.gateway.control_routes import UPLOADS, ControlSettings
from marwright.gateway.traffic import Traffic
from marwright.server.certificate import Certificate, make_certificate
from marwright.server.deployment import Deployment
from marwright.server.launch import make_run_folder
from marwright.server.sections import GatewaySettings, TlsFiles
from marwright.storage import translate_os_errors, write_file

__all__ = ["SiteFiles"]

TRAFFIC = "traffic.json"
TOKENS = "tokens"
REPLICA_KEY = "replica_key"


class SiteFiles:
    """The files of one site; `take` finds those of a killed one, or begins anew."""

    def __init__(self, folder: Path, *, adopted: bool) -> None:
        self.folder = folder
        self.adopted = adopted

    @classmethod
    def take(cls, left: Iterable[Path]) -> SiteFiles:
        """Return what a killed site has left in one of these folders, or else a fresh folder's.

        Raises:
            StorageError: it cannot be written.
        """
        found = next((folder for folder in left if (folder / TRAFFIC).exists()), None)
        files = cls(found or make_run_folder(), adopted=found is not None)
        with translate_os_errors(f"write {files.folder}"):
            for path in (files.replica_key, files.folder / TOKENS):
                if not path.exists():
                    path.touch(mode=0o600)
                    path.write_text(secrets.token_urlsafe(32), encoding="ascii")
            (files.folder / UPLOADS).mkdir(mode=0o700, exist_ok=True)
        if found is None:
            files.write_traffic(Traffic())
        return files

    @property
    def replica_key(self) -> Path:
        """The file of the token that the gateway sends to replicas."""
        return self.folder / REPLICA_KEY

    def read_traffic(self) -> Traffic:
        """Return the splits as they were set last."""
        return Traffic.read(self.folder / TRAFFIC)

    def write_traffic(self, traffic: Traffic) -> None:
        """Keep the splits for whoever adopts this site."""
        traffic.write(self.folder / TRAFFIC)

    def make_settings(
        self,
        deployment: Deployment,
        replicas: Iterable[Endpoint],
        traffic: Traffic,
        *,
        health_url: str,
        key: str,
    ) -> Settings:
        """Return what the gateway is to be in front of replicas.

        `health_url` and `key` are those of the site's own endpoints.

        Raises:
            ConfigurationError: it cannot be that.
        """
        gateway, limits = deployment.gateway or GatewaySettings(), deployment.limits
        certificate = self._find_certificate(deployment)
        tokens = self._find_tokens(deployment)
        return Settings(
            port=gateway.port,
            host=gateway.host,
            replicas=tuple(endpoint.inference_url for endpoint in replicas),
            certificate=certificate.certificate if certificate else None,
            key=certificate.key if certificate else None,
            replica_token=self.replica_key.read_text("ascii") if tokens else None,
            client_tokens=tokens,
            request_bytes=limits.request_bytes,
            request_seconds=limits.request_seconds,
            connections=limits.connections,
            retry_after=limits.retry_after,
            traffic=traffic,
            control=ControlSettings(gateway.control, health_url, key) if gateway.control else None,
        )

    def write_endpoint(
        self, deployment: Deployment, first: Endpoint, *, health_url: str
    ) -> Endpoint:
        """Say where clients find the gateway; management is that of the first replica.

        Files that say so already are let be.

        Raises:
            StorageError: the tokens cannot be read, or the folder cannot be written.
        """
        gateway = deployment.gateway or GatewaySettings()
        certificate = self._find_certificate(deployment)
        tokens = self._find_tokens(deployment)
        endpoint = dataclasses.replace(
            first,
            inference_url=f"{'https' if certificate else 'http'}://{_reach(gateway.host)}:{gateway.port}",
            grpc_inference="",
            grpc_management="",
            gateway_token=self._write_token(tokens) if tokens else None,
            certificate=certificate.certificate if certificate else None,
            health_url=health_url,
        )
        path = self.folder / "endpoint.json"
        with contextlib.suppress(NoServerError):
            if Endpoint.read(path) == endpoint:
                return endpoint
        endpoint.write(path)
        return endpoint

    def _find_tokens(self, deployment: Deployment) -> Path | None:
        """Return the file of what clients send; None where they need no token."""
        if not deployment.access.tokens or deployment.gateway is None:
            return None
        return deployment.gateway.tokens or self.folder / TOKENS

    def _write_token(self, tokens: Path) -> Path:
        """Write the first of the clients' tokens for our own commands, and return where."""
        path = self.folder / "token"
        with translate_os_errors(f"read {tokens}"):
            first = next(iter(tokens.read_bytes().split()), b"")
            if path.exists() and path.read_bytes() == first:
                return path
        with write_file(path) as stream:
            stream.write(first)
        path.chmod(0o600)
        return path

    def _find_certificate(self, deployment: Deployment) -> Certificate | None:
        """Return the certificate of `tls`; one for development is made once."""
        tls = deployment.tls
        if isinstance(tls, TlsFiles):
            return Certificate(tls.certificate, tls.key)
        if tls is None:
            return None
        folder = self.folder / "tls"
        made = Certificate(folder / "certificate.pem", folder / "key.pem")
        return made if made.certificate.exists() else make_certificate(folder)


def _reach(host: str) -> str:
    """Return where this machine reaches what listens at a host: at all addresses is no address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
