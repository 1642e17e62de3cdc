"""The manifest of an archive, as torch-model-archiver 0.12 writes it.

Source: model_archiver/manifest_components/{manifest,model}.py; read by TorchServe's
org.pytorch.serve.archive.model.Manifest.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone

from marwright.errors import ArchiveError

__all__ = ["ARCHIVER_HANDLERS", "CPP_HANDLERS", "Manifest", "MANIFEST_NAME", "STOCK_HANDLERS"]

MANIFEST_NAME = "MAR-INF/MANIFEST.json"
ARCHIVER_VERSION = "0.12.0"

ARCHIVER_HANDLERS = frozenset(
    {
        "base_handler",
        "dali_image_classifier",
        "image_classifier",
        "image_segmenter",
        "object_detector",
        "text_classifier",
        "trt_llm_handler",
        "vllm_handler",
    }
)
"""Names for which torch-model-archiver wants no file (model_packaging_utils.py, model_handlers)."""
STOCK_HANDLERS = ARCHIVER_HANDLERS | {
    "dali_handler",
    "densenet_handler",
    "text_handler",
    "vision_handler",
}
"""Every module of ts.torch_handler that a worker could take, where an archive has no such file."""
CPP_HANDLERS = frozenset({"BaseHandler", "TorchScriptHandler"})
"""The same for the runtime LSP, TorchServe's C++ backend."""

# model_packaging_utils.py, check_model_name_regex_or_exit
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")
# It is part of URLs: /predictions/NAME/VERSION.
_VERSION = re.compile(r"[^\s/?#%\\\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Manifest:
    """What TorchServe reads first in an archive."""

    name: str
    """Model name: letters, digits, `_`, `-`, `.`; it becomes part of URLs."""
    version: str
    handler: str
    """File name of the handler inside the archive."""
    serialized_file: str | None = None
    model_file: str | None = None
    config_file: str | None = None
    requirements_file: str | None = None
    runtime: str = "python"
    created_on: str = ""
    """`dd/mm/yyyy hh:mm:ss`; pack derives it from SOURCE_DATE_EPOCH or a fixed time."""

    def __post_init__(self) -> None:
        """Refuse names that TorchServe or its URLs cannot carry."""
        if not _NAME.fullmatch(self.name):
            raise ArchiveError(
                "the model name cannot be used in a URL",
                expected="letters, digits, '_', '-' or '.', beginning with a letter or digit",
                found=repr(self.name),
            )
        if not _VERSION.fullmatch(self.version):
            raise ArchiveError(
                "the model version cannot be used in a URL",
                expected="text such as 1.0, without spaces and '/', '?', '#', '%'",
                found=repr(self.version),
            )

    @property
    def handler_file(self) -> str | None:
        """Name of the member that holds the handler; None for one of TorchServe's own.

        `handler` is `file.py`, `file`, either with `:function` behind it, or a stock name.
        """
        file = self.handler.split(":")[0]
        if self.runtime == "LSP":
            return None if file in CPP_HANDLERS else f"{file}.so"
        if file.endswith(".py"):
            return file
        return None if file in STOCK_HANDLERS else f"{file}.py"

    @classmethod
    def parse(cls, text: bytes, *, source: str) -> Manifest:
        """Read a manifest; `source` names the archive in errors.

        Raises:
            ArchiveError: not JSON, or without a model, its name or its handler.
        """
        try:
            document = json.loads(text)
            model = document["model"]
            manifest = cls(
                name=model["modelName"],
                version=str(model.get("modelVersion", "1.0")),
                handler=model["handler"],
                serialized_file=model.get("serializedFile"),
                model_file=model.get("modelFile"),
                config_file=model.get("configFile"),
                requirements_file=model.get("requirementsFile"),
                runtime=document.get("runtime", "python"),
                created_on=document.get("createdOn", ""),
            )
            for name, value in vars(manifest).items():
                if not isinstance(value, (str, type(None))):
                    raise TypeError(f"{name} is {value!r:.60}, not text")
                if value and not value.isprintable():
                    raise ValueError(f"{name} is {value!a:.60}, which cannot be printed")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise ArchiveError(
                f"{source} has a broken manifest",
                expected=f"{MANIFEST_NAME} with model.modelName and model.handler",
                found=f"{type(exc).__name__}: {exc}"[:200],
                remedy="pack the model again",
            ) from exc

    def to_json(self) -> bytes:
        """Return the file's bytes, keys in torch-model-archiver's order."""
        model = {
            "modelName": self.name,
            "serializedFile": self.serialized_file,
            "handler": self.handler,
            "modelFile": self.model_file,
            "modelVersion": self.version,
            "requirementsFile": self.requirements_file,
            "configFile": self.config_file,
        }
        document = {
            "createdOn": self.created_on,
            "runtime": self.runtime,
            "model": {key: value for key, value in model.items() if value},
            "archiverVersion": ARCHIVER_VERSION,
        }
        return json.dumps(document, indent=2).encode()


def format_creation_time(epoch_seconds: int) -> str:
    """Return a time as manifests state it, in UTC so that every machine agrees."""
    moment = datetime.fromtimestamp(epoch_seconds, tz=timezone.utc)
    return moment.strftime("%d/%m/%Y %H:%M:%S")
