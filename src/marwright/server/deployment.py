"""deploy.yaml: what one server is to be - its models, limits, access and supervision, in one file.

Everything that TorchServe reads is made from it (rendering.py, staging.py), and what the server
then says of itself is compared with it (state.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from marwright.archive.admission import read_policy
from marwright.archive.document import Document
from marwright.archive.settings import HandlerSettings
from marwright.errors import ConfigurationError
from marwright.server import sections
from marwright.server.sections import (
    STRICT,
    AccessSettings,
    GatewaySettings,
    JvmSettings,
    LimitSettings,
    LoggingSettings,
    MonitoringSettings,
    PortSettings,
    ReleaseSettings,
    ServerSettings,
    Size,
    SupervisionSettings,
    TlsFiles,
    place_path,
    read_switch,
)
from marwright.storage import write_file

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = ["Deployment", "ModelEntry", "SETTINGS"]

LIVE_KEYS = frozenset({"models", "name", "releases", "supervision"})
"""Keys of which a change takes no restart of the server."""
REMEDY = "mend it; marwright schema deploy prints what it takes, marwright config explain KEY why"


def _shorthand(key: str) -> BeforeValidator:
    """Let a text stand for a mapping with one key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class ModelEntry(BaseModel):
    """One version of a model: an archive of the store, and how it is served.

    What is not said here is as the archive's own model-config.yaml says.
    """

    model_config = STRICT

    archive: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    """File name in the store; name and version stand in the archive."""
    default: bool = False
    """Whether this version answers where a request names none; else the model's first one here."""
    workers: int | None = Field(default=None, ge=0, le=256)
    """Worker processes; 0 keeps the version registered, to be scaled up."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of one inference; the cores divided by all workers where not said."""
    batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Most requests that one inference takes together."""
    batch_delay_ms: int | None = Field(default=None, ge=1, le=3_600_000)
    """How long a request may wait for company; microseconds while eager_batches is on."""
    queue: int | None = Field(default=None, ge=1, le=1_000_000)
    """Requests that may wait; further ones are answered 503."""
    response_timeout: int | None = Field(default=None, ge=1, le=86_400)
    """Seconds after which a worker that does not answer is replaced."""
    startup_timeout: int | None = Field(default=None, ge=1, le=86_400)
    """Seconds that a worker may take to load the model."""
    client_timeout_ms: int | None = Field(default=None, ge=1)
    """Milliseconds after which a request that still waits is given up."""
    job_ticket: bool | None = None
    """Whether a request is refused at once where no worker is free: short queues, no waiting."""
    devices: list[int] | None = None
    """Numbers of the GPUs that its workers share."""
    memory_limit: Size | None = Field(default=None, ge=1 << 26)
    """Resident memory of one worker above which the supervisor renews it."""
    handler: HandlerSettings | None = None
    """Settings of the handler, beside those that the archive brings."""

    def to_settings(self) -> dict[str, Any]:
        """Return what this entry says, by the dotted keys of model-config.yaml."""
        settings = {
            target: getattr(self, name)
            for name, target in SETTINGS.items()
            if getattr(self, name) is not None
        }
        if self.workers is not None:
            # TorchServe takes 0 of minWorkers for 1, and both for unset where maxWorkers is below.
            settings["maxWorkers"] = self.workers
        if self.handler is not None:
            given = self.handler.model_dump(mode="json", exclude_unset=True)
            settings |= {f"handler.{key}": value for key, value in given.items()}
        return settings


SETTINGS = {
    "workers": "minWorkers",
    "threads": "handler.threads",
    "batch_size": "batchSize",
    "batch_delay_ms": "maxBatchDelay",
    "queue": "jobQueueSize",
    "response_timeout": "responseTimeout",
    "startup_timeout": "startupTimeout",
    "client_timeout_ms": "clientTimeoutInMills",
    "job_ticket": "useJobTicket",
    "devices": "deviceIds",
}
"""Keys of an entry, and of model-config.yaml."""


class Deployment(BaseModel):
    """The wanted state of one server."""

    model_config = STRICT

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What other commands find the server by; its inference port where not said."""
    store: Path = Field(default=Path("model_store"), validate_default=True)
    """Folder of the archives."""
    models: list[Annotated[ModelEntry, _shorthand("archive")]] | None = None
    """What is served; every archive of the store where not said."""
    ports: PortSettings | Literal["free"] = PortSettings()
    """Where the server listens, on loopback; free: whatever is, as with a gateway."""
    gateway: Annotated[GatewaySettings | None, BeforeValidator(read_switch)] = None
    """What stands in front; true: with its defaults."""
    replicas: int = Field(default=1, ge=1, le=64)
    """How many servers share the gateway's requests, each with all of the models."""
    servers: list[ServerSettings] | None = None
    """A fleet: gateways that `marwright release` moves together; the file serves nothing itself."""
    limits: LimitSettings = LimitSettings()
    access: AccessSettings = AccessSettings()
    tls: TlsFiles | Literal["development"] | None = None
    """Encryption of all APIs; development: a certificate made for this start."""
    jvm: JvmSettings = JvmSettings()
    logging: LoggingSettings = LoggingSettings()
    supervision: SupervisionSettings = SupervisionSettings()
    releases: ReleaseSettings = ReleaseSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    policy: Path | None = None
    """Which archives may be loaded; marwright-policy.yaml of the store where there is one."""
    eager_batches: bool = True
    """Whether a free worker takes what waits at once, not after the batch delay."""
    properties: dict[str, str] = {}
    """Further keys of TorchServe's config.properties; none that is said elsewhere here."""

    @field_validator("store", "policy")
    @classmethod
    def _resolve(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path and place_path(path, info)

    @field_validator("properties", mode="before")
    @classmethod
    def _quote(cls, values: Any) -> Any:
        """Take YAML's numbers and truths for the texts that a properties file holds."""
        if not isinstance(values, Mapping):
            return values
        words = {True: "true", False: "false"}
        return {
            key: words[value] if isinstance(value, bool) else str(value)
            for key, value in values.items()
        }

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """Return the JSON schema, with what each key means."""
        from marwright.server.descriptions import add_descriptions

        schema = super().model_json_schema(*args, **options)
        return add_descriptions(schema, sys.modules[__name__], sections)

    @classmethod
    def read(cls, path: Path, *, starting: bool = False) -> Deployment:
        """Read a deploy.yaml; paths in it start in its folder.

        `starting`: also ask whether its ports are free.

        Raises:
            ConfigurationError: all that is wrong in it at once, each with its line.
            StorageError: it cannot be read.
        """
        from marwright.server.examination import examine  # it needs this module

        deployment, document = cls.parse(path, starting=starting)
        document.refuse(examine(deployment, document, starting=starting), remedy=REMEDY)
        return deployment

    @classmethod
    def parse(cls, path: Path, *, starting: bool = False) -> tuple[Deployment, Document]:
        """Read a deploy.yaml, and return with it the document that knows each value's line.

        Of a sound file no archive is looked at: see examination.examine. Raises what `read` raises.
        """
        from marwright.server.examination import examine_rest

        document = Document.read(path, error=ConfigurationError)
        deployment, problems = document.validate(cls)
        if problems:
            problems += examine_rest(document, problems, starting=starting)
        document.refuse(problems, remedy=REMEDY)
        assert deployment is not None  # else there were problems
        return deployment, document

    def list_entries(self) -> list[ModelEntry]:
        """Return what is served: the entries, or one for each archive of the store."""
        if self.models is not None:
            return self.models
        return [
            ModelEntry(archive=file)
            for file in sorted(path.name for path in self.store.glob("*.mar"))
        ]

    def read_policy(self) -> Policy | None:
        """Return the policy that this file names, or None; the store may have one of its own."""
        return read_policy(self.policy) if self.policy else None

    def to_yaml(self) -> str:
        """Return the file's text: what differs from the defaults."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with write_file(path) as stream:
            stream.write(self.to_yaml().encode())
