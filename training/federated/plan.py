"""What server and clients must agree on, and the flat table by which Flower hands it to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from marwright.errors import UsageError

from ..recipe import Recipe
from ..settings import Settings
from .federation import Federation

__all__ = ["Plan"]

Scalar = bool | int | float | str
KINDS: dict[str, type[Any]] = {"recipe": Recipe, "settings": Settings, "federation": Federation}


@dataclass(frozen=True)
class Plan:
    """A whole federated training: of which data, which network, how, and with whom."""

    recipe: Recipe = field(default_factory=Recipe)
    settings: Settings = field(default_factory=Settings)
    federation: Federation = field(default_factory=Federation)

    def __post_init__(self) -> None:
        """Refuse what one training can do and a federation cannot, all at once."""
        settings, problems = self.settings, []
        if self.recipe.teacher:
            problems.append("a teacher, which no client has")
        if settings.schedule == "onecycle":
            problems.append("schedule onecycle, one of cosine, constant, step")
        if settings.patience:
            problems.append("patience, which would end each client's rounds at another epoch")
        if self.federation.is_private and settings.clip:
            problems.append("clip, where max grad norm already clips each item's gradient")
        if self.federation.is_private and settings.optimizer == "gd":
            problems.append("optimizer gd, where epsilon is counted over batches")
        if self.federation.is_private and settings.precision != "float32":
            problems.append(f"precision {settings.precision}, float32 where clients are private")
        if problems:
            raise UsageError("these choices do not go with a federation", found="; ".join(problems))

    @classmethod
    def read(cls, config: Mapping[str, Scalar]) -> Plan:
        """Read Flower's run config: recipe.dataset, settings.lr, federation.rounds and the like.

        Raises:
            UsageError: an entry is not known, or has an impossible value.
        """
        found: dict[str, dict[str, Any]] = {name: {} for name in KINDS}
        unknown = []
        for key, value in config.items():
            kind, _, name = key.partition(".")
            known = {item.name: item for item in fields(KINDS[kind])} if kind in KINDS else {}
            if name in known:
                found[kind][name] = _convert(value, known[name].default, key)
            elif name:
                unknown.append(key)
        if unknown:
            raise UsageError(
                "the run config has entries that mean nothing",
                expected="the fields of Recipe, Settings and Federation",
                found=", ".join(sorted(unknown)),
            )
        return cls(**{name: KINDS[name](**values) for name, values in found.items()})

    def write(self) -> dict[str, Scalar]:
        """Return the run config, of which `read` makes the same plan."""
        return {
            f"{kind}.{name}": ",".join(map(str, value)) if isinstance(value, tuple) else value
            for kind, values in asdict(self).items()
            for name, value in values.items()
        }

    def make_local(self, number: int, client: int) -> Settings:
        """Return what one client trains with in a round: the schedule runs over the rounds."""
        federation, settings = self.federation, self.settings
        return replace(
            settings,
            epochs=federation.local_epochs,
            lr=self.compute_rate(number),
            schedule="constant",
            checkpoint_steps=0,
            seed=(settings.seed * 1_000_003 + number * 1009 + client) % (1 << 32),
        )

    def compute_rate(self, number: int) -> float:
        """Return the learning rate of a round, counted from 1."""
        lr, past = self.settings.lr, (number - 1) / self.federation.rounds
        if self.settings.schedule == "cosine":
            return lr * (1 + math.cos(math.pi * past)) / 2
        if self.settings.schedule == "step":
            return float(lr * 0.1 ** int(past * 3))
        return lr


def _convert(value: Scalar, default: object, key: str) -> object:
    """Return a value as the field has it: Flower's tables know no tuples, and 1 for 1.0."""
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in str(value).split(",") if part.strip())
        if isinstance(default, float) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    if type(value) is not type(default):
        raise UsageError(
            f"the run config's {key} cannot be used",
            expected=type(default).__name__,
            found=repr(value),
        )
    return value
