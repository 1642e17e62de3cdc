"""What a version's metrics say besides its rates: drift, quality, and the time of each stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from marwright.monitor.page.plots import show_number, show_seconds
from marwright.server.metrics.exposition import Sample, unescape_label

__all__ = ["Measures", "read_measures"]

STAGES = ("decode", "preprocess", "infer", "postprocess")
"""In the order in which a batch passes them."""


@dataclass(frozen=True)
class Measures:
    """The tables of one version."""

    drift: tuple[tuple[str, ...], ...]
    """Test, subject, score, corrected p; what is the least likely without a shift comes first."""
    drift_summary: str
    """Empty where no window was compared."""
    is_shifted: bool
    quality: str
    """Empty where no true labels are known."""
    stages: tuple[tuple[str, ...], ...]
    """Stage, batches, mean time."""


def read_measures(samples: Iterable[Sample], model: str, version: str) -> Measures:
    """Gather what is said of one version; replicas are added up."""
    values: dict[tuple[str, ...], float] = {}
    for sample in samples:
        labels = {name: unescape_label(value) for name, value in sample.labels}
        if (labels.get("model"), labels.get("version")) == (model, version):
            kept = (labels.get(name, "") for name in ("test", "subject", "stage", "le", "status"))
            key = (sample.name, *kept)
            values[key] = values.get(key, 0.0) + float(sample.value)
    plain = {key[0]: value for key, value in values.items()}
    rows = plain.get("marwright_drift_window_rows", 0.0)
    shifted = plain.get("marwright_drift_detected", 0.0) > 0
    verdict = "is shifted" if shifted else "shows no shift"
    return Measures(
        drift=_list_drift(values),
        drift_summary=f"The last window of {rows:,.0f} predictions {verdict}." if rows else "",
        is_shifted=shifted,
        quality=_describe_quality(plain),
        stages=_list_stages(values),
    )


def _list_drift(values: dict[tuple[str, ...], float]) -> tuple[tuple[str, ...], ...]:
    scores = {key[1:3]: value for key, value in values.items() if key[0] == "marwright_drift_score"}
    chances = {
        key[1:3]: value for key, value in values.items() if key[0] == "marwright_drift_p_value"
    }
    order = sorted(scores, key=lambda pair: (chances.get(pair, 1.0), pair))
    return tuple((*pair, f"{scores[pair]:.3g}", f"{chances.get(pair, 1.0):.3g}") for pair in order)


def _describe_quality(plain: dict[str, float]) -> str:
    name = "marwright_quality_accuracy"
    if f"{name}_ratio" not in plain:
        return ""
    middle, low, high = (plain.get(f"{name}{part}_ratio", 0.0) for part in ("", "_lower", "_upper"))
    count = plain.get("marwright_quality_labels", 0.0)
    return f"{middle:.1%} right, {low:.1%} to {high:.1%} (95 %), of {count:,.0f} with a true label"


def _list_stages(values: dict[tuple[str, ...], float]) -> tuple[tuple[str, ...], ...]:
    name = "marwright_stage_seconds"
    counts = {key[3]: value for key, value in values.items() if key[0] == f"{name}_count"}
    sums = {key[3]: value for key, value in values.items() if key[0] == f"{name}_sum"}
    return tuple(
        (stage, show_number(count), show_seconds(sums.get(stage, 0.0) / count))
        for stage, count in sorted(counts.items(), key=lambda pair: _place(pair[0]))
        if count
    )


def _place(stage: str) -> tuple[int, str]:
    return (STAGES.index(stage) if stage in STAGES else len(STAGES), stage)
