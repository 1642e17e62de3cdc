from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from marwright.errors import StorageError
from marwright.training.optimise.gates import Gates, choose
from marwright.training.optimise.machine import describe_machine
from marwright.training.optimise.plots import draw_pareto, draw_sensitivity, find_front
from marwright.training.optimise.report import list_rows, write_report
from marwright.training.optimise.result import Parity, Result, Timing
from marwright.training.optimise.variant import BASELINES, DEFAULT_PLAN, Variant

SCAN = {"conv1": {0.25: 0.6, 0.5: 0.93, 1.0: 0.98}, "fc1": {0.25: 0.95, 0.5: 0.97, 1.0: 0.98}}
ITEMS = 180


def make(variant: Variant, ms: float, *, wrong: int = 3, size: int = 1_300_000) -> Result:
    return Result(
        variant=variant,
        file=f"{variant.name}.bin",
        size_bytes=size,
        accuracy=(ITEMS - wrong) / ITEMS,
        correct=tuple(number >= wrong for number in range(ITEMS)),
        timings=tuple(Timing(n, ms * n, 2 * ms * n, ms * n, ms * n) for n in (1, 32)),
        memory_bytes=5_000_000,
        load_seconds=0.1,
        parity=Parity(3e-6, 1e-6, 1.0),
        parameters=1000,
        nonzero=1000,
        build_seconds=1.0,
        failure="",
    )


EAGER = make(BASELINES[0], 1.2)
FAST = make(Variant("onnx-half", "onnx", keep=0.5, epochs=4), 0.1, size=330_000)
WRONG = make(Variant("onnx-int8", "onnx", quantise="static"), 0.05, wrong=20, size=330_000)
FAILED = Result.of_failure(Variant("aotinductor", "aotinductor"), "no <compiler> & no hope")
RESULTS = (EAGER, make(BASELINES[1], 1.0), FAST, WRONG, FAILED)


def write(folder: Path, results: tuple[Result, ...] = RESULTS, **options: Any) -> dict[str, Any]:
    gates = options.pop("gates", Gates())
    decision = choose(results, EAGER, gates)
    return write_report(
        folder, results=results, baseline=EAGER, gates=gates, decision=decision, **options
    )


class Page(HTMLParser):
    """What a browser would make of a page: tags, the text of cells, and what it would fetch."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def read_page(folder: Path) -> Page:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_the_report_holds_every_result_beside_the_baseline(tmp_path: Path) -> None:
    written = write(tmp_path, threads=2, subject={"run": "runs/digits"})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == written
    assert report["schema"] == 1
    assert report["machine"]["threads"] == 2
    assert report["decision"]["chosen"] == "onnx-half"
    assert [each["variant"]["name"] for each in report["results"]] == [
        "eager",
        "eager-channels-last",
        "onnx-half",
        "onnx-int8",
        "aotinductor",
    ]
    fast = report["results"][2]
    assert fast["ratios"]["times_faster"] == pytest.approx({"1": 12.0, "32": 12.0})
    assert fast["ratios"]["size"] == pytest.approx(33 / 130)
    assert fast["comparison"]["verdict"] == "no difference that 180 items could show"
    assert Result.from_json(fast) == FAST
    assert [each["verdict"].split(" ")[0] for each in report["results"]] == [
        "baseline",
        "baseline",
        "chosen",
        "accuracy",
        "not",
    ]
    assert [bool(each["reasons"]) for each in report["results"]] == [
        False,
        False,
        False,
        True,
        True,
    ]


def test_the_baseline_stands_once_whether_or_not_it_is_among_the_results(tmp_path: Path) -> None:
    within, without = write(tmp_path), write(tmp_path, RESULTS[1:])
    assert within["results"] == without["results"]


def test_the_page_shows_every_variant_and_fetches_nothing(tmp_path: Path) -> None:
    write(tmp_path, scan=SCAN)
    page = read_page(tmp_path)
    names = [row[0] for row in page.rows]
    assert [
        name.startswith(start) for name, start in zip(names, ("variant", "eager"), strict=False)
    ]
    assert len(page.rows) == 1 + len(RESULTS)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "caption" in page.tags
    assert [str(image["src"])[:22] for image in page.images] == ["data:image/png;base64,"] * 2
    assert all(image["alt"] for image in page.images)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_escapes_what_others_wrote(tmp_path: Path) -> None:
    write(tmp_path, subject={"run": "<script>x</script>"}, notes=["a < b & c", '"><script>'])
    assert "script" not in read_page(tmp_path).tags
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no &lt;compiler&gt; &amp; no hope" in text
    assert "a &lt; b &amp; c" in text


def test_the_page_names_the_gates_and_the_machine(tmp_path: Path) -> None:
    write(tmp_path, gates=Gates(max_p99_ms=5, max_size_bytes=2_000_000), threads=1)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("at most 0.01 below", "at most 5 ms", "at most 2.0 MB", "1 thread used"):
        assert words in text


def test_a_report_without_a_choice_says_so(tmp_path: Path) -> None:
    report = write(tmp_path, (EAGER, WRONG, FAILED))
    assert report["decision"]["chosen"] is None
    assert 'class="line none">none of 2 may be served' in (tmp_path / "report.html").read_text()


def test_a_report_of_the_baseline_alone_is_written(tmp_path: Path) -> None:
    assert write(tmp_path, (EAGER,))["decision"]["line"] == "no variant was measured"
    assert len(read_page(tmp_path).rows) == 2


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    bare = replace(FAST, timings=(), memory_bytes=0, parity=None)
    report = write(tmp_path, (bare,))
    _, rows = list_rows(report)
    assert rows[1][2:9] == ("-", "-", "-", "-", "-", "330 KB", "-")
    assert read_page(tmp_path).rows[2][2] == "-"


def test_rows_are_text_as_wide_as_their_headers(tmp_path: Path) -> None:
    headers, rows = list_rows(json.loads(json.dumps(write(tmp_path))))
    assert len(set(headers)) == len(headers)
    assert {len(row) for row in rows} == {len(headers)}
    assert rows[2] == (
        "onnx-half",
        "0.9833",
        "0.1",
        "12.0",
        "3.2",
        "12.0",
        "0.2",
        "330 KB",
        "5.0 MB",
        "chosen",
    )
    assert rows[4][:3] == ("aotinductor", "-", "-")


def test_a_folder_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file")


def test_the_front_holds_what_none_beats() -> None:
    slower = make(Variant("torchscript"), 0.5, wrong=3)
    better = make(Variant("exported", "exported"), 2.0, wrong=1)
    assert find_front([EAGER, FAST, slower, WRONG, better, FAILED]) == [WRONG, FAST, better]
    assert find_front([FAILED]) == []


@pytest.mark.parametrize("count", [0, 1, 18])
def test_pictures_are_small_readable_pngs(tmp_path: Path, count: int) -> None:
    variants = (*BASELINES, *DEFAULT_PLAN.variants)[:count]
    results = [make(each, 0.1 * (1 + number)) for number, each in enumerate(variants)]
    draw_pareto(results, tmp_path / "pareto.png", chosen="onnx", refused=["exported"])
    draw_sensitivity(SCAN if count else {}, tmp_path / "sensitivity.png")
    for path in (tmp_path / "pareto.png", tmp_path / "sensitivity.png"):
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 300
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 10


def test_the_chosen_and_the_refused_look_different(tmp_path: Path) -> None:
    pictures = []
    for chosen, refused in (("", ()), ("onnx-half", ()), ("", ("onnx-half",))):
        draw_pareto([EAGER, FAST], tmp_path / "a.png", chosen=chosen, refused=refused)
        pictures.append((tmp_path / "a.png").read_bytes())
    assert len(set(pictures)) == 3


def test_the_machine_is_described(tmp_path: Path) -> None:
    machine = describe_machine(3)
    assert machine["threads"] == 3
    assert machine["cores"] >= 1
    assert {"python", "torch"} <= set(machine["versions"])
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast CPU: 3 GHz\n")
    assert describe_machine(1, cpuinfo=tmp_path / "cpuinfo")["cpu"] == "Fast CPU: 3 GHz"
    assert describe_machine(1, cpuinfo=tmp_path / "none")["cpu"]
