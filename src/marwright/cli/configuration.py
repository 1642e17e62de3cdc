"""What `marwright serve` is to serve: a file, and over it what the command line says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marwright.errors import ConfigurationError, UsageError
from marwright.server.registry import DEPLOYMENT_NAME

if TYPE_CHECKING:
    from marwright.archive.document import Document, Problem
    from marwright.server.deployment import Deployment

__all__ = ["Configuration", "find_configuration"]

PROPERTIES_NAME = "config.properties"
OVERRIDDEN = {
    "load_models": "name the archives on the command line",
    "model_store": "pass --store",
    "workflow_store": "an empty private folder is used",
}
"""Keys of a config.properties that the command line decides."""


@dataclass(frozen=True)
class Configuration:
    """Where a deployment comes from; it can be read again."""

    deploy: Path | None
    """A deploy.yaml."""
    properties: Path | None
    """A config.properties, where there is no deploy.yaml."""
    changes: Mapping[str, Any]
    """What the command line says, by the dotted keys of deploy.yaml."""

    def read(
        self, *, strict: bool, say_note: Callable[[str], None] = lambda text: None
    ) -> Deployment:
        """Return what is to be served, once nothing is wrong with it.

        Unless `strict`, an archive that is missing or broken is no reason not to serve the others:
        the supervisor names it.

        Raises:
            ConfigurationError: all that is wrong, with its lines where a deploy.yaml says it.
            UsageError: there is no such config.properties.
            StorageError: a file cannot be read.
        """
        from marwright.server.deployment import REMEDY

        deployment, document = self._read(say_note)
        problems = [
            problem
            for problem in self._judge(deployment, document)
            if strict or not problem.where.startswith("models")
        ]
        if document is not None:
            document.refuse(problems, remedy=REMEDY)
        if problems:
            lines = [str(problem) for problem in problems]
            raise ConfigurationError(
                "this cannot be served",
                found=lines[0] if len(lines) == 1 else f"{len(lines)} problems",
                remedy="mend it, or pass other options",
                detail="\n".join(lines) if len(lines) > 1 else "",
            )
        return deployment

    def list_problems(self, say_note: Callable[[str], None]) -> list[Problem]:
        """Return what would keep a server from starting; single archives and taken ports too.

        Values of a wrong type in a deploy.yaml come with what else is wrong in the file; the
        command line is not laid over such a file. Raises what `read` raises.
        """
        from marwright.archive.document import Document
        from marwright.server.deployment import Deployment
        from marwright.server.examination import examine_rest

        if self.deploy is not None:
            document = Document.read(self.deploy, error=ConfigurationError)
            _, wrong = document.validate(Deployment)
            if wrong:
                return [*wrong, *examine_rest(document, wrong, starting=True)]
        return self._judge(*self._read(say_note), starting=True)

    def _read(self, say_note: Callable[[str], None]) -> tuple[Deployment, Document | None]:
        """Return what is wanted, judged by its types alone, and the document where there is one."""
        from marwright.server.deployment import Deployment

        document = None
        if self.deploy is not None:
            deployment, document = Deployment.parse(self.deploy)
        elif self.properties is not None:
            deployment = _read_properties(self.properties, say_note)
        else:
            deployment = Deployment(store=Path("model_store").resolve())
        return _change(deployment, self.changes) if self.changes else deployment, document

    def _judge(
        self, deployment: Deployment, document: Document | None, *, starting: bool = False
    ) -> list[Problem]:
        """Return what is wrong beyond types; what the command line says has no line in the file."""
        from marwright.server.examination import examine

        return [
            replace(problem, line=None)
            if any(f"{problem.where}.".startswith(f"{key}.") for key in self.changes)
            else problem
            for problem in examine(deployment, document, starting=starting)
        ]


def find_configuration(
    deploy: Path | None, properties: Path | None, changes: Mapping[str, Any]
) -> Configuration:
    """Return what is meant: the files that are named, or those of the working folder.

    A deploy.yaml of the working folder is not meant where archives are named. Changes that are None
    are none.

    Raises:
        UsageError: both files are named.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if deploy is not None and properties is not None:
        raise UsageError(
            "--deploy and --config exclude each other",
            remedy="import it once: marwright config import config.properties",
        )
    if deploy is None and properties is None:
        if "models" not in changes and Path(DEPLOYMENT_NAME).is_file():
            deploy = Path(DEPLOYMENT_NAME)
        elif Path(PROPERTIES_NAME).is_file():
            properties = Path(PROPERTIES_NAME)
    return Configuration(deploy, properties, changes)


def _change(deployment: Deployment, changes: Mapping[str, Any]) -> Deployment:
    """Return the deployment with some values in place of its own, by dotted keys."""
    values = deployment.model_dump(mode="json", exclude_unset=True)
    values["store"] = str(deployment.store)  # where unsaid, it starts in the file's folder too
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[field] = value
    return type(deployment).model_validate(values)


def _read_properties(path: Path, say_note: Callable[[str], None]) -> Deployment:
    """Return what a config.properties amounts to here; say what of it is not used."""
    from marwright.server.conversion import import_properties
    from marwright.server.properties import read_properties

    if not path.is_file():
        raise UsageError(f"there is no {path}", remedy="check --config")
    deployment, notes = import_properties(path)
    given = read_properties(path)
    for key in sorted(given.keys() & set(OVERRIDDEN)):
        say_note(f"note: {key} of {path} is not used: {OVERRIDDEN[key]}")
    for note in notes:
        say_note(f"note: {path}: {note}")
    return deployment.model_copy(update={"store": Path("model_store").resolve(), "models": None})
