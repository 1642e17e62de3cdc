"""An existing config.properties as a deploy.yaml: TorchServe's words become ours.

What deploy.yaml has a word for gets it, what it has none for stays in its `properties`, and what
cannot be kept is named in a note.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marwright.archive.document import validate
from marwright.errors import ConfigurationError
from marwright.server.deployment import SETTINGS, Deployment
from marwright.server.keys import FIXED_KEYS, KEYS, suggest_key
from marwright.server.properties import read_properties
from marwright.server.rendering import render_deployment

__all__ = ["import_properties"]

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_APIS = ("inference", "management", "metrics")
_SETTINGS = {
    target: name for name, target in SETTINGS.items() if name not in {"workers", "threads"}
}
"""Settings in TorchServe's `models`, and the keys of a model's entry."""
_NUMBERS = {
    "token_expiration_min": ("access", "token_minutes"),
    "job_queue_size": ("limits", "queue"),
    "max_request_size": ("limits", "request_bytes"),
    "max_response_size": ("limits", "response_bytes"),
}
_OWN = {
    "model_server_home": "where torchserve is installed",
    "python": "the interpreter that runs marwright",
}
_DANGEROUS = {
    "allowed_urls": "lets archives come from elsewhere than the store, past its policy",
    "install_py_dep_per_model": "lets an archive run pip",
    "cors_allowed_origin": "lets pages of that site call this server",
    "plugins_path": "is read by the command torchserve alone: it has no effect here",
    "enable_envvars_config": "lets TS_ variables override this file; marwright passes none on",
}


def import_properties(path: Path) -> tuple[Deployment, list[str]]:
    """Return the deployment that a config.properties amounts to, and notes on what changes.

    What the file does not say is as in any deploy.yaml, not as TorchServe would take it.

    Raises:
        ConfigurationError: values that cannot be used; all of them are named.
        UsageError: lines that are no properties.
        StorageError: it cannot be read.
    """
    given = read_properties(path)
    conversion = _Conversion(path, given)
    conversion.convert()
    if conversion.problems:
        raise ConfigurationError(
            f"{path} cannot be imported",
            found=f"{len(conversion.problems)} values that cannot be used"
            if len(conversion.problems) > 1
            else conversion.problems[0],
            remedy="mend it",
            detail="\n".join(conversion.problems) if len(conversion.problems) > 1 else "",
        )
    deployment = validate(Deployment, conversion.values, source=str(path), error=ConfigurationError)
    return deployment, conversion.notes


class _Conversion:
    """One conversion: what was read, and what has been made of it so far."""

    def __init__(self, path: Path, given: dict[str, str]) -> None:
        self.path = path
        self.given = given
        self.values: dict[str, Any] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.defaults = render_deployment(Deployment())
        """What a deploy.yaml that says nothing amounts to."""

    def convert(self) -> None:
        """Fill `values`, `notes` and `problems`."""
        self._take_ports()
        self._take_access()
        self._take_limits()
        self._take_tls()
        self._note_schemes()
        self._take_java()
        self._take_models()
        self._take_others()

    def _set(self, *keys: str, value: Any) -> None:
        place = self.values
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value

    def _read(self, key: str, read: Callable[[str], Any]) -> Any:
        """Return a value as `read` makes it; None where it is absent or wrong."""
        if key not in self.given:
            return None
        try:
            return read(self.given[key])
        except (ValueError, TypeError, AttributeError) as exc:
            self.problems.append(f"{key}={self.given[key]}: {exc}")
            return None

    def _take_ports(self) -> None:
        for api in _APIS:
            address = self._read(f"{api}_address", _read_address)
            if address is None:
                continue
            scheme, host, port = address
            if scheme == "unix":
                self._note(f"{api}_address", "is a Unix socket; marwright listens on TCP ports")
                continue
            self._set("ports", api, value=port)
            self._note_host(f"{api}_address", host)
        for api in ("grpc_inference", "grpc_management"):
            if (port := self._read(f"{api}_port", int)) is not None:
                self._set("ports", api, value=port)
            if f"{api}_address" in self.given:
                self._note_host(f"{api}_address", self.given[f"{api}_address"])

    def _note_host(self, key: str, host: str) -> None:
        if host not in LOOPBACK:
            text = f"listens on {host}; marwright listens on loopback: put a proxy before it"
            self._note(key, text)

    def _take_access(self) -> None:
        if (off := self._read("disable_token_authorization", _read_bool)) is not None:
            self._set("access", "tokens", value=not off)
            if off:
                text = "is kept: whoever reaches the server may ask it (access.tokens: false)"
                self._note("disable_token_authorization", text)
        if self._read("enable_model_api", _read_bool) is False:
            self._set("access", "models", value="off")
        hidden = self.given.get("blacklist_env_vars", "")
        if hidden and hidden != self.defaults["blacklist_env_vars"]:
            text = "is not kept: no worker sees a variable whose name sounds like a secret"
            self._note("blacklist_env_vars", text)

    def _take_limits(self) -> None:
        for key, keys in _NUMBERS.items():
            if (number := self._read(key, int)) is not None:
                self._set(*keys, value=number)
        if (limited := self._read("limit_max_image_pixels", _read_bool)) is not None:
            self._set("limits", "large_images", value=not limited)

    def _take_tls(self) -> None:
        files = [self.given.get(key) for key in ("certificate_file", "private_key_file")]
        if all(files):
            self.values["tls"] = {"certificate": files[0], "key": files[1]}
        elif "keystore" in self.given:
            text = "is a Java keystore: write it as PEM with `openssl pkcs12`, and name it in tls"
            self._note("keystore", text)
        elif any(files):
            self._note("certificate_file", "and private_key_file belong together: no TLS")

    def _note_schemes(self) -> None:
        """Note the addresses that were encrypted and will not be, or the other way round."""
        encrypted = "tls" in self.values
        for api in _APIS:
            address = self.given.get(f"{api}_address", "")
            if address.startswith("https:") and not encrypted:
                text = "is https and becomes http: no certificate is taken over, name one in tls"
                self._note(f"{api}_address", text)
            elif address.startswith("http:") and encrypted:
                text = "is http and becomes https: tls encrypts all APIs"
                self._note(f"{api}_address", text)

    def _take_java(self) -> None:
        options = self._read("vmargs", shlex.split) or []
        own = self.defaults["vmargs"].split()
        for option in options:
            if option in own:
                continue
            for prefix, key in (("-Xmx", "heap"), ("-XX:MaxDirectMemorySize=", "direct_memory")):
                if option.startswith(prefix):
                    self._set("jvm", key, value=_read_java_size(option.removeprefix(prefix)))
                    break
            else:
                self.values.setdefault("jvm", {}).setdefault("options", []).append(option)

    def _take_models(self) -> None:
        if store := self.given.get("model_store"):
            self.values["store"] = store
        documents = [
            document.get("models", document) if key == "model_snapshot" else document
            for key in ("models", "model_snapshot")
            if isinstance(document := self._read(key, json.loads), dict)
        ]
        entries: dict[str, dict[str, Any]] = {}
        for document in documents:
            entries |= self._read_entries(document)
        loaded = self.given.get("load_models", "").strip()
        if loaded in ("all", "ALL", ""):
            self._take_store(entries, everything=bool(loaded))
        elif loaded.lower() != "none":
            names = [part.strip().rpartition("=")[2] for part in loaded.split(",")]
            self.values["models"] = [
                {"archive": name, **entries.get(name, {})} for name in filter(None, names)
            ]

    def _take_store(self, entries: dict[str, dict[str, Any]], *, everything: bool) -> None:
        """Take what is served where the file names no archives."""
        if not entries:
            if not everything:
                self.notes.append("load_models is not said: every archive of the store is served")
            return
        store = self.path.parent / self.values.get("store", "")
        others = sorted({path.name for path in store.glob("*.mar")} - entries.keys())
        self.values["models"] = [{"archive": name, **entry} for name, entry in entries.items()]
        if everything and store.is_dir():
            self.values["models"] += [{"archive": name} for name in others]
        elif everything:
            self.notes.append("load_models=all: only the archives that `models` names are taken")

    def _read_entries(self, models: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return entries by archive from the JSON of `models` or of a snapshot."""
        entries: dict[str, dict[str, Any]] = {}
        for name, versions in models.items():
            for version, settings in versions.items() if isinstance(versions, dict) else ():
                if not isinstance(settings, dict) or not settings.get("marName"):
                    self.problems.append(f"models: {name} {version} has no marName")
                    continue
                entries[settings["marName"]] = self._read_entry(f"{name} {version}", settings)
        return entries

    def _read_entry(self, label: str, settings: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {
            ours: settings[key] for key, ours in _SETTINGS.items() if settings.get(key) is not None
        }
        if settings.get("defaultVersion"):
            entry["default"] = True
        least, most = settings.get("minWorkers"), settings.get("maxWorkers")
        if least is not None:
            entry["workers"] = least
        if least is None and most is not None:
            text = "it will have as many as its archive says"
            self.notes.append(f"models: {label} has up to {most} workers and no minWorkers; {text}")
        elif least is not None and most not in (None, least, max(1, least)):
            self.notes.append(f"models: {label} has up to {most} workers; it will have {least}")
        if (delay := settings.get("maxBatchDelay")) is not None:
            text = f"{delay} microseconds, not milliseconds, unless eager_batches is false"
            self.notes.append(f"models: a request to {label} will wait for company for {text}")
        known = {*_SETTINGS, "defaultVersion", "marName", "minWorkers", "maxWorkers"}
        for key in settings.keys() - known:
            self.notes.append(f"models: {key} of {label} is not kept: pack it into the archive")
        return entry

    def _take_others(self) -> None:
        for key, value in self.given.items():
            if key in FIXED_KEYS or key in {"keystore", "keystore_pass", "keystore_type"}:
                continue
            if key == "model_snapshot":
                self._note(key, "is not needed: deploy.yaml says what is served")
            elif key not in KEYS:
                text = f"is no key of TorchServe's, which passes over it{suggest_key(key)}"
                self._note(key, text)
            elif key in _OWN:
                self._note(key, f"is not kept: always {_OWN[key]}")
            elif value != self.defaults.get(key):
                self._set("properties", key, value=value)
                if key in _DANGEROUS:
                    self._note(key, f"{_DANGEROUS[key]}; kept in properties")

    def _note(self, key: str, text: str) -> None:
        self.notes.append(f"{key} {text}")


def _read_address(value: str) -> tuple[str, str, int]:
    """Return scheme, host and port, as TorchServe takes them."""
    if value.startswith("unix:"):
        return "unix", "", 0
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is no address such as http://127.0.0.1:8080")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _read_bool(value: str) -> bool:
    """Return a truth as Java's Boolean.parseBoolean does."""
    return value.strip().lower() == "true"


def _read_java_size(text: str) -> int | str:
    units = {"k": 10, "m": 20, "g": 30}
    number, unit = (text[:-1], text[-1:].lower()) if text[-1:].isalpha() else (text, "")
    if not number.isdigit() or unit not in {"", *units}:
        return text
    return int(number) << units.get(unit, 0)
