from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from marwright.server.deployment import Deployment
from marwright.server.hardening.audit import Finding, Severity, audit, harden
from marwright.server.hardening.weaknesses import WEAKNESSES
from marwright.server.keys import SECRET_NAMES
from marwright.server.properties import read_properties
from marwright.server.rendering import render_deployment

CLOSED = {
    "inference_address": "http://127.0.0.1:8080",
    "management_address": "http://127.0.0.1:8081",
    "allowed_urls": "none",
    "workflow_store": "/var/empty",
    "model_store": "/srv/models",
    "blacklist_env_vars": SECRET_NAMES,
    "metrics_mode": "prometheus",
    "vmargs": "-Xmx1g -XX:MaxDirectMemorySize=512m -XX:+ExitOnOutOfMemoryError",
}
OPEN = {"inference_address": "http://0.0.0.0:8080"}


def look(
    change: Mapping[str, str | None], environment: Mapping[str, str] | None = None
) -> dict[str, Finding]:
    """Return by their ids the findings in a closed configuration with one thing changed."""
    merged = {**CLOSED, **change}
    properties = {key: value for key, value in merged.items() if value is not None}
    return {item.id: item for item in audit(properties, environment=environment or {})}


def test_a_closed_configuration_has_no_finding() -> None:
    assert look({}) == {}


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"inference_address": "http://0.0.0.0:8080"}, {"TS101", "TS108"}),
        ({"inference_address": "http://10.0.0.1"}, {"TS101", "TS108"}),
        ({"management_address": "http://models.example:8081"}, {"TS102", "TS108"}),
        ({"metrics_address": "http://0.0.0.0:8082"}, {"TS103", "TS108"}),
        ({"metrics_address": "http://0.0.0.0:8082", "enable_metrics_api": "false"}, set()),
        ({"grpc_inference_address": "::"}, {"TS104", "TS108"}),
        ({"grpc_management_address": "0.0.0.0"}, {"TS105", "TS108"}),
        ({"grpc_management_address": "::1"}, set()),
        ({"inference_address": "http://localhost:8080"}, set()),
        ({"inference_address": "http://127.1.2.3:8080"}, set()),
        ({"inference_address": "unix:/tmp/inference.sock"}, set()),
        ({"inference_address": "http://[::1]:8080"}, {"TS106"}),
        ({"inference_address": "127.0.0.1:8080"}, {"TS106"}),
        ({"management_address": "http://127.0.0.1:8080"}, {"TS107"}),
        ({"inference_address": "https://127.0.0.1:8080"}, {"TS109"}),
        ({"enable_grpc_ssl": "true"}, {"TS110"}),
        ({"disable_token_authorization": "TRUE"}, {"TS201"}),
        ({"enable_model_api": "true"}, {"TS202"}),
        ({"token_expiration_min": "600"}, {"TS203"}),
        ({"token_expiration_min": "0.5"}, set()),
        ({"cors_allowed_origin": "*"}, {"TS204"}),
        ({"enable_envvars_config": "true"}, {"TS205"}),
        ({"use_env_allowed_urls": "true"}, {"TS206"}),
        ({"allowed_urls": None}, {"TS301"}),
        ({"allowed_urls": "https://models.example/.*,FILE://.*"}, {"TS301"}),
        ({"allowed_urls": "https://models[.]example/.*"}, set()),
        ({"allowed_urls": "https?://models[.]example/.*"}, {"TS302"}),
        ({"allowed_urls": "(none"}, {"TS708"}),
        ({"workflow_store": None}, {"TS303"}),
        ({"workflow_store": "/srv/models/"}, {"TS303"}),
        ({"install_py_dep_per_model": "true"}, {"TS304"}),
        ({"blacklist_env_vars": None}, {"TS305"}),
        (
            {"blacklist_env_vars": "KEY|TOKEN|SECRET|PASSWORD|key|secret"},
            {"TS306"},
        ),  # the whole name has to match
        ({"blacklist_env_vars": ".*(KEY|TOKEN|SECRET|PASSWORD).*"}, {"TS306"}),  # minds case
        ({"blacklist_env_vars": ".*"}, {"TS307"}),
        ({"blacklist_env_vars": "(KEY"}, {"TS708"}),
        ({"plugins_path": "/srv/plugins"}, {"TS308"}),
        ({"system_metrics_cmd": "/opt/metrics"}, {"TS309"}),
        ({"load_models": "cnn.mar,https://models.example/other.mar"}, {"TS310"}),
        ({"max_request_size": "655350000"}, {"TS501"}),
        ({"max_response_size": "655350000"}, {"TS502"}),
        ({"limit_max_image_pixels": "false"}, {"TS503"}),
        ({"job_queue_size": "100000"}, {"TS504"}),
        ({"metrics_mode": None}, {"TS505"}),
        ({"vmargs": None}, {"TS601", "TS602", "TS603"}),
        ({"vmargs": "-XX:MaxRAMPercentage=20"}, {"TS602", "TS603"}),
        ({"vmargs": CLOSED["vmargs"] + " -agentlib:jdwp=server=y,address=*:5005"}, {"TS604"}),
        ({"vmargs": CLOSED["vmargs"] + " -Dcom.sun.management.jmxremote.port=1"}, {"TS605"}),
        ({"vmargs": CLOSED["vmargs"] + " -javaagent:/opt/agent.jar"}, {"TS606"}),
        ({"install_py_deps_per_model": "true"}, {"TS701"}),
        ({"model_store": "$$STORE$$"}, {"TS703"}),
        ({"job_queue_size": "many"}, {"TS704"}),
        ({"max_request_size": "10MB"}, {"TS704"}),
        ({"disable_token_authorization": "yes"}, {"TS705"}),
        ({"limit_max_image_pixels": "on"}, {"TS503", "TS705"}),
    ],
)
def test_each_opening_is_found_and_nothing_else(
    change: dict[str, str | None], ids: set[str]
) -> None:
    assert set(look(change)) == ids


def test_marwrights_own_configuration_has_no_error() -> None:
    stores = {"model_store": "/run/store", "workflow_store": "/run/workflows"}
    found = audit({**render_deployment(Deployment()), **stores}, environment={})
    assert [item for item in found if item.severity >= Severity.ERROR] == []


def test_nothing_is_as_open_as_torchserves_own_defaults() -> None:
    found = {item.id for item in audit({}, environment={})}
    assert found == {"TS301", "TS303", "TS305", "TS505", "TS601", "TS602", "TS603"}


def test_the_gravest_comes_first_and_each_says_what_to_do() -> None:
    findings = audit({**OPEN, "disable_token_authorization": "true"}, environment={})
    assert findings[0].id == "TS201"
    assert [item.severity for item in findings] == sorted(
        (item.severity for item in findings), reverse=True
    )
    assert str(findings[0]) == (
        "danger TS201 disable_token_authorization=true: "
        "every request is answered without a token; set it to false"
    )
    assert findings[0].to_json()["severity"] == "danger"


def test_variables_count_as_torchserve_counts_them() -> None:
    environment = {
        "TS_DISABLE_TOKEN_AUTHORIZATION": "true",
        "TS_TOKEN_EXPIRATION_TIME_MIN": "900",
        "TS_ALLOWED_URLS": ".*",
    }
    assert look({}, environment) == {}
    found = look({"enable_envvars_config": "true"}, environment)
    assert set(found) == {"TS201", "TS203", "TS205"}
    assert "variables set disable_token_authorization, token_expiration" in found["TS205"].found
    both = {"enable_envvars_config": "true", "use_env_allowed_urls": "true"}
    assert set(look(both, environment)) == {"TS201", "TS203", "TS205", "TS206", "TS301"}


def test_a_value_may_name_a_variable() -> None:
    environment = {"HOST": "0.0.0.0"}
    assert "TS101" in look({"inference_address": "http://$$HOST$$:8080"}, environment)


def test_secrets_that_are_there_now_are_named() -> None:
    found = look({"blacklist_env_vars": ".*(KEY|SECRET|PASSWORD|TOKEN|key|secret).*"})
    assert found == {}
    environment = {"SENTRY_DSN": "https://...", "HOME": "/root"}
    found = look({"blacklist_env_vars": ".*(KEY|SECRET|PASSWORD|TOKEN|key|secret).*"}, environment)
    assert found["TS306"].found.endswith("which lets pass SENTRY_DSN")
    assert "https" not in found["TS306"].found


def test_a_debugger_that_a_variable_starts_is_found() -> None:
    found = look({}, {"JAVA_TOOL_OPTIONS": "-Xss1m -agentlib:jdwp=server=y"})
    assert found["TS604"].key == "JAVA_TOOL_OPTIONS"


def test_no_password_is_repeated() -> None:
    found = look({"keystore": "/k.p12", "keystore_pass": "hunter2"})
    assert found["TS401"].found == "a password"
    assert "hunter2" not in "".join(map(str, found.values()))
    assert "TS401" in look({"keystore": "/k.p12"})
    named = {"keystore": "/k.p12", "keystore_pass": "$$KEYSTORE_PASS$$"}
    assert "TS401" not in look(named, {"KEYSTORE_PASS": "hunter2"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed configuration with a key file and a store beside it."""
    (tmp_path / "key.pem").write_text("key")
    (tmp_path / "key.pem").chmod(0o600)
    (tmp_path / "store").mkdir()
    lines = [f"{key}={value}" for key, value in {**CLOSED, "model_store": "store"}.items()]
    path = tmp_path / "config.properties"
    path.write_text("\n".join([*lines, "private_key_file=key.pem", ""]))
    path.chmod(0o600)
    return path


def look_at(path: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    found = audit(read_properties(path), path=path, environment=environment or {})
    return [item.id for item in found]


def test_rights_of_files_are_looked_at(path: Path) -> None:
    assert look_at(path) == []
    (path.parent / "key.pem").chmod(0o640)
    (path.parent / "store").chmod(0o777)
    path.chmod(0o666)
    assert look_at(path) == ["TS403", "TS404", "TS402"]
    (path.parent / "key.pem").unlink()
    assert "TS405" in look_at(path)


def test_lines_are_looked_at(path: Path) -> None:
    with path.open("a") as stream:
        stream.write("# job_queue_size=1 \njob_queue_size=5\njob_queue_size=7\ndebug=false \n")
    found = audit(read_properties(path), path=path, environment={})
    assert [(item.id, item.key) for item in found] == [
        ("TS702", "job_queue_size"),
        ("TS706", "debug"),
    ]


def test_a_file_that_torchserve_would_not_read_is_told(path: Path) -> None:
    assert look_at(path, {"TS_CONFIG_FILE": str(path)}) == []
    assert look_at(path, {"TS_CONFIG_FILE": "/etc/other.properties"}) == ["TS707"]


def test_what_needs_no_decision_is_mended() -> None:
    worst = {
        **{key: "http://0.0.0.0:1" for key in ("inference_address", "metrics_address")},
        "management_address": "https://0.0.0.0:8081",
        "grpc_management_address": "0.0.0.0",
        "disable_token_authorization": "true",
        "enable_model_api": "true",
        "token_expiration_min": "1000",
        "cors_allowed_origin": "*",
        "enable_envvars_config": "true",
        "install_py_dep_per_model": "true",
        "limit_max_image_pixels": "on",
        "vmargs": "-Xmx2g -agentlib:jdwp=server=y -Dmine=1",
        "load_models": "all",
    }
    findings = audit(worst, environment={})
    mended = harden(worst, findings)
    left = {item.id for item in audit(mended, environment={})}
    assert left == {"TS109", "TS303"}
    assert mended["vmargs"] == (
        "-Xmx2g -Dmine=1 -XX:MaxDirectMemorySize=512m -XX:+ExitOnOutOfMemoryError"
    )
    assert mended["inference_address"] == "http://127.0.0.1:1"
    assert mended["load_models"] == "all"
    assert "cors_allowed_origin" not in mended
    assert harden(mended, audit(mended, environment={})) == mended


def test_kinds_are_whole() -> None:
    assert len(WEAKNESSES) > 40
    for id, weakness in WEAKNESSES.items():
        assert id == weakness.id
        assert weakness.why
        assert weakness.remedy
        assert isinstance(weakness.severity, Severity)
    assert sorted(WEAKNESSES) == list(WEAKNESSES)
