"""How soon drift is seen, how often for nothing, beside frouros and scipy on the same windows.

Run as `make bench WHAT=drift`; writes benchmarks/results/drift.json. frouros pins another numpy, so
it lives in an environment of its own, made once by `ARGS=--setup` (benchmarks/.venvs/frouros; some
400 MB).

Detection: the demo's CNN, on digits (trained on 600 scans, the reference 600 others, requests the
remaining 597; a window of 250) and on drawn shapes (a window of 500). A log holds one
full window without a shift; then shifted requests come, and the last window is compared again
and again, as `marwright monitor` does. The delay is how many shifted requests had been logged when
the window was first called shifted, over REPEATS orders of the requests.

False alarms: drawn shapes have no end, so that no request stands in two windows, nor in a reference
and a window. Once with one reference for all windows, once with a reference of its own for each:
the promise is over both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
from scipy import ndimage, stats  # type: ignore[import-untyped]

from marwright.monitor.drift import Drift, compare
from marwright.monitor.reference import Reference
from marwright.monitor.shifts import compute_psi, test_chi_square, test_ks, test_mmd
from marwright.monitor.spool import SCHEMA

HERE = Path(__file__).parent
RESULTS = HERE / "results/drift.json"
VENV = HERE / ".venvs/frouros"
FROUROS = "frouros==0.9.0"

RATES = (0.01, 0.05)
WINDOWS = 200
WINDOW = 500
REPEATS = 10
STEP = {"digits": 10, "shapes": 50}
"""Requests between two looks at the window."""
LONGEST = {"digits": 340, "shapes": 500}
"""Shifted requests after which nobody looks any more; of digits there are no others."""
EPOCHS = {"digits": 20, "shapes": 6}
DIGITS = {"train": 600, "reference": 600, "window": 250}
SHAPES = {"reference": 2000, "clean": 1500, "shifted": 1000}
PERMUTATIONS = 100
"""Of both MMDs where they are compared."""
QUIET = 20
"""Windows without a shift that frouros and scipy see too."""
RULE = 0.25
"""The PSI that is usually called a large change, where there is no p-value."""
BIG_ROWS, BIG_FEATURES = 10_000, 64

Pixels = npt.NDArray[np.uint8]
Change = Callable[[Pixels, np.random.Generator], Pixels]


@dataclass(frozen=True)
class Answers:
    """What a model logs of some requests."""

    features: Any
    names: tuple[str, ...]
    prediction: Any
    confidence: Any
    embedding: Any

    def take(self, rows: Any) -> Answers:
        """Return some of the requests."""
        parts = (getattr(self, name)[rows] for name in ("prediction", "confidence", "embedding"))
        return Answers(self.features[rows], self.names, *parts)

    def __add__(self, other: Answers) -> Answers:
        parts = (
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("prediction", "confidence", "embedding")
        )
        return Answers(np.concatenate([self.features, other.features]), self.names, *parts)

    def __len__(self) -> int:
        return len(self.confidence)

    def to_reference(self) -> Reference:
        """Return a reference of all of them."""
        return Reference(
            np.asarray(self.features, np.float32),
            self.names,
            np.asarray(self.confidence, np.float32),
            self.prediction,
            np.asarray(self.embedding[:1000], np.float32),
        )

    def to_table(self) -> Any:
        """Return them as the prediction log holds them."""
        rows, columns = self.features.shape
        places = np.arange(rows + 1, dtype=np.int32)
        names = pyarrow.array(list(self.names) * rows, pyarrow.string())
        values = pyarrow.array(np.asarray(self.features, np.float32).ravel())
        points = pyarrow.array(np.asarray(self.embedding, np.float32).ravel())
        width = self.embedding.shape[1]
        known = {
            "features": pyarrow.MapArray.from_arrays(places * columns, names, values),
            "prediction": pyarrow.array(self.prediction.tolist(), pyarrow.string()),
            "confidence": pyarrow.array(np.asarray(self.confidence, np.float32)),
            "embedding": pyarrow.ListArray.from_arrays(places * width, points),
        }
        return pyarrow.table(
            {
                field.name: known.get(field.name, pyarrow.nulls(rows, field.type))
                for field in SCHEMA
            },
            schema=SCHEMA,
        )


class Subject:
    """A model with data that it was not trained on."""

    def __init__(self, model: Any, classes: Sequence[str]) -> None:
        self._model = model
        self._classes = np.array(classes)

    def answer(self, pixels: Pixels) -> Answers:
        """Return what is logged of (N, 3, H, W) images, measured as handlers do."""
        import torch

        from marwright.handlers.image_features import IMAGE_FEATURES, measure_images
        from marwright.handlers.logits import find_best, fold_logits
        from marwright.training.data import scale

        logits, features = [], []
        with torch.inference_mode():
            for start in range(0, len(pixels), 1000):
                part = torch.from_numpy(pixels[start : start + 1000])
                logits.append(self._model(scale(part)).numpy())
                features.append(measure_images(part).numpy())
        found = np.concatenate(logits)
        best, confidence = find_best(found)
        return Answers(
            np.concatenate(features),
            tuple(IMAGE_FEATURES),
            self._classes[best],
            confidence,
            fold_logits(found),
        )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description="Detect drift; see the top of this file.")
    parser.add_argument("--setup", action="store_true", help="make frouros' environment")
    parser.add_argument(
        "--measure-window", action="store_true", help="print seconds and bytes of one large window"
    )
    options = parser.parse_args()
    if options.setup:
        make_venv()
    elif options.measure_window:
        print(*measure_here())
    else:
        run_all()


def run_all() -> None:
    """Measure everything and write the result."""
    began = time.perf_counter()
    digits = make_digits()
    detection = measure_detection(digits)
    shapes = make_shapes()
    quiet = measure_false_alarms(shapes)
    beside = compare_peers(digits, shapes)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("marwright", "numpy", "scipy", "torch")},
        "python": platform.python_version(),
        "peer": FROUROS,
        "error_rate": RATES[0],
        "detection": [*detection, *measure_detection(shapes)],
        "false_alarms": quiet,
        "beside": beside,
        "window": measure_window(),
        "seconds": round(time.perf_counter() - began),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS}; {result['seconds']} s")


# Models and data.


@dataclass(frozen=True)
class Material:
    """A trained model, its reference, and requests."""

    name: str
    window: int
    reference: Reference
    subject: Subject
    pixels: Pixels
    """Of requests that nothing was learnt from, for shifts to be made of."""
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    clean: Answers
    """What is logged of these requests without a shift."""
    stream: Answers | None = None
    """Further ones, for false alarms."""


def make_digits() -> Material:
    """Train on a third of the scans; take the reference of another; the last one is live."""
    from marwright.training.data import Split
    from marwright.training.sources import load_data

    data = load_data("digits")
    order = np.random.default_rng(0).permutation(len(data))
    train, rest = np.split(order, [DIGITS["train"]])
    known, live = np.split(rest, [DIGITS["reference"]])
    subject = train_model(data, Split(*map(to_tensor, (train[60:], train[:60], known))))
    pixels, labels = data.inputs.numpy(), data.labels.numpy()
    return Material(
        "digits",
        DIGITS["window"],
        subject.answer(pixels[known]).to_reference(),
        subject,
        pixels[live],
        labels[live],
        data.classes,
        subject.answer(pixels[live]),
    )


def make_shapes() -> Material:
    """Train on drawn shapes; draw as many others as the windows take."""
    from marwright.training.data import split_data
    from marwright.training.shapes import SHAPES as NAMES
    from marwright.training.shapes import draw_shapes
    from marwright.training.sources import load_data

    data = load_data("shapes")
    subject = train_model(data, split_data(data, seed=0))
    pool = SHAPES["clean"] + SHAPES["shifted"]
    count = SHAPES["reference"] + pool + WINDOWS * WINDOW
    images, labels = draw_shapes(count)
    # In any order: what is drawn in turns would have the same number of each class in each window.
    order = np.random.default_rng(7).permutation(count)
    pixels = np.ascontiguousarray(images[order].transpose(0, 3, 1, 2))
    known, live, rest = np.split(
        np.arange(count), [SHAPES["reference"], SHAPES["reference"] + pool]
    )
    return Material(
        "shapes",
        WINDOW,
        subject.answer(pixels[known]).to_reference(),
        subject,
        pixels[live],
        labels[order][live],
        NAMES,
        subject.answer(pixels[live]),
        subject.answer(pixels[known]) + subject.answer(pixels[rest]),
    )


def to_tensor(rows: Any) -> Any:
    """Return row numbers as torch takes them."""
    import torch

    return torch.from_numpy(np.sort(rows))


def train_model(data: Any, split: Any) -> Subject:
    """Train the demo's CNN."""
    from marwright.training.loop import Training
    from marwright.training.recipe import Recipe
    from marwright.training.settings import Settings
    from marwright.training.train import make_model, reproducible

    settings = Settings(epochs=EPOCHS[data.name])
    with reproducible(settings):
        model = make_model(data, split, Recipe(model="cnn"))
        train, validation = (
            (data.inputs[part], data.labels[part]) for part in (split.train, split.validation)
        )
        Training(model, train, validation, settings).run(lambda *_: None)
    return Subject(model.eval(), data.classes)


# Shifts.


def blur(width: float) -> Change:
    """Return a change that blurs each image."""
    return lambda pixels, _: np.asarray(
        ndimage.gaussian_filter(pixels.astype(np.float32), (0, 0, width, width)).round(), np.uint8
    )


def add_noise(deviation: float) -> Change:
    """Return a change that adds what a bad grey sensor does, in levels of 255."""

    def change(pixels: Pixels, random: np.random.Generator) -> Pixels:
        noise = random.normal(0, deviation, (len(pixels), 1, *pixels.shape[2:]))
        noisy = pixels + noise
        return np.asarray(noisy.round().clip(0, 255), np.uint8)

    return change


def invert(share: float) -> Change:
    """Return a change that inverts a share of the requests."""

    def change(pixels: Pixels, random: np.random.Generator) -> Pixels:
        chosen = random.random(len(pixels)) < share
        return np.where(chosen[:, None, None, None], 255 - pixels, pixels)

    return change


def rotate(degrees: float) -> Change:
    """Return a change that turns each image."""
    return lambda pixels, _: np.asarray(
        ndimage.rotate(pixels, degrees, axes=(3, 2), reshape=False, order=1, mode="nearest"),
        np.uint8,
    )


CHANGES: dict[str, dict[str, Change]] = {
    "blur": {"mild": blur(0.6), "strong": blur(1.5)},
    "noise": {"mild": add_noise(6), "strong": add_noise(30)},
    "inversion": {"mild": invert(0.1), "strong": invert(1.0)},
    "rotation": {"mild": rotate(10), "strong": rotate(45)},
}
SHARES = {"mild": {0: 0.5, 1: 0.5}, "strong": {0: 0.0, 1: 0.0, 2: 0.0}}
"""What is left of some classes where classes go missing."""


def list_shifts(material: Material) -> Iterator[tuple[str, str, Answers, Any, Any]]:
    """Yield each shift and level, the answers, and which requests they are of with their labels."""
    random = np.random.default_rng(1)
    everything = np.arange(len(material.labels))
    yield "none", "", material.clean, everything, material.labels
    for shift, levels in CHANGES.items():
        for level, change in levels.items():
            answers = material.subject.answer(change(material.pixels, random))
            yield shift, level, answers, everything, material.labels
    for level, left in SHARES.items():
        chance = np.array([left.get(int(label), 1.0) for label in material.labels])
        rows = np.flatnonzero(random.random(len(chance)) < chance)
        yield "missing classes", level, material.clean.take(rows), rows, material.labels[rows]


def measure_detection(material: Material) -> list[dict[str, Any]]:
    """Return, for each shift, how many shifted requests it took to be seen, and by what."""
    rows = []
    for shift, level, answers, numbers, labels in list_shifts(material):
        right = np.array(material.classes)[labels] == answers.prediction
        found = [
            detect(material, answers, numbers, np.random.default_rng(seed))
            for seed in range(REPEATS)
        ]
        delays = [delay for delay, _ in found if delay is not None]
        last = [drift for delay, drift in found if delay is not None]
        seen = Counter(f"{d.rows[0].subject} ({d.rows[0].test})" for d in last)
        rows.append(
            {
                "data": material.name,
                "shift": shift,
                "level": level,
                "window": material.window,
                "accuracy": round(float(right.mean()), 4),
                "found": len(delays),
                "of": REPEATS,
                "delay": statistics.median(delays) if delays else None,
                "longest": max(delays, default=None),
                "seen_by": dict(seen.most_common(3)),
                "before_it": sum(delay == 0 for delay in delays),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def detect(
    material: Material, shifted: Answers, numbers: Any, random: np.random.Generator
) -> tuple[int | None, Drift]:
    """Return after how many shifted requests the window is called shifted, and what was said.

    No request stands in the log twice, shifted or not.
    """
    before = random.permutation(len(material.clean))[: material.window]
    free = np.flatnonzero(~np.isin(numbers, before))
    after = shifted.take(random.permutation(free)[: LONGEST[material.name]])
    stream = (material.clean.take(before) + after).to_table()
    for asked in range(0, len(after) + 1, STEP[material.name]):
        table = stream.slice(asked, material.window)
        drift = compare(material.reference, table, error_rate=RATES[0], seed=asked)
        if drift.shifted:
            return asked, drift
    return None, drift


# No shift.


def measure_false_alarms(material: Material) -> list[dict[str, Any]]:
    """Return how many of WINDOWS windows without a shift were called shifted."""
    assert material.stream is not None  # shapes have one
    stream, size = material.stream, SHAPES["reference"]
    known = np.arange(size)
    rows: list[dict[str, Any]] = []
    random = np.random.default_rng(2)
    least: dict[str, list[float]] = {"one": [], "each its own": []}
    for number in range(WINDOWS):
        first = size + number * WINDOW
        own = np.arange(first, first + WINDOW)
        table = stream.take(own).to_table()
        others = np.delete(np.arange(len(stream)), own)
        references = {
            "one": stream.take(known).to_reference(),
            "each its own": stream.take(random.choice(others, size, replace=False)).to_reference(),
        }
        for name, reference in references.items():
            drift = compare(reference, table, error_rate=RATES[0], seed=number)
            least[name].append(drift.rows[0].p_corrected)
    for name, values in least.items():
        for rate in RATES:
            alarms = sum(value < rate for value in values)
            interval = stats.binomtest(alarms, WINDOWS).proportion_ci(0.95, "wilson")
            rows.append(
                {
                    "reference": name,
                    "windows": WINDOWS,
                    "error_rate": rate,
                    "alarms": alarms,
                    "rate": alarms / WINDOWS,
                    "low": round(float(interval.low), 4),
                    "high": round(float(interval.high), 4),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


# Beside frouros and scipy.


def make_venv() -> None:
    """Make frouros' environment."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    command = [str(VENV / "bin/pip"), "install", "--disable-pip-version-check", "--quiet", FROUROS]
    subprocess.run(command, check=True)


def compare_peers(digits: Material, shapes: Material) -> dict[str, Any]:
    """Return what ours, frouros and scipy say of the same windows, and in what time."""
    if not (VENV / "bin/python").exists():
        return {"missing": "frouros is not set up: make bench WHAT=drift ARGS=--setup"}
    pairs = list(list_pairs(digits, shapes))
    rows = {
        "marwright": [measure_ours(*pair[1:]) for pair in pairs],
        "scipy": [measure_scipy(*pair[1:]) for pair in pairs],
        "frouros": ask_frouros([pair[1:] for pair in pairs]),
    }
    shifted = [pair[0] for pair in pairs]
    for name, found in rows.items():
        print(f"{name}: {len(found)} windows", flush=True)
    return {
        "windows": {"no shift": shifted.count(False), "shifted": shifted.count(True)},
        "permutations": PERMUTATIONS,
        "rows": [
            summarise(test, name, found, rows["marwright"], shifted)
            for test in ("psi", "psi permuted", "ks", "chi_square", "mmd")
            for name, found in rows.items()
            if any(key.startswith(f"{test} ") or key == test for key in found[0])
        ],
    }


def list_pairs(digits: Material, shapes: Material) -> Iterator[tuple[bool, Answers, Answers]]:
    """Yield whether a window has shifted, its reference and the window."""
    assert shapes.stream is not None
    size = SHAPES["reference"]
    for number in range(QUIET):
        first = size + number * WINDOW
        window = shapes.stream.take(np.arange(first, first + WINDOW))
        yield False, shapes.stream.take(np.arange(WINDOW) + number * 75), window
    known = digits.reference
    parts = (known.prediction, known.confidence, known.embedding)
    reference = Answers(known.features, known.feature_names, *parts)
    for shift, _, answers, _, _ in list_shifts(digits):
        if shift != "none":
            yield True, reference, answers.take(np.arange(digits.window))


def time_it(run: Callable[[], Any]) -> dict[str, Any]:
    """Return a test's score, p-value and seconds."""
    began = time.perf_counter()
    score, p = run()[:2]
    return {"statistic": float(score), "p": float(p), "seconds": time.perf_counter() - began}


def measure_ours(reference: Answers, window: Answers) -> dict[str, Any]:
    """Return what marwright's tests say, without a correction."""
    rows = {}
    for column in range(reference.features.shape[1]):
        pair = reference.features[:, column], window.features[:, column]
        rows[f"psi {column}"] = time_it(lambda pair=pair: compute_psi(*pair))  # type: ignore[misc]
        rows[f"ks {column}"] = time_it(lambda pair=pair: test_ks(*pair))  # type: ignore[misc]
    classes = reference.prediction.tolist(), window.prediction.tolist()
    rows["chi_square"] = time_it(lambda: test_chi_square(*classes))
    points = reference.embedding[:WINDOW], window.embedding[:WINDOW]
    rows["mmd"] = time_it(lambda: test_mmd(*points, permutations=PERMUTATIONS, seed=0))
    return rows


def measure_scipy(reference: Answers, window: Answers) -> dict[str, Any]:
    """Return what scipy says with its defaults."""
    rows = {}
    for column in range(reference.features.shape[1]):
        pair = reference.features[:, column], window.features[:, column]
        rows[f"ks {column}"] = time_it(lambda pair=pair: stats.ks_2samp(*pair))  # type: ignore[misc]
    classes = sorted({*reference.prediction.tolist(), *window.prediction.tolist()})

    def test_classes() -> Any:
        parts = (reference.prediction, window.prediction)
        return stats.chi2_contingency([[(part == one).sum() for one in classes] for part in parts])

    rows["chi_square"] = time_it(test_classes)
    return rows


def ask_frouros(pairs: Sequence[tuple[Answers, Answers]]) -> list[dict[str, Any]]:
    """Return what frouros says, in an environment of its own."""
    arrays: dict[str, Any] = {"windows": len(pairs), "permutations": PERMUTATIONS}
    for number, pair in enumerate(pairs):
        points = np.concatenate([part.embedding[:WINDOW] for part in pair]).astype(np.float64)
        lengths = (points**2).sum(1)
        squares = lengths[:, None] + lengths - 2 * points @ points.T
        # The same kernel as ours.
        arrays[f"{number}.sigma"] = np.sqrt(np.median(squares[np.triu_indices(len(points), 1)]))
        for name, part in zip(("reference", "window"), pair, strict=True):
            arrays[f"{number}.{name}.features"] = part.features
            arrays[f"{number}.{name}.prediction"] = part.prediction
            arrays[f"{number}.{name}.embedding"] = part.embedding[:WINDOW]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "windows.npz"
        np.savez(path, **arrays)
        script = HERE / "contestants/frouros_windows.py"
        done = subprocess.run(
            [str(VENV / "bin/python"), str(script), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def summarise(
    test: str,
    name: str,
    found: Sequence[dict[str, Any]],
    ours: Sequence[dict[str, Any]],
    shifted: Sequence[bool],
) -> dict[str, Any]:
    """Return one row: decisions at 0.05 for each test alone, and how far it is from ours."""
    own = test.split()[0]
    alarms = checked = hits = 0
    apart, p_apart, ratios, agreed = [], [], [], []
    for window, mine, is_shifted in zip(found, ours, shifted, strict=True):
        keys = [key for key in window if key == test or key.startswith(f"{test} ")]
        keys = [key for key in keys if test != "psi" or "permuted" not in key]
        decisions = []
        for key in keys:
            other = mine[key.replace(test, own)]
            row = window[key]
            decisions.append(row["p"] < 0.05 if row["p"] is not None else row["statistic"] > RULE)
            agreed.append(decisions[-1] == (other["p"] < 0.05))
            apart.append(abs(row["statistic"] - other["statistic"]))
            if row["p"] is not None:
                p_apart.append(abs(row["p"] - other["p"]))
            ratios.append(row["seconds"] / other["seconds"])
        if is_shifted:
            hits += any(decisions)
        else:
            alarms, checked = alarms + sum(decisions), checked + len(decisions)
    return {
        "test": test,
        "by": name,
        "decides_by": "p < 0.05" if p_apart else f"PSI > {RULE}",
        "false_alarms": alarms,
        "comparisons": checked,
        "shifts_seen": hits,
        "shifts": sum(shifted),
        "agrees_with_ours": round(statistics.mean(agreed), 4),
        "statistic_apart": {"median": statistics.median(apart), "most": max(apart)},
        "p_apart": {"median": statistics.median(p_apart), "most": max(p_apart)}
        if p_apart
        else None,
        "times_ours": round(statistics.median(ratios), 2),
    }


# One large window.


def measure_window() -> dict[str, Any]:
    """Return seconds and bytes of a window of 10,000 rows by 64 features, in a fresh process.

    The bytes are what memory grew by at its peak, beside imports, the reference and the window
    itself as the log hands it over.
    """
    command = [sys.executable, str(Path(__file__)), "--measure-window"]
    texts = [
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for _ in range(3)
    ]
    found = [tuple(map(float, text.split())) for text in texts]
    return {
        "rows": BIG_ROWS,
        "features": BIG_FEATURES,
        "seconds": round(statistics.median(seconds for seconds, _ in found), 3),
        "bytes": int(max(size for _, size in found)),
    }


def measure_here() -> tuple[float, int]:
    """Return seconds and bytes of comparing one large window in this process."""
    random = np.random.default_rng(0)

    def draw(rows: int) -> Answers:
        logits = random.normal(size=(rows, 10)) * 3
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        names = tuple(f"column {number}" for number in range(BIG_FEATURES))
        features = random.normal(size=(rows, BIG_FEATURES))
        labels = np.array(list("0123456789"))[logits.argmax(1)]
        return Answers(features, names, labels, shares.max(1), logits)

    reference = draw(2000).to_reference()
    table = draw(BIG_ROWS).to_table()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = read_memory("VmRSS")
    began = time.perf_counter()
    drift = compare(reference, table, error_rate=RATES[0])
    seconds = time.perf_counter() - began
    assert len(drift.rows) == 2 * BIG_FEATURES + 4
    return round(seconds, 3), read_memory("VmHWM") - before


def read_memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main()
