"""`marwright schema`: the JSON Schema of the files that a person writes."""

from __future__ import annotations

from marwright.cli.output import print_json

__all__ = ["schema"]


def schema() -> None:
    """Print the JSON Schema of model.yaml, for editors and linters.

    An editor completes and checks a file that begins with a line such as
    `# yaml-language-server: $schema=model.schema.json`.
    """
    from marwright.archive import Spec

    print_json(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **Spec.model_json_schema(by_alias=True),
        }
    )
