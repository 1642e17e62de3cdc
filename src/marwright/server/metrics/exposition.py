"""Samples on their way to Prometheus: read from text, gathered by family, written as text again.

The forms: Prometheus' text format 0.0.4 and OpenMetrics 1.0. A scrape of 50 versions has 5,000
lines, so that a line is taken apart by one expression and its labels stay as they are escaped.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from marwright.server.metrics.families import FAMILIES, LABEL_LIMIT, Family, find_family

__all__ = [
    "escape_label",
    "Exposition",
    "OPENMETRICS",
    "read_lines",
    "Sample",
    "TEXT",
    "unescape_label",
]

_log = logging.getLogger(__name__)

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\.)*)"(?:,|$)')
_ESCAPED = re.compile(r"\\(.)")
_GIVEN = frozenset({"model", "version", "replica", "le"})
"""Labels whose values a deployment bounds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one series."""

    name: str
    labels: tuple[tuple[str, str], ...]
    """Names with values, which are escaped as they stand in the text."""
    value: str


class Exposition:
    """What one scrape says.

    It takes the samples of this program's metrics alone, and of labels that others fill no more
    than LABEL_LIMIT values for each version: `dropped` counts what was left out, by family.
    """

    def __init__(self) -> None:
        self._samples: dict[str, list[Sample]] = {family.name: [] for family in FAMILIES}
        self._values: dict[tuple[str, str, tuple[str, ...]], set[str]] = {}
        self.dropped: Counter[str] = Counter()

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add one number; raises KeyError for a metric or labels that FAMILIES does not have."""
        family = find_family(name)
        if family is None or set(labels) != set(family.labels):
            raise KeyError(f"{name} with labels {sorted(labels)} is no metric")
        pairs = tuple((label, escape_label(labels[label])) for label in family.labels)
        self._samples[family.name].append(Sample(name, pairs, _write_number(value)))

    def add_missing(self, name: str, series: Iterable[Mapping[str, str]]) -> None:
        """Add series at 0 that are not there yet.

        A counter that appears at 5 has not grown, for Prometheus: first failures would be missed.
        """
        known = {sample.labels for sample in self._samples[name]}
        for labels in series:
            if tuple((label, escape_label(value)) for label, value in labels.items()) not in known:
                self.add(name, 0, **labels)

    def take(self, samples: Iterable[Sample]) -> None:
        """Take samples that were read from text."""
        for sample in samples:
            family = find_family(sample.name)
            if family is None:
                self.dropped["unknown"] += 1
            elif self._is_bounded(family, sample):
                self._samples[family.name].append(sample)
            else:
                self.dropped[family.name] += 1

    def _is_bounded(self, family: Family, sample: Sample) -> bool:
        if _GIVEN.issuperset(family.labels):
            return True
        given = tuple(value for label, value in sample.labels if label in _GIVEN and label != "le")
        for label, value in sample.labels:
            if label in _GIVEN:
                continue
            known = self._values.setdefault((family.name, label, given), set())
            if value not in known:
                if len(known) >= LABEL_LIMIT:
                    return False
                known.add(value)
        return True

    def list_samples(self, **labels: str) -> Iterator[Sample]:
        """Yield all samples, each with further labels."""
        more = tuple((name, escape_label(value)) for name, value in labels.items())
        for samples in self._samples.values():
            for sample in samples:
                yield Sample(sample.name, sample.labels + more, sample.value) if more else sample

    def render(self, *, openmetrics: bool = False) -> bytes:
        """Return the text, in the order of FAMILIES; families without samples are left out."""
        chunks = []
        for family in FAMILIES:
            samples = self._samples[family.name]
            if not samples:
                continue
            name = family.name
            if openmetrics and family.kind == "counter":
                name = name.removesuffix("_total")
            chunks.append(f"# HELP {name} {_escape_help(family.help)}\n")
            chunks.append(f"# TYPE {name} {family.kind}\n")
            if family.kind == "histogram":
                samples = _order_buckets(samples)
            chunks += [_render_sample(sample, openmetrics) for sample in samples]
        if openmetrics:
            chunks.append("# EOF\n")
        return "".join(chunks).encode()


def read_lines(text: str, *, renamed: Mapping[str, str] | None = None) -> tuple[list[Sample], int]:
    """Return the samples of a text, and how many lines could not be read.

    A last line without its end was cut off, and is not read. `renamed` says under which names
    labels go on, in the order in which they are to stand; labels besides are left out then.
    """
    samples, failed = [], 0
    lines = text.split("\n")
    if lines.pop():
        failed += 1
    for line in lines:
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        labels = None if match is None else _read_labels(match[2] or "")
        if match is None or labels is None or not _is_number(match[3]):
            failed += 1
            continue
        if renamed is not None:
            labels = {new: labels[old] for old, new in renamed.items() if old in labels}
        samples.append(Sample(match[1], tuple(labels.items()), match[3]))
    return samples, failed


def escape_label(value: str) -> str:
    """Return a label's value as it stands between the quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def unescape_label(text: str) -> str:
    """Return a label's value as it was before `escape_label`."""
    return _ESCAPED.sub(lambda match: "\n" if match[1] == "n" else match[1], text)


def _read_labels(text: str) -> dict[str, str] | None:
    """Return the labels between the braces; None where they are not whole."""
    labels, position = {}, 0
    while position < len(text):
        match = _LABEL.match(text, position)
        if match is None:
            return None
        labels[match[1]] = match[2]
        position = match.end()
    return labels


def _order_buckets(samples: list[Sample]) -> list[Sample]:
    """Put the series of a histogram one after the other, each with its buckets rising."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[float, Sample]]] = {}
    for sample in samples:
        key, rank = sample.labels, float("inf")
        if sample.name.endswith("_bucket"):
            key = tuple(pair for pair in sample.labels if pair[0] != "le")
            rank = float(dict(sample.labels).get("le", "inf"))
        groups.setdefault(key, []).append((rank, sample))
    return [
        sample for group in groups.values() for _, sample in sorted(group, key=lambda item: item[0])
    ]


def _render_sample(sample: Sample, openmetrics: bool) -> str:
    pairs = sample.labels
    if openmetrics:  # where an edge is written as the number that it is
        pairs = tuple((k, _write_edge(v) if k == "le" else v) for k, v in pairs)
    labels = ",".join(f'{label}="{value}"' for label, value in pairs)
    return (
        f"{sample.name}{{{labels}}} {sample.value}\n"
        if labels
        else (f"{sample.name} {sample.value}\n")
    )


def _write_edge(text: str) -> str:
    return text if text == "+Inf" or "." in text or "e" in text else f"{text}.0"


def _write_number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
