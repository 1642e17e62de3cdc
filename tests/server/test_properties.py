from __future__ import annotations

import re
from pathlib import Path

import pytest

from marwright.errors import StorageError, UsageError
from marwright.server.deployment import Deployment
from marwright.server.properties import read_properties, render_properties
from marwright.server.rendering import render_deployment
from marwright.server.sections import AccessSettings

DEFAULTS = render_deployment(Deployment())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.properties"


def test_the_repositorys_file_is_the_defaults_rendered(root: Path) -> None:
    text = (root / "config.properties").read_text(encoding="utf-8")
    assert text == render_properties(DEFAULTS)
    assert read_properties(root / "config.properties") == DEFAULTS


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "",
        "a=b=c",
        "http://127.0.0.1:8080",
        "# no comment",
        "back\\slash",
        "ends in \\",
        "two\nlines",
        "tab\there",
        "/home/jürgen/модели",
        "\U0001f600",
        "\x0b\x85\u2028",
        "\\u0041",
    ],
)
def test_what_is_rendered_is_read_again(path: Path, value: str) -> None:
    path.write_text(render_properties({"model_store": value, "last": "1"}), encoding="utf-8")
    assert read_properties(path) == {"model_store": value, "last": "1"}


def test_the_rendering_is_ascii_since_java_reads_latin_1() -> None:
    text = render_properties({"model_store": "/home/jürgen/\U0001f600/\\"})
    assert text.splitlines()[-1] == "model_store=/home/j\\u00fcrgen/\\ud83d\\ude00/\\\\"


def test_comments_and_empty_lines_say_nothing(path: Path) -> None:
    path.write_text("# one=1\n\n  ! two=2\n   \n  three = 3 # not a comment \n#four=4\\\nfive=5")
    assert read_properties(path) == {"three": "3 # not a comment", "five": "5"}


def test_the_last_of_two_lines_counts(path: Path) -> None:
    path.write_text("one=1\r\none=2\r\n")
    assert read_properties(path) == {"one": "2"}


def test_a_line_goes_on_after_a_backslash(path: Path) -> None:
    path.write_text('models={\\\n  "cnn": {\\\n    "1.0": {}\\\n  }}\nlast=a\\\\\nmore=\\')
    expected = {"models": '{"cnn": {"1.0": {}}}', "last": "a\\", "more": ""}
    assert read_properties(path) == expected


def test_every_broken_line_is_named(path: Path) -> None:
    path.write_text("good=1\nbroken\n# fine\n=nameless\nlast=\n  also broken")
    with pytest.raises(UsageError, match=r"config\.properties .*key=value") as caught:
        read_properties(path)
    assert caught.value.found == "line 2: 'broken'; line 4: '=nameless'; line 6: 'also broken'"


@pytest.mark.parametrize("content", [None, b"key=\xff\xfe"])
def test_a_file_that_cannot_be_read_is_a_storage_error(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"config\.properties"):
        read_properties(path)


def test_the_defaults_are_the_safe_ones() -> None:
    assert DEFAULTS["disable_token_authorization"] == "false"
    assert DEFAULTS["install_py_dep_per_model"] == "false"
    assert DEFAULTS["enable_envvars_config"] == "false"
    assert DEFAULTS["allowed_urls"] == "none"


def test_variables_that_are_let_through_match_no_more() -> None:
    deployment = Deployment(access=AccessSettings(environment=["HF_TOKEN", "A.B_KEY"]))
    pattern = re.compile(render_deployment(deployment)["blacklist_env_vars"])
    assert not pattern.fullmatch("HF_TOKEN")
    assert not pattern.fullmatch("A.B_KEY")
    for name in ("hf_token", "HF_TOKEN_2", "AXB_KEY", "AWS_SECRET_ACCESS_KEY"):
        assert pattern.fullmatch(name)
