"""The sections of a deploy.yaml: ports, limits, access, the gateway, supervision, releases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

__all__ = [
    "AccessSettings",
    "CanarySettings",
    "DriftSettings",
    "GatewaySettings",
    "JvmSettings",
    "LimitSettings",
    "LoggingSettings",
    "MailSettings",
    "MonitoringSettings",
    "parse_size",
    "place_path",
    "PortSettings",
    "PredictionSettings",
    "read_switch",
    "REDACTABLE",
    "ReleaseSettings",
    "ServerSettings",
    "ShadowSettings",
    "Size",
    "STRICT",
    "SupervisionSettings",
    "TargetSettings",
    "TlsFiles",
]

STRICT = ConfigDict(extra="forbid", frozen=True)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20}
_UNITS["gib"] = 1 << 30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: Any) -> Any:
    """Return bytes for a number, or for a text such as 512 MiB or 2 GB; anything else as it is."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"is no size: {value!r}; write bytes, or a number with KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str)]
REDACTABLE = (
    *("confidence", "content_type", "digest", "embedding", "features"),
    *("input", "prediction", "request", "score", "seconds"),
)
"""Fields of the prediction log that need not be written (handlers/prediction_log.py)."""
Percent = Annotated[float, Field(ge=0, le=100, multiple_of=0.01)]
Port = Annotated[int, Field(ge=1, le=65535)]


def place_path(path: Path, info: ValidationInfo) -> Path:
    """Return a path that starts in the file's folder, where the values come from a file."""
    folder = (info.context or {}).get("folder")
    return folder.absolute() / path.expanduser() if folder else path


def read_switch(value: Any) -> Any:
    """Take true for a section with its defaults, and false for none."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


class PortSettings(BaseModel):
    """TCP ports, all on loopback."""

    model_config = STRICT

    inference: Port = 8080
    """Predictions and explanations."""
    management: Port = 8081
    """Models and workers."""
    metrics: Port = 8082
    """TorchServe's own metrics; marwright's are at `health`."""
    grpc_inference: Port = 7070
    """Predictions over gRPC."""
    grpc_management: Port = 7071
    """Models and workers over gRPC."""
    health: Port = 8083
    """The supervisor's own /metrics, /live, /ready and /started."""

    @model_validator(mode="after")
    def _check_doubles(self) -> PortSettings:
        seen: dict[int, str] = {}
        for name in type(self).model_fields:
            port = getattr(self, name)
            if port in seen:
                raise ValueError(f"{seen[port]} and {name} are both {port}")
            seen[port] = name
        return self


class LimitSettings(BaseModel):
    """What one request may take."""

    model_config = STRICT

    request_bytes: Size = Field(default=6_553_500, ge=1024, le=2_147_483_647)
    """Largest request; larger ones are answered 413."""
    response_bytes: Size = Field(default=6_553_500, ge=1024, le=2_147_483_647)
    """Largest answer of a worker."""
    request_seconds: int = Field(default=60, ge=1, le=86_400)
    """Seconds until a request must have arrived whole; then 408."""
    connections: int = Field(default=2000, ge=1, le=1_000_000)
    """Most connections at once; further ones are answered 503 and closed."""
    queue: int = Field(default=100, ge=1, le=1_000_000)
    """Requests that wait for one version, where neither entry nor archive says."""
    retry_after: int = Field(default=1, ge=0, le=3600)
    """Seconds that a refused client is told to wait: Retry-After of each 429 and 503."""
    large_images: bool = False
    """Whether Pillow may open images of any number of pixels: decompression bombs too."""


class AccessSettings(BaseModel):
    """Who may do what."""

    model_config = STRICT

    tokens: bool = True
    """Whether each request needs a token; the run folder holds them."""
    token_minutes: int = Field(default=60, ge=1, le=525_600)
    """How long a token lasts before it is renewed."""
    models: Literal["supervisor", "token", "off"] = "supervisor"
    """Who may register, scale and unregister: who can read the server's run folder; whoever has
    the management token; nobody, once the server has started."""
    paths_denied: list[str] = ["/workflows", "/wfpredict"]
    """Paths that answer 404, with all that begins with them."""
    environment: list[str] = []
    """Variables that workers see although their names sound like secrets."""
    gateway_key: Path | None = None
    """A file with the token that a gateway in front sends with predictions; the server's own
    tokens go on to hold."""

    @field_validator("gateway_key")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)


class TlsFiles(BaseModel):
    """A certificate and its key, PEM."""

    model_config = STRICT

    certificate: Path
    """The certificate, with those that it is signed by."""
    key: Path
    """Its private key, PKCS#8, not encrypted."""

    @field_validator("certificate", "key")
    @classmethod
    def _resolve(cls, path: Path, info: ValidationInfo) -> Path:
        return place_path(path, info)


class GatewaySettings(BaseModel):
    """The nginx in front: it splits a model's traffic between versions, and retries."""

    model_config = STRICT

    port: Port = 8000
    """Where it listens, with the certificate of `tls` where there is one."""
    host: str = "127.0.0.1"
    """The address; only predictions, explanations and /ping are let through."""
    tokens: Path | None = None
    """Bearer tokens of its clients, one a line; one is made for each start where not said."""
    control: Path | None = None
    """Bearer tokens of those who may release from another machine, one a line; nobody may where
    not said."""

    @field_validator("tokens", "control")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)


class ServerSettings(BaseModel):
    """One server of a fleet: a gateway elsewhere, which `marwright release` moves with others."""

    model_config = STRICT

    url: str = Field(pattern=r"^https?://[^/?#\s@]+/?$")
    """Its gateway's address; https, but for loopback."""
    token: Path
    """A file with one of the tokens of its gateway.control."""
    authority: Path | None = None
    """PEM of what its certificate is checked by; the system's where not said."""

    @field_validator("token", "authority")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)


class JvmSettings(BaseModel):
    """The Java process."""

    model_config = STRICT

    heap: Size | Literal["auto"] = "auto"
    """-Xmx; auto: room for every queue full of largest requests, a quarter of memory at most."""
    direct_memory: Size | Literal["auto"] = "auto"
    """Memory for data on its way in and out, -XX:MaxDirectMemorySize."""
    options: list[str] = []
    """Further options of `java`."""


class LoggingSettings(BaseModel):
    """The server's logs: JSON, one object a line."""

    model_config = STRICT

    folder: Path | None = None
    """Where logs are kept; without it they vanish with the server."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is least worth a line."""
    requests: Literal["none", "errors", "all"] = "errors"
    """Which answers get a line of their own."""
    file_bytes: Size = Field(default=20_000_000, ge=100_000)
    """Size at which a new file is begun."""
    files: int = Field(default=5, ge=2, le=1000)
    """How many files are kept."""

    @field_validator("folder")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)


class SupervisionSettings(BaseModel):
    """What the supervisor watches, and when it gives up."""

    model_config = STRICT

    check_seconds: float = Field(default=1.0, ge=0.1, le=60)
    """How often process, workers and memory are looked at."""
    restarts: int = Field(default=5, ge=0, le=1000)
    """Starts of the server that may fail one after the other."""
    calm_seconds: float = Field(default=60.0, ge=1)
    """How long the server must have been ready for a failure to count as a first one again."""
    longest_pause: float = Field(default=30.0, ge=0.1)
    """Seconds that the pause between restarts grows to; it begins at half a second and doubles."""
    linger_seconds: float = Field(default=60.0, ge=0, le=3600)
    """How long the server outlives a supervisor that was killed, to be adopted by another."""
    memory_limit: Size | None = Field(default=None, ge=1 << 26)
    """Resident memory of a worker above which it is renewed, where its entry does not say."""
    start_timeout: float = Field(default=120.0, ge=1)
    """Seconds until every model must have its workers READY."""


class ShadowSettings(BaseModel):
    """Requests copied to the candidate, and both versions' answers compared."""

    model_config = STRICT

    share: Percent = 20
    """Percent of requests that are copied."""
    requests: int = Field(default=30, ge=0, le=10_000)
    """How many pairs of answers are compared; 0 leaves the step out."""
    agreement: float = Field(default=0.9, ge=0, le=1)
    """Share of answers that must agree: of labels the first one, of other values all."""

    @model_validator(mode="after")
    def _check_share(self) -> ShadowSettings:
        if self.requests and not self.share:
            raise ValueError(f"a share of 0 never brings the {self.requests} requests")
        return self


class CanarySettings(BaseModel):
    """Requests that the candidate answers, compared with the stable version's."""

    model_config = STRICT

    steps: list[Percent] = [10, 50, 100]
    """Percent of requests for the candidate, rising; none leaves the step out."""
    requests: int = Field(default=60, ge=1, le=200_000)
    """How many the candidate answers in each step at least."""
    errors: float = Field(default=0.005, ge=0, lt=1)
    """By how much its share of errors may be higher."""
    slower: float = Field(default=1.2, gt=0)
    """How many times the stable version's its median and p95 may be."""

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: list[float]) -> list[float]:
        if steps != sorted(set(steps)) or (steps and not steps[0]):
            raise ValueError("must rise from above 0 to at most 100")
        return steps


class ReleaseSettings(BaseModel):
    """The gates of `marwright release`."""

    model_config = STRICT

    samples: bool = True
    """Whether the archive must carry samples, and the server answer them as recorded."""
    warm_up: int = Field(default=3, ge=0, le=1000)
    """Requests for each worker before its version is judged."""
    shadow: ShadowSettings = ShadowSettings()
    canary: CanarySettings = CanarySettings()
    error_rate: float = Field(default=0.05, gt=0, lt=0.5)
    """The chance that a version which is no worse is stopped, all comparisons together."""
    step_seconds: float = Field(default=300.0, ge=1)
    """How long a step may wait for its requests; samples are sent where traffic is too thin."""
    drain_seconds: float = Field(default=10.0, ge=0)
    """How long the old version may go on to answer what it holds."""
    keep: int = Field(default=1, ge=1, le=16)
    """How many earlier versions stay registered, to return to."""
    order: Literal["one by one", "all at once"] = "one by one"
    """How the servers of a fleet move: each after the one before; or together, once all have
    passed their gates."""
    lease_seconds: float = Field(default=30.0, ge=5, le=3600)
    """How long a server of a fleet goes on without a word of who leads the release; then it takes
    itself back."""


class PredictionSettings(BaseModel):
    """The prediction log: what models answered, sampled, to Parquet by day."""

    model_config = STRICT

    share: Percent = 10
    """Percent of requests that are kept, the same ones in every server."""
    folder: Path = Field(default=Path("predictions"), validate_default=True)
    """Where they are kept."""
    keep_days: int = Field(default=30, ge=1, le=3650)
    """Days after which a day's files are removed."""
    most_bytes: Size = Field(default=1 << 30, ge=1 << 20)
    """Most bytes of the folder; the oldest day goes first."""
    inputs: Literal["none", "digest", "whole"] = "digest"
    """What is kept of an input: nothing, its SHA-256, or also the input itself."""
    input_bytes: Size = Field(default=1 << 16, ge=0, le=1 << 24)
    """Size above which an input is kept as its digest alone."""
    redact: list[str] = []
    """What is never written: confidence, content_type, digest, embedding, features, input,
    prediction, request, score, seconds; or one of the features, as features.NAME."""
    score: Literal["none", "energy", "softmax"] = "none"
    """How far a request is from what the model learnt: the energy of its logits, or 1 minus the
    highest probability."""

    @field_validator("redact")
    @classmethod
    def _check_fields(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in REDACTABLE and not name.startswith("features."):
                raise ValueError(
                    f"{name!r} is no field; {', '.join(REDACTABLE)} or features.NAME are"
                )
        return names

    @field_validator("folder")
    @classmethod
    def _resolve(cls, path: Path, info: ValidationInfo) -> Path:
        return place_path(path, info)


class DriftSettings(BaseModel):
    """When live requests count as others than those of the training."""

    model_config = STRICT

    window: int = Field(default=500, ge=50, le=100_000)
    """How many logged predictions of a version are compared with its reference."""
    every_seconds: float = Field(default=60.0, ge=1, le=86_400)
    """How often."""
    error_rate: float = Field(default=0.01, gt=0, lt=0.5)
    """The chance that a window without a shift is called one, all comparisons together."""


class TargetSettings(BaseModel):
    """What is promised to clients, and alerts are measured by."""

    model_config = STRICT

    availability: float = Field(default=99.9, gt=0, lt=100)
    """Percent of requests that must not fail with a 5xx status, over 30 days."""
    p99_seconds: float = Field(default=1.0, gt=0, le=10)
    """Seconds within which 99 of 100 requests are to be answered."""


class MailSettings(BaseModel):
    """Where alerts are mailed to."""

    model_config = STRICT

    to: str = Field(min_length=3)
    """The address."""
    sender: str = Field(min_length=3)
    """The address that they come from."""
    server: str = Field(pattern=r"^[^:\s]+:\d+$")
    """The mail server, HOST:PORT."""
    user: str | None = None
    """Its user; nobody signs in where not said."""
    password: Path | None = None
    """A file with that user's password."""
    tls: bool = True
    """Whether the mail server must encrypt."""

    @field_validator("password")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)


class MonitoringSettings(BaseModel):
    """What is watched, and who is told."""

    model_config = STRICT

    predictions: Annotated[PredictionSettings | None, BeforeValidator(read_switch)] = None
    """The prediction log; true: with its defaults."""
    drift: DriftSettings = DriftSettings()
    targets: TargetSettings = TargetSettings()
    prometheus: Port = 9090
    """Where Prometheus listens, on loopback."""
    alertmanager: Port = 9093
    """Where Alertmanager listens, on loopback."""
    keep_days: int = Field(default=15, ge=1, le=3650)
    """Days that Prometheus keeps what it has read."""
    webhook: Path | None = None
    """A file with the URL that alerts are posted to, which may hold a secret."""
    mail: MailSettings | None = None
    """Whom alerts are mailed to."""

    @field_validator("webhook")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)
