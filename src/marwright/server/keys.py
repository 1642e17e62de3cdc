"""The keys of config.properties: every one that TorchServe 0.12.0 reads, and what each does.

The names, defaults and variables are those of org.pytorch.serve.util.ConfigManager; `vmargs` and
`plugins_path` are read by the command `torchserve` (ts/model_server.py). TorchServe passes over any
other key without a word.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

__all__ = ["FIXED_KEYS", "Key", "KEYS", "Kind", "SECRET_NAMES", "suggest_key"]

Kind = Literal["address", "bool", "int", "json", "path", "regex", "text"]

ENDLESS = "9223372036854775807"

SECRET_NAMES = (
    "(?i).*(key|token(?!izers)|secret|pass|cred|auth|private|dsn|conn(ection)?_?str"
    "|(database|redis|mongo[a-z]*|broker|index)_ur[il]).*"
)
"""The blacklist_env_vars that we recommend.

Java compares the pattern with a variable's whole name and minds case (EnvironmentUtils calls
`matches()`), hence the `.*` and the `(?i)`. No name that a worker needs is of it, nor is
TOKENIZERS_PARALLELISM; addresses of databases and package indexes are, since passwords stand in
them.
"""


@dataclass(frozen=True)
class Key:
    """One key of config.properties."""

    name: str
    kind: Kind
    default: str
    """What TorchServe takes where the key is absent; empty where that is nothing."""
    does: str
    """One sentence."""
    variable: str = ""
    """The environment variable that overrides it where enable_envvars_config is on."""
    fixed: str = ""
    """The word of deploy.yaml that says it, or what marwright sets it to; empty for other keys."""


def suggest_key(name: str) -> str:
    """Return what to say of a key that TorchServe does not know: "; did you mean ...?", or ""."""
    nearest = difflib.get_close_matches(name.lower(), KEYS, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


# Name, default and what it does; the kind is that of the group.
_ADDRESSES = (
    ("inference_address", "http://127.0.0.1:8080", "Where predictions are asked for."),
    ("management_address", "http://127.0.0.1:8081", "Where models are registered and scaled."),
    ("metrics_address", "http://127.0.0.1:8082", "Where metrics are read; it asks for no token."),
    ("grpc_inference_address", "127.0.0.1", "The host on which gRPC predictions are asked for."),
    ("grpc_management_address", "127.0.0.1", "The host on which gRPC manages models."),
)
_SWITCHES = (
    ("async_logging", "false", "Writes logs in a thread of their own."),
    ("cpu_launcher_enable", "false", "Starts workers with torch.backends.xeon.run_cpu."),
    ("debug", "false", "Starts one worker a model, whatever else is said."),
    ("decode_input_request", "true", "Gives handlers JSON and text decoded, not as bytes."),
    ("disable_system_metrics", "false", "Stops the collecting of CPU, memory and disk use."),
    ("disable_token_authorization", "false", "Answers every request without a token."),
    ("enable_envvars_config", "false", "Lets TS_ variables override this file."),
    ("enable_grpc_ssl", "false", "Serves gRPC with TLS."),
    ("enable_metrics_api", "true", "Opens the metrics address."),
    ("enable_model_api", "false", "Lets models be registered and unregistered at run time."),
    ("install_py_dep_per_model", "false", "Runs pip for an archive's requirements file."),
    ("ipex_enable", "false", "Optimises with the Intel extension for PyTorch."),
    ("ipex_gpu_enable", "false", "Uses Intel GPUs."),
    ("limit_max_image_pixels", "true", "Keeps Pillow's limit for the size of a decoded image."),
    ("model_metrics_auto_detect", "false", "Reports metrics that metrics_config does not name."),
    ("prefer_direct_buffer", "false", "Takes memory for requests outside Java's heap."),
    ("ts_open_inference_protocol", "false", "Adds the gRPC service of the v2 protocol."),
    ("use_env_allowed_urls", "false", "Lets TS_ALLOWED_URLS override allowed_urls."),
    ("use_native_io", "true", "Uses epoll, or kqueue, where the system has it."),
)
_NUMBERS = (
    ("default_response_timeout", "120", "Seconds for an answer before a worker is restarted."),
    ("default_startup_timeout", "120", "Seconds for a model to load before it is given up."),
    ("default_workers_per_model", "0", "Workers a model; 0 means one a GPU, or one a core."),
    ("grpc_inference_port", "7070", "The port of gRPC predictions."),
    ("grpc_management_port", "7071", "The port of gRPC management."),
    ("grpc_inference_max_connection_age_ms", ENDLESS, "How long a gRPC connection may last."),
    ("grpc_management_max_connection_age_ms", ENDLESS, "How long a gRPC connection may last."),
    (
        "grpc_inference_max_connection_age_grace_ms",
        ENDLESS,
        "How long its calls may go on once it is old.",
    ),
    (
        "grpc_management_max_connection_age_grace_ms",
        ENDLESS,
        "How long its calls may go on once it is old.",
    ),
    ("initial_distribution_port", "29500", "The first port that torchrun's workers meet on."),
    ("initial_worker_port", "9000", "The first port, or socket's number, that workers listen on."),
    ("io_ratio", "50", "Percent of a network thread's time that reading and writing may take."),
    ("job_queue_size", "100", "Requests that may wait for a model before 503 is answered."),
    ("max_request_size", "6553500", "Bytes of a request's body."),
    ("max_response_size", "6553500", "Bytes of a worker's answer."),
    ("metric_time_interval", "60", "Seconds between two collections of system metrics."),
    ("netty_client_threads", "0", "Threads that talk to workers; 0 means two a core."),
    ("number_of_gpu", "", "The most GPUs that workers are spread over; all where unset."),
    ("number_of_netty_threads", "0", "Threads that answer requests; 0 means two a core."),
    ("token_expiration_min", "60", "Minutes until a token expires."),
    ("unregister_model_timeout", "120", "Seconds for a model's workers to end."),
)
_PATHS = (
    ("certificate_file", "", "The certificate chain for https and gRPC, as PEM."),
    ("cpp_log_config", "", "The log settings of C++ workers."),
    ("keystore", "", "A Java keystore with key and certificate for https; it goes first."),
    ("metrics_config", "", "Which metrics there are; ts/configs/metrics.yaml where unset."),
    ("model_server_home", "", "The folder that holds the package ts."),
    ("model_store", "", "The folder of archives."),
    ("plugins_path", "", "A folder of jars that run inside the server."),
    ("private_key_file", "", "The RSA key of certificate_file, as PEM without a password."),
    ("python", "python", "The interpreter of the workers; the command line goes first."),
    ("workflow_store", "", "The folder of workflow archives; model_store where unset."),
)
_REGEXES = (
    (
        "allowed_urls",
        "file://.*|http(s)?://.*",
        "From which URLs a model may be registered: patterns, with commas between them.",
    ),
    (
        "blacklist_env_vars",
        "",
        "Environment variables that workers do not get: the pattern of the whole name.",
    ),
)
_TEXTS = (
    ("cors_allowed_headers", "", "Headers that other sites' pages may send."),
    ("cors_allowed_methods", "", "Methods that other sites' pages may use."),
    ("cors_allowed_origin", "", "The site whose pages may call this server; * is any."),
    ("cpu_launcher_args", "", "Arguments of the CPU launcher."),
    ("default_service_handler", "", "The handler of archives that name none."),
    ("keystore_pass", "changeit", "The keystore's password."),
    ("keystore_type", "PKCS12", "The keystore's format."),
    ("load_models", "", "Archives to load at start: all, or names with commas between them."),
    ("metrics_mode", "log", "log, prometheus or legacy: where metrics go."),
    ("service_envelope", "", "What unwraps requests before a handler sees them: json, body ..."),
    ("system_metrics_cmd", "", "The command that collects system metrics, in place of ts's own."),
    (
        "ts_header_key_sequence_id",
        "ts_request_sequence_id",
        "The header that names a sequence of requests.",
    ),
    (
        "ts_header_key_sequence_start",
        "ts_request_sequence_start",
        "The header that begins a sequence.",
    ),
    ("ts_header_key_sequence_end", "ts_request_sequence_end", "The header that ends a sequence."),
    ("vmargs", "", "Java's own options; read by the command `torchserve` alone."),
    ("version", "", "Read from ts/version.txt, and only shown."),
)
_DOCUMENTS = (
    ("model_snapshot", "", "The state that a snapshot recorded: models, versions and workers."),
    ("models", "", "Settings for each model and version."),
)
_TABLE: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "address": _ADDRESSES,
    "bool": _SWITCHES,
    "int": _NUMBERS,
    "path": _PATHS,
    "regex": _REGEXES,
    "text": _TEXTS,
    "json": _DOCUMENTS,
}

# A variable's name is that of the constant in ConfigManager, which is not always TS_ and the key.
_VARIABLES = {
    "token_expiration_min": "TS_TOKEN_EXPIRATION_TIME_MIN",
    "ts_header_key_sequence_end": "TS_HEADER_KEY_SEQUENCE_END",
    "ts_header_key_sequence_id": "TS_HEADER_KEY_SEQUENCE_ID",
    "ts_header_key_sequence_start": "TS_HEADER_KEY_SEQUENCE_START",
    "ts_open_inference_protocol": "TS_OPEN_INFERENCE_PROTOCOL",
}
_WITHOUT_VARIABLE = {
    "enable_envvars_config",
    "io_ratio",
    "metric_time_interval",
    "model_snapshot",
    "models",
    "plugins_path",
    "python",
    "system_metrics_cmd",
    "use_env_allowed_urls",
    "use_native_io",
    "version",
    "vmargs",
}
FIXED_KEYS = {
    "inference_address": "ports",
    "management_address": "ports",
    "metrics_address": "ports",
    "grpc_inference_address": "ports",
    "grpc_management_address": "ports",
    "grpc_inference_port": "ports",
    "grpc_management_port": "ports",
    "disable_token_authorization": "access.tokens",
    "token_expiration_min": "access.token_minutes",
    "enable_model_api": "access.models",
    "blacklist_env_vars": "access.environment",
    "job_queue_size": "limits.queue",
    "max_request_size": "limits.request_bytes",
    "max_response_size": "limits.response_bytes",
    "limit_max_image_pixels": "limits.large_images",
    "model_store": "store",
    "workflow_store": "an empty private folder",
    "load_models": "models",
    "models": "models",
    "certificate_file": "tls",
    "private_key_file": "tls",
    "enable_grpc_ssl": "tls",
    "vmargs": "jvm",
}
"""Keys that other words of deploy.yaml say, or that are not to be chosen."""


def _name_variable(name: str) -> str:
    if name in _WITHOUT_VARIABLE:
        return ""
    return _VARIABLES.get(name, f"TS_{name.upper()}")


KEYS: dict[str, Key] = {
    name: Key(name, kind, default, does, _name_variable(name), FIXED_KEYS.get(name, ""))
    for name, kind, default, does in sorted(
        (name, kind, default, does) for kind, rows in _TABLE.items() for name, default, does in rows
    )
}
"""Every key by its name, in their order."""
