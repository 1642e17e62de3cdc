"""`marwright schema`: the JSON Schema of the files that a person writes."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.output import print_json

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["schema"]


class File(str, Enum):
    """The files that have a schema."""

    model = "model"
    deploy = "deploy"


def schema(
    file: Annotated[File, typer.Argument(help="model.yaml or deploy.yaml.")] = File.model,
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


def _find_model(file: File) -> type[BaseModel]:
    if file is File.deploy:
        from marwright.server.deployment import Deployment

        return Deployment
    from marwright.archive import Spec

    return Spec
