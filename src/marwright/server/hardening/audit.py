"""Audit of a config.properties: what each setting of TorchServe 0.12.0 leaves open, and to whom.

What counts is what TorchServe would take: its own default where a key is absent, a variable's
value where TS_ variables override the file, and a file's last line where a key stands twice.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from marwright.archive.checks.findings import Severity
from marwright.server.hardening.effective import Effective
from marwright.server.hardening.exposure import (
    check_addresses,
    check_rights,
    check_sources,
    check_variables,
)
from marwright.server.hardening.weaknesses import Finding, find
from marwright.server.keys import KEYS, suggest_key

__all__ = ["audit", "Finding", "harden", "Severity"]

LARGEST_BODY = 64 << 20
"""Bytes of a request or an answer, beyond which the audit asks whether that is meant."""
LONGEST_QUEUE = 1000
HEAP = "-Xmx1g"
DIRECT = "-XX:MaxDirectMemorySize=512m"
ENDS = "-XX:+ExitOnOutOfMemoryError"
JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")
OTHERS = stat.S_IRWXG | stat.S_IRWXO
FILES = ("certificate_file", "private_key_file", "keystore", "metrics_config")
FOLDERS = ("model_store", "workflow_store", "plugins_path")


def audit(
    properties: Mapping[str, str], *, path: Path | None = None, environment: Mapping[str, str]
) -> list[Finding]:
    """Return what a configuration leaves open, the gravest first.

    `path` is the file that the properties were read from: its lines, its rights and what lies
    beside it are looked at too. `environment` is that of the server. Nothing is changed, and no
    password is repeated.
    """
    settings = Effective(properties, environment, path.parent if path else None)
    findings = [
        *check_addresses(settings),
        *check_rights(settings),
        *check_sources(settings),
        *check_variables(settings),
        *_check_files(settings),
        *_check_limits(settings),
        *_check_java(settings),
        *_check_values(settings),
        *(_check_file(path, environment) if path else ()),
    ]
    return sorted(findings, key=lambda finding: (-finding.severity, finding.id))


def harden(properties: Mapping[str, str], findings: Sequence[Finding]) -> dict[str, str]:
    """Return the properties with all that a machine can mend mended; audit them to see the rest."""
    mended = {
        finding.key: finding.mended
        for finding in findings
        if finding.mended is not None and finding.key in KEYS
    }
    merged = {**properties, **mended}
    return {key: value for key, value in merged.items() if value or key not in mended}


def _check_files(settings: Effective) -> Iterator[Finding]:
    """Find secrets in the file, and files that others may read or write."""
    if settings["keystore"]:
        written = settings.written.get("keystore_pass", "")
        if "keystore_pass" not in settings:
            yield find("TS401", "keystore_pass", "not set: TorchServe's default")
        elif written and "$$" not in written:
            yield find("TS401", "keystore_pass", "a password")
    for key in FILES:
        path = settings.find_path(key)
        if path is None:
            continue
        if not path.is_file():
            yield find("TS405", key, str(path))
        elif key in ("private_key_file", "keystore") and _read_mode(path) & OTHERS:
            yield find("TS402", key, f"{path} (mode {_read_mode(path):04o})")
    for key in FOLDERS:
        path = settings.find_path(key)
        if path is not None and _read_mode(path) & stat.S_IWOTH:
            yield find("TS403", key, f"{path} (mode {_read_mode(path):04o})")


def _read_mode(path: Path) -> int:
    """Return a path's rights; 0 where there is nothing to be read of it."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0


def _check_limits(settings: Effective) -> Iterator[Finding]:
    """Find what a few requests would need to bring the server down."""
    limits = (
        ("TS501", "max_request_size", LARGEST_BODY),
        ("TS502", "max_response_size", LARGEST_BODY),
        ("TS504", "job_queue_size", LONGEST_QUEUE),
    )
    for id, key, most in limits:
        number = settings.read_number(key)
        if number is not None and number > most:
            yield find(id, key, settings[key])
    if not settings.is_on("limit_max_image_pixels"):
        found = settings["limit_max_image_pixels"]
        yield find("TS503", "limit_max_image_pixels", found, mended="true")
    if settings["metrics_mode"].strip().lower() == "log":
        yield find("TS505", "metrics_mode", "log", mended="prometheus")


def _check_java(settings: Effective) -> Iterator[Finding]:
    """Find what Java may take, and who may look into it."""
    options = settings["vmargs"].split()
    wanted = (
        ("TS601", HEAP, r"-Xmx|-XX:MaxHeapSize=|-XX:MaxRAMPercentage="),
        ("TS602", DIRECT, r"-XX:MaxDirectMemorySize="),
        ("TS603", ENDS, r"-XX:\+(ExitOn|CrashOn)OutOfMemoryError"),
    )
    absent = [
        (id, option)
        for id, option, pattern in wanted
        if not any(re.match(pattern, item) for item in options)
    ]
    kept = [option for option in options if not _judge_option(option)]
    mended = " ".join([*kept, *(option for _, option in absent)])
    for id, _ in absent:
        yield find(id, "vmargs", settings["vmargs"] or "not set", mended=mended)
    for option in options:
        if id := _judge_option(option):
            yield find(id, "vmargs", option, mended=mended)
    for name in JAVA_VARIABLES:
        for option in settings.environment.get(name, "").split():
            if id := _judge_option(option):
                yield find(id, name, option)


def _judge_option(option: str) -> str:
    """Return the id of what is wrong with one of Java's options, or ""."""
    if re.match(r"-agentlib:jdwp|-Xrunjdwp", option):
        return "TS604"
    if option.startswith("-Dcom.sun.management.jmxremote.port"):
        return "TS605"
    return "TS606" if re.match(r"-(javaagent|agentlib|agentpath):", option) else ""


def _check_values(settings: Effective) -> Iterator[Finding]:
    """Find keys that TorchServe does not know, and values that it takes for something else."""
    for key, name in settings.missing.items():
        yield find("TS703", key, f"$${name}$$, which is not set")
    for key in settings.written:
        if key not in KEYS:
            yield find("TS701", key, settings.written[key] + suggest_key(key))
            continue
        value = settings[key]
        if KEYS[key].kind == "bool" and value.lower() not in ("true", "false"):
            # False is what it counts as; of this one switch that is the dangerous side.
            kept = "true" if key == "limit_max_image_pixels" else "false"
            yield find("TS705", key, value, mended=kept)
        if KEYS[key].kind == "int" and key not in settings.missing:
            pattern = r"[0-9.]+" if key == "token_expiration_min" else r"[+-]?[0-9]+"
            if not re.fullmatch(pattern, value):
                yield find("TS704", key, value)


def _check_file(path: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Find what the file's own lines and rights say, which the properties no longer show."""
    other = environment.get("TS_CONFIG_FILE")
    if other and Path(other).resolve() != path.resolve():
        yield find("TS707", "TS_CONFIG_FILE", other)
    if _read_mode(path) & stat.S_IWOTH:
        yield find("TS404", "", f"{path} (mode {_read_mode(path):04o})")
    lines = [
        line.lstrip().partition("=")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "=" in line and not line.lstrip().startswith(("#", "!"))
    ]
    counts = Counter(key.strip() for key, _, _ in lines)
    for key, count in counts.items():
        if count > 1:
            yield find("TS702", key, f"{count} lines")
    for key, _, value in lines:
        if value != value.rstrip():
            yield find("TS706", key.strip(), repr(value))
