"""A federation on one machine, in one process: Flower's own apps without its network.

The grid below hands each message to the client app in turn, as Flower's runtime would from machine
to machine; so a trial needs no ports, no cluster and no other process, and one seed gives one
result.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from .faults import spoil_answer
from .plan import Plan

__all__ = ["LocalGrid"]

RUN = 1
SERVER = 1
FIRST = 2
"""The node that client 0 is."""
CRASHED = 2
"""Flower's code of a client app that raised."""


class LocalGrid(Grid):
    """Clients in this process, each a node; the faults of a trial are made here."""

    def __init__(self, app: ClientApp, plan: Plan) -> None:
        self.app = app
        self.federation = plan.federation
        self.contexts = {
            number + FIRST: Context(
                run_id=RUN,
                node_id=number + FIRST,
                node_config={"partition-id": number},
                state=RecordDict(),
                run_config=plan.write(),
            )
            for number in range(plan.federation.clients)
        }
        self.replies: dict[str, Message] = {}
        # Flower's runtime tells each process who it is, and a Message asks for it. The name is
        # Flower's own business, so the extra keeps to one minor version.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = SERVER, RUN, SERVER

    @property
    def run(self) -> Any:
        """Nothing: there is no run of Flower's."""
        raise NotImplementedError("a local grid has no run")

    def set_run(self, run: Any) -> None:
        """Do nothing, for the same reason."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all: one that has dropped out is not known to be gone."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients work; the replies wait under the returned names."""
        names = []
        for message in messages:
            name = f"{len(self.replies)}-{message.metadata.dst_node_id}"
            names.append(name)
            reply = self._ask(message)
            if reply is not None:
                self.replies[name] = reply
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that there are, once."""
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies of those that answer; for the others nobody waits."""
        return self.pull_messages(self.push_messages(messages))

    def _ask(self, message: Message) -> Message | None:
        client = message.metadata.dst_node_id - FIRST
        number = int(message.content["config"]["server-round"])
        if client in self.federation.drop_out and number > 1:
            return None
        try:
            reply = self.app(message, self.contexts[client + FIRST])
        except Exception:  # whatever a client app raises is its answer, as in Flower's runtime
            return Message(Error(CRASHED, traceback.format_exc()), reply_to=message)
        if client in self.federation.garbage:
            return spoil_answer(reply, message, number)
        return reply
