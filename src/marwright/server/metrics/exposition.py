"""Samples on their way to Prometheus: read from text, gathered by family, written as text again.

The forms: Prometheus' text format 0.0.4 and OpenMetrics 1.0. A scrape of 50 versions has 5,000
lines, of which the next one differs by numbers alone: a series is taken apart once, its labels
stay as they are escaped.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from marwright.server.metrics.families import FAMILIES, LABEL_LIMIT, Family, find_family

__all__ = [
    "escape_label",
    "Exposition",
    "LineReader",
    "OPENMETRICS",
    "read_lines",
    "Sample",
    "Series",
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
_BOUNDED = frozenset(family.name for family in FAMILIES if _GIVEN.issuperset(family.labels))
"""Families that have no others."""
MOST_SERIES = 1 << 15
"""That one reader remembers."""


@dataclass(frozen=True)
class Series:
    """What numbers are of: a name and labels, with what follows from them."""

    name: str
    labels: tuple[tuple[str, str], ...]
    """Names with values, which are escaped as they stand in the text."""

    @cached_property
    def family(self) -> Family | None:
        """Its family; None where it is none of ours."""
        return find_family(self.name)

    @cached_property
    def text(self) -> str:
        """What stands before its number, in the text format."""
        return _write_series(self.name, self.labels)

    @cached_property
    def openmetrics(self) -> str:
        """The same in OpenMetrics, where an edge is written as the number that it is."""
        pairs = tuple((k, _write_edge(v) if k == "le" else v) for k, v in self.labels)
        return _write_series(self.name, pairs)

    @cached_property
    def histogram(self) -> tuple[tuple[str, str], ...]:
        """Labels of the histogram that it is a part of."""
        return tuple(pair for pair in self.labels if pair[0] != "le")

    @cached_property
    def edge(self) -> float:
        """The bucket's upper end; for what is no bucket infinite, as it comes last."""
        text = dict(self.labels).get("le", "inf")
        return float(text) if _is_number(text) else math.inf


class Sample(NamedTuple):
    """One number of one series."""

    series: Series
    value: str

    @property
    def name(self) -> str:
        """The series' name."""
        return self.series.name

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """The series' labels."""
        return self.series.labels


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
        self._samples[family.name].append(Sample(Series(name, pairs), _write_number(value)))

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
            family = sample.series.family
            if family is None:
                self.dropped["unknown"] += 1
            elif family.name in _BOUNDED or self._is_bounded(family, sample):
                self._samples[family.name].append(sample)
            else:
                self.dropped[family.name] += 1

    def _is_bounded(self, family: Family, sample: Sample) -> bool:
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
                yield Sample(Series(sample.name, sample.labels + more), sample.value)

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
            if openmetrics:
                chunks += [f"{series.openmetrics} {value}\n" for series, value in samples]
            else:
                chunks += [f"{series.text} {value}\n" for series, value in samples]
        if openmetrics:
            chunks.append("# EOF\n")
        return "".join(chunks).encode()


class LineReader:
    """Reads texts, and remembers the series in them.

    `renamed` says under which names labels go on, in the order in which they are to stand; labels
    besides are left out then.
    """

    def __init__(self, renamed: Mapping[str, str] | None = None) -> None:
        self._renamed = renamed
        self._known: dict[str, Series] = {}
        """By what stands before the number."""

    def read(self, text: str) -> tuple[list[Sample], int]:
        """Return the samples of a text, and how many lines could not be read.

        A last line without its end was cut off, and is not read.
        """
        samples, failed = [], 0
        lines = text.split("\n")
        if lines.pop():
            failed += 1
        known = self._known
        for line in lines:
            if not line or line[0] == "#":
                continue
            before, _, value = line.rpartition(" ")
            series = known.get(before)
            if series is None:
                found = self._read_line(line)
                if found is None:
                    failed += 1
                    continue
                series, value = found
            if _is_number(value):
                samples.append(Sample(series, value))
            else:
                failed += 1
        return samples, failed

    def _read_line(self, line: str) -> tuple[Series, str] | None:
        """Take a line apart; None where it is none."""
        match = _LINE.fullmatch(line)
        labels = None if match is None else _read_labels(match[2] or "")
        if match is None or labels is None:
            return None
        if self._renamed is not None:
            labels = {new: labels[old] for old, new in self._renamed.items() if old in labels}
        series = Series(match[1], tuple(labels.items()))
        if len(self._known) >= MOST_SERIES:
            self._known.clear()
        self._known[line[: match.start(3) - 1]] = series
        return series, match[3]


read_lines = LineReader().read
"""Read a text as it is; see LineReader.read."""


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
    groups: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.series.histogram, []).append(sample)
    return [
        sample
        for group in groups.values()
        for sample in sorted(group, key=lambda sample: sample.series.edge)
    ]


def _write_series(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    labels = ",".join([f'{label}="{value}"' for label, value in pairs])
    return f"{name}{{{labels}}}" if labels else name


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
