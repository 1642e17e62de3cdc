"""`marwright demo`: the whole way once, on real scans and a real TorchServe."""

from __future__ import annotations

import io
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import make_progress, print_json, print_table, say
from marwright.cli.train import train_with_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from marwright.archive import Packed, Run
    from marwright.client import Client
    from marwright.server import TorchServe

__all__ = ["run_demo"]

NAME = "cnn"
EPOCHS = {"1.0": 15, "2.0": 20}
"""The second version learns longer on the same split."""
SWITCHES = ["1.0", "2.0", "1.0"]
"""Which version is to answer before, after, and back."""
TOLERANCE = 1e-4
"""Between a served probability and the same one computed in this process."""


@dataclass(frozen=True)
class Served:
    """What a series of requests gave."""

    requests: int
    labels: tuple[str, ...]
    """The most probable label of each answer."""
    probabilities: tuple[float, ...]
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Expected:
    """What one version answers to the same scans in this process."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    def matches(self, served: Served) -> bool:
        """Whether every answer has this version's label and probability."""
        pairs = zip(self.probabilities, served.probabilities, strict=True)
        return self.labels == served.labels and all(abs(a - b) <= TOLERANCE for a, b in pairs)


@dataclass(frozen=True)
class Outcome:
    """The demo's result; `--json` prints it."""

    test_accuracy: dict[str, float]
    archives: list[dict[str, object]]
    seconds_to_ready: float
    requests_sent: int
    requests_answered: int
    served_accuracy: float
    in_process_accuracy: float
    p50_ms: float
    p99_ms: float
    version_switch: list[str]
    train_seconds: float
    total_seconds: float


def run_demo(
    out: Annotated[Path, typer.Option(help="Folder for the two runs; replaced.")] = Path(
        "runs/demo"
    ),
    store: Annotated[Path, typer.Option(help="Folder for the two archives; replaced.")] = Path(
        "model_store"
    ),
    as_json: Json = False,
) -> None:
    """Go the whole way once, on real scans.

    Trains, packs, serves, predicts and switches versions on a real TorchServe, and leaves nothing
    running.
    """
    from marwright.archive import pack_run
    from marwright.server import TorchServe

    started = time.perf_counter()
    say("[1/5] train: two versions of the CNN on 1,797 scanned digits")
    runs = _train(out)
    say("[2/5] pack")
    packed = {
        version: pack_run(run, out=store / file, name=NAME, version=version, force=True)
        for (version, run), file in zip(
            runs.items(), (f"{NAME}.mar", f"{NAME}-2.0.mar"), strict=True
        )
    }
    scans, truth = _load_test_scans(runs["1.0"])
    expected = {version: _predict_here(run, scans) for version, run in runs.items()}
    say(f"[3/5] serve: TorchServe with {packed['1.0'].path.name}")
    with TorchServe(store, models=[packed["1.0"].path.name]) as server:
        say(f"      READY after {server.ready_seconds:.1f} s; [4/5] predict: {len(scans)} scans")
        served = _ask(server.client, scans, title="predict")
        say("[5/5] switch versions: 1.0 -> 2.0 -> 1.0")
        switched = _switch(server, packed["2.0"].path, scans[:20], expected)
    outcome = Outcome(
        test_accuracy={version: run.report["accuracy"] for version, run in runs.items()},
        archives=[item.to_json() for item in packed.values()],
        seconds_to_ready=round(server.ready_seconds, 2),
        requests_sent=len(scans),
        requests_answered=served.requests,
        served_accuracy=_share_equal(served.labels, truth),
        in_process_accuracy=_share_equal(expected["1.0"].labels, truth),
        p50_ms=served.p50_ms,
        p99_ms=served.p99_ms,
        version_switch=switched,
        train_seconds=round(sum(run.report["train_seconds"] for run in runs.values()), 1),
        total_seconds=round(time.perf_counter() - started, 1),
    )
    _print_outcome(outcome, list(packed.values()), as_json=as_json)
    if not expected["1.0"].matches(served) or switched != SWITCHES:
        say("error: the server's answers are not those of the models in this process")
        raise typer.Exit(1)


def _train(out: Path) -> dict[str, Run]:
    from marwright.training.settings import Settings

    return {
        version: train_with_bar(
            out / version, f"  {NAME} {version}", Settings(epochs=epochs), force=True
        )
        for version, epochs in EPOCHS.items()
    }


def _load_test_scans(run: Run) -> tuple[list[Image], tuple[str, ...]]:
    """Return the test part that this run did not learn from, with its true labels."""
    from marwright.training.data import split_data
    from marwright.training.sources import load_data

    data = load_data(run.config["dataset"])
    assert data.open_sample is not None  # digits are images
    test = split_data(data, seed=run.config["seed"]).test.tolist()
    labels = tuple(data.classes[int(data.labels[index])] for index in test)
    return [data.open_sample(index) for index in test], labels


def _predict_here(run: Run, scans: list[Image]) -> Expected:
    from marwright.training.predict import predict_images

    best = predict_images(run.model_path, scans, run.image_size).max(dim=1)
    return Expected(
        labels=tuple(run.classes[index] for index in best.indices.tolist()),
        probabilities=tuple(best.values.tolist()),
    )


def _ask(client: Client, scans: list[Image], *, title: str) -> Served:
    """Send each scan as PNG, one after the other."""
    labels, probabilities, seconds = [], [], []
    with make_progress() as bar:
        for scan in bar.track(_encode(scans), description=f"  {title}"):
            answer = client.predict(NAME, scan)
            label, probability = next(iter(answer.json().items()))
            labels.append(label)
            probabilities.append(probability)
            seconds.append(answer.seconds)
    ranks = statistics.quantiles(seconds, n=100, method="inclusive")
    return Served(
        requests=len(labels),
        labels=tuple(labels),
        probabilities=tuple(probabilities),
        p50_ms=round(ranks[49] * 1000, 2),
        p99_ms=round(ranks[98] * 1000, 2),
    )


def _encode(scans: list[Image]) -> list[bytes]:
    bodies = []
    for scan in scans:
        buffer = io.BytesIO()
        scan.save(buffer, format="PNG")
        bodies.append(buffer.getvalue())
    return bodies


def _switch(
    server: TorchServe, archive: Path, scans: list[Image], expected: dict[str, Expected]
) -> list[str]:
    """Register 2.0, make it the default, go back; return which version's answers came each time."""
    from marwright.server import register

    client = server.client
    first = {
        version: Expected(item.labels[: len(scans)], item.probabilities[: len(scans)])
        for version, item in expected.items()
    }

    def identify() -> str:
        answers = _ask(client, scans, title="default version")
        return next((name for name, item in first.items() if item.matches(answers)), "neither")

    register(client, archive)
    seen = [identify()]
    for version in ("2.0", "1.0"):
        client.models.set_default(NAME, version)
        seen.append(identify())
    return seen


def _share_equal(labels: tuple[str, ...], truth: tuple[str, ...]) -> float:
    return statistics.fmean(a == b for a, b in zip(labels, truth, strict=True))


def _print_outcome(outcome: Outcome, packed: list[Packed], *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(outcome))
        return
    accuracy = ", ".join(f"{name}: {value:.4f}" for name, value in outcome.test_accuracy.items())
    equal = "equal" if outcome.served_accuracy == outcome.in_process_accuracy else "NOT equal"
    followed = "followed" if outcome.version_switch == SWITCHES else "did NOT follow"
    rows: list[tuple[str, str]] = [("test accuracy", accuracy)]
    for item in packed:
        rows.append((f"archive {item.version}", f"{item.path}, {item.size_bytes:,} bytes"))
        rows.append(("", f"sha256 {item.sha256}"))
    rows += [
        ("seconds to READY", f"{outcome.seconds_to_ready:.2f}"),
        ("requests answered", f"{outcome.requests_answered} of {outcome.requests_sent}"),
        (
            "accuracy",
            f"served {outcome.served_accuracy:.4f}, in process "
            f"{outcome.in_process_accuracy:.4f} ({equal})",
        ),
        ("request p50, p99", f"{outcome.p50_ms} ms, {outcome.p99_ms} ms"),
        ("version switch", " -> ".join(outcome.version_switch) + f", answers {followed}"),
        (
            "seconds",
            f"{outcome.total_seconds} in all, {outcome.train_seconds} of them training",
        ),
    ]
    print_table(["marwright demo", ""], rows)
