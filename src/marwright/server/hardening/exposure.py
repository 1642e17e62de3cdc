"""What a configuration opens: addresses, rights, and where code comes from (TS1, TS2, TS3)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from marwright.server.hardening.effective import Effective, is_loopback
from marwright.server.hardening.weaknesses import Finding, find
from marwright.server.keys import SECRET_NAMES

__all__ = ["check_addresses", "check_rights", "check_sources", "check_variables"]

ADDRESSES = {
    "inference_address": "TS101",
    "management_address": "TS102",
    "metrics_address": "TS103",
    "grpc_inference_address": "TS104",
    "grpc_management_address": "TS105",
}
FOREIGN_URLS = (
    "http://192.0.2.1/model.mar",
    "https://elsewhere.example/model.mar",
    "file:///tmp/model.mar",
)
SECRETS = ("AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "GITHUB_TOKEN", "api_key", "client_secret")
NEEDED = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TS_DECODE_INPUT_REQUEST")
LONGEST_TOKEN = 60
"""Minutes."""


def check_addresses(settings: Effective) -> Iterator[Finding]:
    """Find addresses that other machines reach, and what they would read on the way."""
    for key, id in ADDRESSES.items():
        if key == "metrics_address" and not settings.is_on("enable_metrics_api"):
            continue
        host = settings.read_host(key)
        value = settings[key]
        if host is None:
            yield find("TS106", key, value)
        elif not is_loopback(host):
            inside = "127.0.0.1" if key.startswith("grpc") else value.replace(host, "127.0.0.1", 1)
            yield find(id, key, value, mended=inside)
            if not settings.is_encrypted(key):
                yield find("TS108", key, value, mended=inside)
        if not key.startswith("grpc") and settings.is_encrypted(key) and not _has_key(settings):
            yield find("TS109", key, value)
    if settings["inference_address"] == settings["management_address"]:
        yield find("TS107", "management_address", settings["management_address"])
    if settings.is_on("enable_grpc_ssl") and not _has_key_files(settings):
        yield find("TS110", "enable_grpc_ssl", "true")


def _has_key_files(settings: Effective) -> bool:
    return bool(settings["certificate_file"] and settings["private_key_file"])


def _has_key(settings: Effective) -> bool:
    return bool(settings["keystore"]) or _has_key_files(settings)


def check_rights(settings: Effective) -> Iterator[Finding]:
    """Find who may do more than ask for predictions."""
    if settings.is_on("disable_token_authorization"):
        yield find("TS201", "disable_token_authorization", "true", mended="false")
    if settings.is_on("enable_model_api"):
        yield find("TS202", "enable_model_api", "true", mended="false")
    minutes = settings.read_number("token_expiration_min")
    if minutes is not None and minutes > LONGEST_TOKEN:
        found = settings["token_expiration_min"]
        yield find("TS203", "token_expiration_min", found, mended=str(LONGEST_TOKEN))
    for key in ("cors_allowed_origin", "cors_allowed_methods", "cors_allowed_headers"):
        if settings[key]:
            yield find("TS204", key, settings[key], mended="")
    if settings.is_on("enable_envvars_config"):
        names = ", ".join(sorted(settings.overrides))
        found = f"true, and variables set {names}" if names else "true"
        yield find("TS205", "enable_envvars_config", found, mended="false")
    if settings.is_on("use_env_allowed_urls"):
        yield find("TS206", "use_env_allowed_urls", "true", mended="false")


def check_sources(settings: Effective) -> Iterator[Finding]:
    """Find where code may come from that nobody looked at."""
    yield from _check_urls(settings)
    workflows = settings["workflow_store"]
    if not workflows or settings.find_path("workflow_store") == settings.find_path("model_store"):
        yield find("TS303", "workflow_store", workflows or "not set: model_store")
    if settings.is_on("install_py_dep_per_model"):
        yield find("TS304", "install_py_dep_per_model", "true", mended="false")
    if settings["plugins_path"]:
        yield find("TS308", "plugins_path", settings["plugins_path"])
    if settings["system_metrics_cmd"]:
        yield find("TS309", "system_metrics_cmd", settings["system_metrics_cmd"])
    for model in settings["load_models"].split(","):
        if "://" in model:
            yield find("TS310", "load_models", model.strip())


def _check_urls(settings: Effective) -> Iterator[Finding]:
    """Try the patterns on addresses that no one meant; Java wants the whole, in any case."""
    value = settings["allowed_urls"]
    shown = value if "allowed_urls" in settings else f"not set: {value}"
    for part in value.split(","):
        try:
            pattern = re.compile(part, re.IGNORECASE)
        except re.error as exc:
            yield find("TS708", "allowed_urls", f"{part} ({exc})", mended="none")
            continue
        if any(pattern.fullmatch(url) for url in FOREIGN_URLS):
            yield find("TS301", "allowed_urls", shown, mended="none")
            return
        if re.match(r"http(://|\(s\)\?|s\?)", part):
            yield find("TS302", "allowed_urls", part, mended="none")


def check_variables(settings: Effective) -> Iterator[Finding]:
    """Find which environment variables a model's code would see."""
    key = "blacklist_env_vars"
    value = settings[key]
    if not value:
        yield find("TS305", key, "not set", mended=SECRET_NAMES)
        return
    try:
        pattern = re.compile(value)
    except re.error as exc:
        yield find("TS708", key, f"{value} ({exc})", mended=SECRET_NAMES)
        return
    here = [name for name in settings.environment if re.fullmatch(SECRET_NAMES, name)]
    shown = [name for name in (*sorted(here), *SECRETS) if not pattern.fullmatch(name)]
    if shown:
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        yield find("TS306", key, f"{value}, which lets pass {', '.join(shown[:3])}{more}")
    if hidden := [name for name in NEEDED if pattern.fullmatch(name)]:
        yield find("TS307", key, f"{value}, which hides {', '.join(hidden)}", mended=SECRET_NAMES)
