"""What a server and its models count, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marwright.errors import ClientError

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.samples import Sample

__all__ = ["Metrics"]


@dataclass(frozen=True)
class Metrics:
    """The families of one reading."""

    families: tuple[Metric, ...]
    """prometheus_client's: each has `name`, `type`, `documentation` and `samples`."""

    @classmethod
    def from_response(cls, text: str) -> Metrics:
        """Read the text form of Prometheus.

        Raises:
            ClientError: it is none.
        """
        from prometheus_client.parser import text_string_to_metric_families

        try:
            return cls(tuple(text_string_to_metric_families(text)))
        except (ValueError, LookupError, TypeError) as exc:
            raise ClientError(
                "GET /metrics did not answer with Prometheus' text",
                found=str(exc),
                remedy="check that the address is a TorchServe's with metrics_mode=prometheus",
            ) from exc

    def find(self, name: str, **labels: str) -> Iterator[Sample]:
        """Yield the samples of this name that carry these labels, whatever else they carry."""
        for family in self.families:
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    yield sample

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of these samples; 0 where there are none, as of what never happened."""
        return sum(sample.value for sample in self.find(name, **labels))
