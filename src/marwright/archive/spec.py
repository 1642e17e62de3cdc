"""model.yaml: what one archive is to be, in one file instead of many flags."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

from marwright.archive.document import Document, Problem, validate
from marwright.archive.settings import ModelSettings

__all__ = ["Backend", "expand", "FileEntry", "is_wildcard", "Port", "SampleEntry", "Spec"]

Backend = Literal["torchscript", "onnx", "exported", "aotinductor", "openvino", "eager"]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-.]*$")]

_STRICT = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class FileEntry(BaseModel):
    """A file, folder or wildcard that travels in the archive, and its place there."""

    model_config = _STRICT

    source: Text = Field(alias="from")
    """Path from the spec's folder; a folder comes with its tree."""
    target: Text | None = Field(default=None, alias="to")
    """Name inside; where it ends in `/`, the folder. Without it the path stays as it is."""


class SampleEntry(BaseModel):
    """A request that the model must be able to answer."""

    model_config = _STRICT

    file: Text
    """The request's body, or a wildcard for several."""
    content_type: str | None = None
    """As the client sends it; none where not given."""
    status: int = Field(default=200, ge=200, le=599)
    """HTTP status that the answer must have."""
    answer: Any = None
    """What the answer must be: of a mapping the keys given, numbers within the tolerance."""


def _key(name: str, model: Any) -> BeforeValidator:
    """Let a text stand for a mapping with one key, so that an error names one form, not two."""
    return BeforeValidator(
        lambda value: {name: value} if isinstance(value, str) else value,
        json_schema_input_type=str | model,
    )


AnyFile = Annotated[FileEntry, _key("from", FileEntry)]
AnySample = Annotated[SampleEntry, _key("file", SampleEntry)]


class Port(BaseModel):
    """What goes into the model, or comes out of it."""

    model_config = _STRICT

    content_types: list[Text] = []
    shape: list[int | None] | None = None
    """Of the tensor behind it; null for a free dimension."""
    datatype: str | None = None
    """Such as FP32 or INT64 (KServe v2's names)."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    """JSON Schema of a body that is JSON."""
    description: str | None = None

    @field_validator("json_schema")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        from jsonschema.exceptions import SchemaError  # here: 80 ms that only a schema needs
        from jsonschema.validators import validator_for

        if schema is not None:
            try:
                validator_for(schema).check_schema(schema)
            except SchemaError as exc:
                where = "".join(f"{key}: " for key in exc.path)
                raise ValueError(f"is no JSON Schema: {where}{exc.message}") from exc
        return schema


class Limits(BaseModel):
    """What a request may bring; the handler refuses more before it decodes anything."""

    model_config = _STRICT

    max_bytes: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)
    """Things to predict in one request."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Width times height of an image."""
    max_elements: int | None = Field(default=None, ge=1)
    """Numbers in an array."""


class Dataset(BaseModel):
    """What the model learned from, for the bill of materials."""

    model_config = _STRICT

    name: Text
    digest: str | None = None
    """SHA-256 of the data, where known."""
    licence: str | None = None


class Spec(BaseModel):
    """One archive: name, version, model, handler, and all that travels with them."""

    model_config = _STRICT

    name: Name
    """Model name; it becomes part of URLs."""
    version: Text = "1.0"
    handler: Text = "image_classifier"
    """A path to a file, or the name of a handler that comes with marwright."""
    backend: Backend = "torchscript"
    """What executes the model file: TorchScript, ONNX Runtime, a torch.export program, a package of
    AOTInductor, OpenVINO's .xml (its .bin goes under `files`), or torch with the model's class."""
    model: Text | None = None
    """The file with the weights; none where the handler brings its own."""
    architecture: Text | None = None
    """Backend `eager` only: the Python file with the one torch.nn.Module."""
    files: list[AnyFile] = []
    """Further files, folders and wildcards, with their place in the tree."""
    requirements: Text | list[Text] = []
    """A requirements.txt, or its lines."""
    python: Annotated[str, StringConstraints(pattern=r"^3\.\d{1,2}$")] | None = None
    """Python of the server, such as "3.10"; the handler must be valid in it."""
    settings: ModelSettings = ModelSettings()
    """What TorchServe reads from model-config.yaml: workers, batch size, delays, timeouts."""
    limits: Limits = Limits()
    samples: list[AnySample] = []
    """Requests that are tried before the archive is written, and travel in it."""
    input: Port | None = None
    output: Port | None = None
    labels: Text | list[Text] | None = None
    """Class labels in the order of the logits, or a JSON file of them."""
    licence: str | None = None
    """An SPDX expression such as Apache-2.0, or free text."""
    description: str | None = None
    dataset: Dataset | None = None
    report: Text | None = None
    """A JSON file with the training's figures, for the provenance."""

    @field_validator("version", mode="before")
    @classmethod
    def _quote(cls, version: Any) -> Any:
        """Take YAML's 1.0 for the text that was meant; 1.10 would have lost its zero."""
        if isinstance(version, (int, float)) and not isinstance(version, bool):
            raise ValueError(f'is the number {version}; write it in quotes, such as "1.0"')
        return version

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read a model.yaml.

        Raises:
            ArchiveError: all that is wrong in it at once, each with its line: unknown keys, wrong
                types, files that are not there.
        """
        document = Document.read(path)
        spec, problems = document.validate(cls)
        if spec is not None:
            problems += spec.list_problems(document)
        document.refuse(problems, remedy=f"mend {path.name}; marwright schema prints what it takes")
        assert spec is not None  # else there were problems
        return spec

    @classmethod
    def create(cls, **values: Any) -> Spec:
        """Check values given in Python.

        Raises:
            ArchiveError: unknown names, wrong types, impossible values; all of them at once.
        """
        return validate(cls, values, source="the spec")

    def override(self, **values: Any) -> Spec:
        """Return the spec with other values for some of its keys, checked likewise."""
        return Spec.create(**{**self.model_dump(by_alias=True, exclude_unset=True), **values})

    def list_problems(self, document: Document) -> list[Problem]:
        """Return what is wrong beyond types: files that are not there, keys that do not agree."""
        folder = document.path.parent
        problems = [
            document.problem(keys, f"there is no file {name}")
            for keys, name in self._named_files()
            if not expand(folder, name)
        ]
        if self.backend == "eager" and not self.architecture:
            problems.append(
                document.problem(["backend"], "eager needs `architecture`, the Python file")
            )
        if self.architecture and self.backend != "eager":
            problems.append(document.problem(["architecture"], "goes with `backend: eager`"))
        if isinstance(self.labels, list) and len(set(self.labels)) != len(self.labels):
            problems.append(document.problem(["labels"], "holds a label twice"))
        return problems

    def _named_files(self) -> Iterator[tuple[list[str | int], str]]:
        """Yield (keys, path) of every file that the spec names."""
        for key in ("model", "architecture", "report"):
            if value := getattr(self, key):
                yield [key], value
        if self.handler.endswith(".py"):
            yield ["handler"], self.handler
        for key in ("requirements", "labels"):
            if isinstance(value := getattr(self, key), str):
                yield [key], value
        for number, file in enumerate(self.files):
            yield ["files", number], file.source
        for number, sample in enumerate(self.samples):
            yield ["samples", number], sample.file

    def describe(self) -> bytes:
        """Return what travels in the archive as MAR-INF/spec.json: no path of this machine."""
        shown = self.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            include={
                "name",
                "version",
                "backend",
                "python",
                "limits",
                "input",
                "output",
                "licence",
                "description",
                "dataset",
            },
        )
        if isinstance(self.labels, list):
            shown["labels"] = self.labels
        return json.dumps(shown, indent=2, sort_keys=True).encode() + b"\n"


def is_wildcard(name: str) -> bool:
    """Whether a path stands for all that match it."""
    return any(letter in name for letter in "*?[")


def expand(folder: Path, name: str) -> list[Path]:
    """Return the files and folders that a path stands for, sorted; it starts in `folder`."""
    if not is_wildcard(name):
        return [folder / name] if (folder / name).exists() else []
    root = "" if Path(name).is_absolute() else glob.escape(str(folder)) + os.sep
    return sorted(map(Path, glob.glob(root + name, recursive=True)))  # noqa: PTH207  may be absolute
