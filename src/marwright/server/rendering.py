"""From a deployment to what TorchServe reads: config.properties, and Java's options.

Keys are those of org.pytorch.serve.util.ConfigManager, TorchServe 0.12.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from marwright.server.certificate import Certificate
from marwright.server.deployment import Deployment
from marwright.server.frontend import FrontendSettings
from marwright.server.keys import SECRET_NAMES
from marwright.server.memory import MIB, compute_direct_memory, compute_heap
from marwright.server.ports import Ports
from marwright.server.wanted import Wanted

__all__ = ["render_deployment", "render_java_options", "render_models"]


def render_deployment(
    deployment: Deployment,
    *,
    ports: Ports | None = None,
    certificate: Certificate | None = None,
) -> dict[str, str]:
    """Return TorchServe's properties, without those that only a start knows: stores and models.

    Without `ports`, those of the deployment, or TorchServe's own where it says free.
    """
    access, limits = deployment.access, deployment.limits
    properties = {
        **(ports or Ports.from_deployment(deployment)).to_properties(
            scheme="https" if deployment.tls else "http"
        ),
        "enable_model_api": _word(access.models != "off"),
        "disable_token_authorization": _word(not access.tokens),
        "token_expiration_min": str(access.token_minutes),
        # Archives are registered by their file name in the store, so no URL is ever allowed.
        "allowed_urls": "none",
        "install_py_dep_per_model": "false",
        "enable_envvars_config": "false",
        "blacklist_env_vars": _hide_all_but(access.environment),
        "default_workers_per_model": "1",
        "job_queue_size": str(limits.queue),
        "max_request_size": str(limits.request_bytes),
        "max_response_size": str(limits.response_bytes),
        "limit_max_image_pixels": _word(not limits.large_images),
        "metrics_mode": "prometheus",
        # The workers need the cores that the parallel collector would use.
        "vmargs": " ".join(["-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]),
    }
    if certificate is not None:
        properties |= {
            "certificate_file": str(certificate.certificate),
            "private_key_file": str(certificate.key),
            "enable_grpc_ssl": "true",
        }
    return properties | deployment.properties


def render_models(wanted: Iterable[Wanted], files: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Return the properties that name what is loaded at the start.

    `files` are the archives' names in the store that TorchServe reads, by model and version; what
    is not in it is not loaded. `models` holds for archives that say nothing themselves.
    """
    loaded = [item for item in wanted if item.key in files]
    if not loaded:
        return {}
    models: dict[str, dict[str, object]] = {}
    for item in loaded:
        models.setdefault(item.name, {})[item.version] = {
            "marName": files[item.key],
            "defaultVersion": item.default,
            **{key: item.settings[key] for key in _MODEL_KEYS if key in item.settings},
        }
    return {
        "load_models": ",".join(files[item.key] for item in loaded),
        "models": json.dumps(models, separators=(",", ":")),
    }


_MODEL_KEYS = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout")


def render_java_options(deployment: Deployment, *, queues: int, key_file: Path | None) -> list[str]:
    """Return Java's options: memory, and what the door and the log read (frontend.py, log4j2.xml).

    `queues` is how many requests may wait, over all versions.
    """
    limits, logging = deployment.limits, deployment.logging
    gateway_key = deployment.access.gateway_key
    frontend = FrontendSettings(
        key_file=key_file,
        deny=tuple(deployment.access.paths_denied),
        request_seconds=limits.request_seconds,
        max_connections=limits.connections,
        retry_after=limits.retry_after,
        log_requests=logging.requests,
        log_level=logging.level,
        log_file_bytes=logging.file_bytes,
        log_files=logging.files,
    )
    return [
        f"-Xmx{compute_heap(deployment, queues) // MIB}m",
        f"-XX:MaxDirectMemorySize={compute_direct_memory(deployment) // MIB}m",
        # No temporary file of counters that every user of the machine can read.
        "-XX:-UsePerfData",
        *frontend.to_arguments(),
        *([f"-Dmarwright.gateway.key.file={gateway_key.absolute()}"] if gateway_key else []),
        *deployment.jvm.options,
    ]


def _hide_all_but(names: Sequence[str]) -> str:
    """Return the pattern of variables that no worker sees; names are as the environment has them.

    Java wants the whole name to match (EnvironmentUtils), so the exceptions stand in front.
    """
    if not names:
        return SECRET_NAMES
    exceptions = "|".join(re.escape(name) for name in names)
    return f"(?i)(?-i:(?!(?:{exceptions})$))" + SECRET_NAMES.removeprefix("(?i)")


def _word(truth: bool) -> str:
    return "true" if truth else "false"
