from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from marwright.cli.schema import schema


@pytest.mark.parametrize(
    ("arguments", "key"), [([], "settings"), (["model"], "settings"), (["deploy"], "limits")]
)
def test_a_file_s_schema_is_json(arguments: list[str], key: str) -> None:
    app = typer.Typer()
    app.command()(schema)
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert key in document["properties"]
    assert document["$schema"].endswith("2020-12/schema")


def test_editors_are_told_what_each_key_of_a_deployment_does() -> None:
    app = typer.Typer()
    app.command()(schema)
    document = json.loads(CliRunner().invoke(app, ["deploy"]).stdout)
    for name, group in [("Deployment", document), *document["$defs"].items()]:
        if name == "HandlerSettings":  # the handlers' own page says them
            continue
        for key, field in group["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key}"


def test_another_file_has_none() -> None:
    app = typer.Typer()
    app.command()(schema)
    assert CliRunner().invoke(app, ["server"]).exit_code == 2
