"""Flower's strategies, with the answers checked first and what was refused remembered."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from numpy.typing import NDArray

from marwright.errors import RunError

from .federation import FEWEST_ANSWERS, Federation
from .screen import Answer, screen_answers

__all__ = ["make_strategy", "Record", "Screened"]

POLL_SECONDS = 0.5


@dataclass
class Record:
    """What came of one client's answers."""

    items: int = 0
    """How many it said it has trained on."""
    asked: int = 0
    """In how many rounds."""
    answered: list[int] = field(default_factory=list)
    """Rounds whose answer was averaged."""
    refused: dict[int, str] = field(default_factory=dict)
    """Rounds whose answer was not, with the reason."""
    failed: dict[int, str] = field(default_factory=dict)
    """Rounds in which it told of an error."""
    epsilon: float = 0.0

    @property
    def silent(self) -> int:
        """In how many rounds it did not answer in time."""
        return self.asked - len(self.answered) - len(self.refused) - len(self.failed)


class Screened(Strategy):
    """A strategy of Flower's that averages what passes the checks.

    A round with fewer than two such answers leaves the weights as they are.
    """

    def __init__(self, inner: FedAvg, federation: Federation, *, screen: bool = True) -> None:
        self.inner = inner
        self.federation = federation
        self.screen = screen
        """Off only to show what the checks are for."""
        self.records: dict[int, Record] = {}
        self.losses: dict[int, float] = {}
        """The clients' mean loss by round, weighted by items; none where they are private."""
        self._reference: Mapping[str, NDArray[np.generic]] = {}

    def summary(self) -> None:
        """Log what Flower logs."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client that is there.

        Raises:
            RunError: fewer than two are, until the time is up.
        """
        wanted = self.federation.clients if server_round == 1 else FEWEST_ANSWERS
        nodes = _await_nodes(grid, wanted, self.federation.timeout)
        for node in nodes:
            self.records.setdefault(node, Record()).asked += 1
        self._reference = {name: array.numpy() for name, array in arrays.items()}
        messages: Iterable[Message] = self.inner.configure_train(server_round, arrays, config, grid)
        return sorted(messages, key=lambda message: message.metadata.dst_node_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what passes, in one order: sums of floats depend on it."""
        sound = self._sort_out(server_round, replies)
        if len(sound) < FEWEST_ANSWERS:
            return None, None
        arrays, metrics = self.inner.aggregate_train(server_round, sound)
        if "train-loss" in metrics:
            self.losses[server_round] = float(metrics["train-loss"])
        # Averages are float64 where the counts of BatchNorm are whole numbers.
        averaged = {
            name: Array(array.numpy().astype(self._reference[name].dtype))
            for name, array in arrays.items()
        }
        return ArrayRecord(averaged), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server measures on its own validation part."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, as nobody was asked."""
        return None

    def _sort_out(self, number: int, replies: Iterable[Message]) -> list[Message]:
        """Return the messages that may be averaged, and remember the others."""
        answers: dict[int, Answer] = {}
        messages: dict[int, Message] = {}
        for message in sorted(replies, key=lambda message: message.metadata.src_node_id):
            node = message.metadata.src_node_id
            if node not in self.records:
                continue  # Flower's own word that a client is gone; it stays without an answer
            record = self.records[node]
            if message.has_error():
                record.failed[number] = _quote(str(message.error.reason))
                continue
            try:
                answers[node] = _read_answer(message, private=self.federation.is_private)
                messages[node] = message
                # Spent, whether or not the answer is averaged.
                record.epsilon = float(message.content["metrics"].get("epsilon", 0.0))
            except (AttributeError, KeyError, TypeError, ValueError, EOFError) as exc:
                record.refused[number] = f"cannot be read: {_quote(str(exc))}"
        refused = screen_answers(self._reference, answers) if self.screen else {}
        for node in list(messages):
            record = self.records[node]
            if node in refused:
                record.refused[number] = refused[node]
                del messages[node]
                continue
            record.answered.append(number)
            record.items = int(answers[node].items)
        return list(messages.values())


def make_strategy(federation: Federation, *, screen: bool = True) -> Screened:
    """Return what a federation averages by."""
    if federation.strategy == "fedprox":
        inner = FedProx(proximal_mu=federation.proximal_mu, min_train_nodes=FEWEST_ANSWERS)
    else:
        inner = FedAvg(min_train_nodes=FEWEST_ANSWERS)
    return Screened(inner, federation, screen=screen)


def _await_nodes(grid: Grid, wanted: int, timeout: float) -> list[int]:
    """Wait for so many clients; go on with fewer once the time is up."""
    deadline = time.monotonic() + timeout
    nodes = list(grid.get_node_ids())
    while len(nodes) < wanted and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        nodes = list(grid.get_node_ids())
    if len(nodes) < FEWEST_ANSWERS:
        raise RunError(
            "there are too few clients to go on",
            expected=f"at least {FEWEST_ANSWERS}",
            found=f"{len(nodes)} after {timeout:g} s",
            remedy="see whether their flower-supernode processes still run",
        )
    return nodes


def _read_answer(message: Message, *, private: bool) -> Answer:
    """Return a reply's arrays and items; nothing of it is a pickle."""
    content = message.content
    if set(content) != {"arrays", "metrics"}:
        raise ValueError(f"records {', '.join(sorted(content))}, not arrays and metrics")
    metrics = content["metrics"]
    if set(metrics) != {"num-examples", "epsilon" if private else "train-loss"}:
        raise ValueError(f"metrics {', '.join(sorted(metrics))}")
    if any(not np.isfinite(value) for value in metrics.values()):
        raise ValueError("metrics that are not finite")
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    return Answer(arrays, float(metrics["num-examples"]))


def _quote(reason: str) -> str:
    """Return the line that says it: of a traceback, the last."""
    lines = [line.strip() for line in reason.strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("marwright.errors.")[:200] if lines else "no reason"
