"""Requirements: what an archive's requirements file names, and which one would bring a module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from marwright.storage import translate_os_errors

__all__ = ["installed_version", "name_requirement", "normalise", "Requirement", "Requirements"]

# Distributions whose name is not that of their module; where one is installed, its own metadata
# says so instead.
_DISTRIBUTIONS = {
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "Crypto": "pycryptodome",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "pymupdf",
    "google.protobuf": "protobuf",
    "jwt": "pyjwt",
    "magic": "python-magic",
    "mmcv": "mmcv-lite",
    "OpenSSL": "pyopenssl",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "pynvml": "nvidia-ml-py",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "slugify": "python-slugify",
    "umap": "umap-learn",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_OTHERS = re.compile(r"(-r|-e|--requirement|--editable)\b")
"""Options that name further distributions; others say only where from and how."""
_ADDRESS = re.compile(r"[\w+.-]*[:/\\]|[^@]*\.(whl|zip|gz)$")
"""An address or a file, which tells no name; "name @ address" does."""
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Requirement:
    """One line of a requirements file."""

    text: str
    line: int
    name: str
    """Distribution in its normal form; empty for an option, a file or an address."""


@dataclass(frozen=True)
class Requirements:
    """An archive's requirements file."""

    member: str
    """Its name inside the archive; empty where there is none."""
    items: tuple[Requirement, ...] = ()

    @classmethod
    def read(cls, folder: Path, member: str | None) -> Requirements:
        """Read the file of an unpacked archive, which need not be there."""
        if not member or not (folder / member).is_file():
            return cls("")
        with translate_os_errors(f"read {member}"), (folder / member).open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", "replace")
        return cls(member, tuple(_parse(text)))

    def bring(self, module: str) -> bool | None:
        """Whether they bring a module; None where one of them is unknown here and may."""
        names = {item.name for item in self.items}
        if names & {normalise(module), normalise(name_requirement(module))}:
            return True
        unknown = any(not name or installed_version(name) is None for name in names)
        return None if unknown else False


def name_requirement(module: str) -> str:
    """Return the distribution that is likely to bring a top-level module."""
    return _DISTRIBUTIONS.get(module) or module.replace("_", "-")


def normalise(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_version(name: str) -> str | None:
    """Return the version of a distribution that is installed here."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _parse(text: str) -> list[Requirement]:
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = re.sub(r"(^|\s)#.*$", "", line).strip(" \t\\")
        if not content or (content.startswith("-") and not _OTHERS.match(content)):
            continue
        match = _NAME.match(content)
        is_named = match is not None and not _ADDRESS.match(content)
        name = normalise(match[0]) if match is not None and is_named else ""
        items.append(Requirement(content, number, name))
    return items
