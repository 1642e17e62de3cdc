"""Which version of a model answers which share of its requests."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from pydantic import ConfigDict, TypeAdapter, ValidationError

from marwright.errors import ConfigurationError, UsageError
from marwright.storage import translate_os_errors, write_file

__all__ = ["quote_version", "Split", "Traffic"]

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""The model names that archives may have (torch-model-archiver's rule)."""
LONGEST = 128
"""Characters of a name or a version: they become file names and log lines elsewhere too."""
_VERSION = re.compile(r"[^\s/?#%\\\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class Split:
    """How the requests for one model that name no version are shared out."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    model: str
    stable: str
    """The version that answers the rest, and whatever the candidate fails to answer."""
    candidate: str
    share: float = 0.0
    """Percent of requests that the candidate answers, in steps of 0.01."""
    shadow: float = 0.0
    """Percent of requests that are copied to the capture socket, in steps of 0.01."""

    def __post_init__(self) -> None:
        """Refuse what no archive can be called, and shares that are none.

        Raises:
            UsageError: names the value.
        """
        if not re.fullmatch(NAME, self.model) or len(self.model) > LONGEST:
            raise UsageError(
                "no such model's traffic can be split",
                expected=f"letters, digits, '_', '-', '.', at most {LONGEST} characters",
                found=repr(self.model),
            )
        for version in (self.stable, self.candidate):
            if not _is_version(version):
                raise UsageError("no such model version is possible", found=repr(version))
        if self.stable == self.candidate:
            raise UsageError("stable version and candidate are the same", found=repr(self.stable))
        for name, percent in (("share", self.share), ("shadow", self.shadow)):
            fits = math.isfinite(percent) and 0 <= percent <= 100 and round(percent, 2) == percent
            if not fits:
                raise UsageError(
                    f"no such {name} is possible",
                    expected="0 to 100 percent, in steps of 0.01",
                    found=repr(percent),
                )


@dataclass(frozen=True)
class Traffic:
    """The splits of a gateway, one for a model."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    splits: tuple[Split, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two splits of one model with a UsageError."""
        models = [split.model for split in self.splits]
        if len(set(models)) < len(models):
            raise UsageError("a model has two splits", found=", ".join(sorted(models)))

    @property
    def by_model(self) -> Mapping[str, Split]:
        """The splits by their model's name."""
        return {split.model: split for split in self.splits}

    def with_split(self, split: Split) -> Traffic:
        """Return this traffic with a split in place of its model's."""
        return Traffic((*self.without(split.model).splits, split))

    def without(self, model: str) -> Traffic:
        """Return this traffic without a model's split, where it has one."""
        return Traffic(tuple(split for split in self.splits if split.model != model))

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with write_file(path) as stream:
            stream.write(json.dumps(asdict(self), indent=2).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Traffic:
        """Read what `write` wrote.

        Raises:
            ConfigurationError: it is no traffic; `detail` lists all that is wrong.
            StorageError: it cannot be read.
        """
        with translate_os_errors(f"read {path}"):
            text = path.read_bytes()
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as exc:
            wrong = [
                f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}"
                for item in exc.errors(include_url=False, include_input=False)
            ]
            raise ConfigurationError(
                f"{path} describes no traffic",
                found=wrong[0],
                remedy="write it anew",
                detail="\n".join(wrong),
            ) from exc


def quote_version(version: str) -> str:
    """Return a version as it stands in URLs, headers and logs: nothing in it means anything."""
    return quote(version, safe="")


def _is_version(version: str) -> bool:
    """Whether it may stand in a URL's path; "." and ".." would mean another resource."""
    try:
        version.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    fits = _VERSION.fullmatch(version) is not None and len(version) <= LONGEST
    return fits and version not in {".", ".."}
