"""The table of TorchServe's keys; docs/properties.md lists it, WRITE_TABLE=1 writes it anew."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from marwright.server.deployment import Deployment
from marwright.server.hardening.weaknesses import WEAKNESSES
from marwright.server.keys import KEYS, SECRET_NAMES, suggest_key
from marwright.server.rendering import render_deployment

HEAD = """# config.properties

Every key that TorchServe 0.12.0 reads, and what `marwright harden` finds in a file of them. The
names were read from the installed server (`org.pytorch.serve.util.ConfigManager`,
`ts/model_server.py`). TorchServe passes over any other key without a word; marwright names it, with
its nearest neighbour.

What counts, the first that is there: a `TS_` variable, where `enable_envvars_config=true`; the
command line; the file. `TS_CONFIG_FILE`, `LOG_LOCATION`, `METRICS_LOCATION`,
`TS_MODEL_SERVER_HOME` and `TS_OPEN_INFERENCE_PROTOCOL=oip` count always. `TS_ALLOWED_URLS` wants
`use_env_allowed_urls=true` too. `$$NAME$$` in a value stands for the variable NAME. Blanks at the
end of a line belong to the value: `true ` is not `true`, and so it is false.

The last column is the word of `deploy.yaml` that says the key or, as `code`, what marwright's
server sets it to; `properties:` in `deploy.yaml` may set that, and the keys where it is empty.

## Keys

| key | kind | TorchServe's default | what it does | variable | marwright |
|---|---|---|---|---|---|
"""
FINDINGS = """
## Findings of `marwright harden`

An id never changes its meaning. `--write` mends what needs no decision. From `error` on the command
exits with 1; `--fail-on warning` makes it stricter.

| id | severity | what it lets happen | what to do |
|---|---|---|---|
"""


def render() -> str:
    keys = []
    ours = render_deployment(Deployment())
    for key in KEYS.values():
        said = key.fixed or _quote(ours.get(key.name, ""))
        cells = [f"`{key.name}`", key.kind, _quote(key.default), key.does, _quote(key.variable)]
        keys.append(_row([*cells, said]))
    found = [
        _row([item.id, str(item.severity), item.why, item.remedy]) for item in WEAKNESSES.values()
    ]
    return HEAD + "\n".join(keys) + "\n" + FINDINGS + "\n".join(found) + "\n"


def _quote(text: str) -> str:
    return f"`{text}`" if text else ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_the_docs_list_every_key_and_every_finding(root: Path) -> None:
    path = root / "docs/properties.md"
    if os.environ.get("WRITE_TABLE"):
        path.write_text(render(), encoding="utf-8")
    assert path.read_text("utf-8") == render()


@pytest.fixture(scope="module")
def constants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text constants of the installed server's ConfigManager, by their names."""
    javap = shutil.which("javap")
    if javap is None:
        pytest.skip("there is no javap here: the table is compared where a JDK is installed")
    spec = importlib.util.find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("classes")
    name = "org/pytorch/serve/util/ConfigManager.class"
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend/model-server.jar") as jar:
        jar.extract(name, folder)
    done = subprocess.run(
        [javap, "-p", "-constants", str(folder / name)], capture_output=True, text=True, check=True
    )
    return dict(re.findall(r"String (\w+) = \"(.*)\";", done.stdout))


def list_keys(constants: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of those constants that are keys."""
    others = {"DEFAULT", "LOGGER", "FORMAT"}
    for name, value in constants.items():
        if name.startswith("TS_") or not others.intersection(name.split("_")):
            yield name, value


def test_the_table_is_what_the_installed_server_reads(constants: dict[str, str]) -> None:
    names = {value for _, value in list_keys(constants)}
    assert set(KEYS) == names | {"vmargs", "plugins_path"}


def test_variables_are_those_that_the_installed_server_reads(constants: dict[str, str]) -> None:
    variables = {value: name for name, value in list_keys(constants) if name.startswith("TS_")}
    assert {key.name: key.variable for key in KEYS.values() if key.variable} == variables


def test_every_key_is_whole() -> None:
    for key in KEYS.values():
        assert key.does.endswith(".")
        if key.kind == "bool":
            assert key.default in ("true", "false")
        if key.kind == "int" and key.default:
            assert key.default.isdigit()


def test_a_key_that_is_nearly_one_is_recognised() -> None:
    assert suggest_key("install_py_deps_per_model") == "; did you mean install_py_dep_per_model?"
    assert suggest_key("Inference_Adress") == "; did you mean inference_address?"
    assert suggest_key("colour") == ""


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_CONNECTION_STRING",
        "DATABASE_URL",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "HF_TOKEN",
        "MONGODB_URI",
        "PGPASSWORD",
        "SENTRY_DSN",
        "SSH_AUTH_SOCK",
        "UV_INDEX_URL",
        "db_passwd",
        "wandb_api_key",
    ],
)
def test_secrets_are_hidden(name: str) -> None:
    assert re.fullmatch(SECRET_NAMES, name)


@pytest.mark.parametrize(
    "name",
    [
        "CUDA_VISIBLE_DEVICES",
        "GOMP_SPINCOUNT",
        "HF_HOME",
        "HOME",
        "LANG",
        "LD_LIBRARY_PATH",
        "LOG_LOCATION",
        "OMP_NUM_THREADS",
        "PATH",
        "PYTHONPATH",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TMPDIR",
        "TOKENIZERS_PARALLELISM",
        "TS_DECODE_INPUT_REQUEST",
        "https_proxy",
    ],
)
def test_what_workers_need_is_not(name: str) -> None:
    assert not re.fullmatch(SECRET_NAMES, name)
