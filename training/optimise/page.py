"""The report as one HTML page that needs nothing beside it: no script, no file, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from .result import BATCHES
from .units import format_bytes

__all__ = ["render_page"]

STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6570; --page: #fff; --line: #d9dee3;
  --bar: #8fb8d9; --good: #e3f3e6; --bad: #a3342f; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --soft: #a3adb7; --page: #14181c;
  --line: #343c44; --bar: #35668f; --good: #1d3a26; --bad: #f0938d; } }
body { margin: 2rem auto; max-width: 82rem; padding: 0 1rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.line { padding: .8rem 1rem; border-radius: .4rem; background: var(--good); font-weight: 600; }
.none { background: none; border: 1px solid var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { vertical-align: bottom; }
td.number { text-align: right; white-space: nowrap; }
td small, th small { display: block; white-space: normal; min-width: 7rem;
  color: var(--soft); font-weight: normal; }
tr.chosen { background: var(--good); }
td.why { min-width: 15rem; } tr.refused td.why { color: var(--bad); }
.bar { display: block; height: .3rem; margin: .15rem 0 0 auto; border-radius: .15rem;
  background: var(--bar); min-width: 1px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def render_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of what report.json holds; `pictures` are PNGs, named pareto, sensitivity."""
    decision = report["decision"]
    name = report["subject"].get("run", "")
    title = escape(f"Variants of {name}" if name else "Variants")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>{title}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>",
        f'<p class="line{"" if decision["chosen"] else " none"}">{escape(decision["line"])}</p>',
        *_render_pareto(pictures),
        *_render_table(report),
        *_render_sensitivity(report, pictures),
        "<h2>Gates</h2>",
        _render_list(_list_gates(report)),
        "<h2>Measured on</h2>",
        _render_list(_list_circumstances(report)),
    ]
    if report["notes"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
        parts.append(f"<h2>Notes</h2>\n<ul>{notes}</ul>")
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _render_pareto(pictures: Mapping[str, bytes]) -> Iterator[str]:
    if "pareto" in pictures:
        alternative = "Accuracy against milliseconds by variant; the table below has every number."
        yield _render_picture(
            pictures["pareto"],
            alternative,
            "To the left is faster, above is more accurate. Along the dashed line, no variant is "
            "both faster and more accurate than another.",
        )


def _render_sensitivity(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Iterator[str]:
    if "sensitivity" not in pictures:
        return
    yield "<h2>What each layer bears</h2>"
    lowest = [
        f"{layer} {min(left.values()):.4f}" for layer, left in report["sensitivity"].items() if left
    ]
    alternative = "Accuracy by share of channels kept, a line by layer. Lowest: " + ", ".join(
        lowest
    )
    words = "Accuracy when one layer alone keeps a share of its channels, before any fine-tuning."
    yield _render_picture(pictures["sensitivity"], alternative, words)


def _render_picture(png: bytes, alternative: str, caption: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return (
        f'<figure><img src="{source}" alt="{escape(alternative)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _render_table(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of all variants, with bars as long as what was measured."""
    headers = ["variant", "accuracy", *(f"median ms, batch {batch}" for batch in BATCHES)]
    headers += ["p99 ms, batch 1", "file", "memory", "load s", "logits off by at most", "verdict"]
    results = report["results"]
    highest: dict[Any, float] = {
        batch: max(
            (one["p50_ms"] for each in results for one in each["timings"] if one["batch"] == batch),
            default=0,
        )
        for batch in BATCHES
    }
    highest |= {
        key: max((each[key] for each in results), default=0)
        for key in ("size_bytes", "memory_bytes")
    }
    yield "<h2>Every variant</h2>"
    yield '<div class="scroll" role="region" aria-label="Every variant" tabindex="0">\n<table>'
    yield (
        f"<caption>Accuracy on {report['items']:,} items of the validation split; times beside "
        f"{escape(report['baseline'])}. Bars grow with what a variant takes: short is good."
        "</caption>"
    )
    cells = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    yield f"<thead><tr>{cells}</tr></thead>\n<tbody>"
    for each in results:
        yield _render_row(each, highest)
    yield "</tbody>\n</table>\n</div>"


def _render_row(each: Mapping[str, Any], highest: Mapping[Any, float]) -> str:
    name, verdict = each["variant"]["name"], each["verdict"]
    mark = "chosen" if verdict == "chosen" else "refused" if each["reasons"] else ""
    head = f'<th scope="row">{escape(name)}<small>{escape(each["description"])}</small></th>'
    if each["failure"]:
        cells = f'<td class="why" colspan="9">{escape(verdict)}</td>'
        return f'<tr class="{mark}">{head}{cells}</tr>'
    timings = {timing["batch"]: timing for timing in each["timings"]}
    compared = each["comparison"]
    cells = _render_number(f"{each['accuracy']:.4f}", compared["verdict"] if compared else "")
    for batch in BATCHES:
        times = each["ratios"]["times_faster"].get(str(batch))
        median = timings[batch]["p50_ms"] if batch in timings else None
        cells += _render_number(
            "-" if median is None else f"{median:.3g}",
            "" if times is None else f"{times:.3g} times as fast",
            bar=(median or 0) / (highest[batch] or 1),
        )
    first = timings.get(BATCHES[0])
    cells += _render_number(f"{first['p99_ms']:.3g}" if first else "-")
    for key in ("size_bytes", "memory_bytes"):
        size = each[key]
        shown = format_bytes(size) if size else "-"
        cells += _render_number(shown, bar=size / (highest[key] or 1))
    cells += _render_number(f"{each['load_seconds']:.2f}")
    cells += _render_parity(each["parity"])
    cells += f'<td class="why">{escape(verdict)}</td>'
    return f'<tr class="{mark}">{head}{cells}</tr>'


def _render_parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return _render_number("-")
    worst, agreement = parity["worst"], parity["agreement"]
    return _render_number(
        "no number" if worst is None else f"{worst:.2g}",
        "" if agreement is None else f"{100 * agreement:.4g} % same class",
    )


def _render_number(text: str, small: str = "", *, bar: float = 0.0) -> str:
    """Return a cell; `bar` is a share of the longest, for the eye only: the number stands above."""
    cell = escape(text)
    cell += f'<span class="bar" aria-hidden="true" style="width:{bar:.1%}"></span>' if bar else ""
    cell += f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="number">{cell}</td>'


def _render_list(pairs: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in pairs.items())
    return f"<dl>{items}</dl>"


def _list_gates(report: Mapping[str, Any]) -> dict[str, str]:
    gates = report["gates"]
    limits = {"accuracy": f"at most {gates['max_accuracy_drop']:g} below the baseline's"}
    if gates["max_p99_ms"] is not None:
        limits["p99 at batch 1"] = f"at most {gates['max_p99_ms']:g} ms"
    for key in ("size", "memory"):
        if (most := gates[f"max_{key}_bytes"]) is not None:
            limits[key] = f"at most {format_bytes(most)}"
    return {**limits, "preferred": report["prefer"]}


def _list_circumstances(report: Mapping[str, Any]) -> dict[str, str]:
    machine = report["machine"]
    cores, threads = machine["cores"], machine["threads"]
    return {
        **{key: str(text) for key, text in report["subject"].items()},
        "processor": machine["cpu"],
        "cores": f"{cores}, {threads} thread{'s' if threads != 1 else ''} used",
        "system": machine["system"],
        "versions": ", ".join(f"{name} {text}" for name, text in machine["versions"].items()),
    }
