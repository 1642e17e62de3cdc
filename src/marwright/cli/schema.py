"""`marwright schema`: the JSON Schema of the files that a person writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from marwright.cli.output import print_json

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["schema"]


def schema(
    file: Annotated[
        Literal["model", "deploy"], typer.Argument(help="model.yaml or deploy.yaml.")
    ] = "model",
) -> None:
    """Print the JSON Schema of model.yaml or deploy.yaml, for editors and linters.

    An editor completes and checks a file that begins with a line such as
    `# yaml-language-server: $schema=model.schema.json`.
    """
    print_json(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **_find_model(file).model_json_schema(by_alias=True),
        }
    )


def _find_model(file: str) -> type[BaseModel]:
    if file == "deploy":
        from marwright.server.deployment import Deployment

        return Deployment
    from marwright.archive import Spec

    return Spec
