"""A reader of `GET /v1/events`, block by block."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from api.operator.following import Block, blocks
from tests.harness.stack import RunningStack

Document = dict[str, Any]


@dataclass
class Following:
    """One answer; `last` is the id that was read last."""

    answer: httpx.Response
    _blocks: Iterator[Block]
    last: str = ""

    def block(self) -> Block:
        """The next block; fails when the answer ends, or when nothing comes for the client's read time-out."""
        block = next(self._blocks)
        self.last = block.id or self.last
        return block

    def event(self) -> Document:
        """The next event; what is told besides is left out."""
        while True:
            block = self.block()
            if block.data and block.event not in ("gap", "lagging", "reset", "problem"):
                document: Document = json.loads(block.data)
                assert (block.id, block.event) == (str(document["position"]), document["kind"])
                return document

    def until(self, wanted: Callable[[Document], bool]) -> list[Document]:
        """The events up to the one that is wanted."""
        found: list[Document] = []
        while not found or not wanted(found[-1]):
            found.append(self.event())
        return found


@contextmanager
def following(
    running: RunningStack, last: str | None = None, *, token: str | None = None, **query: object
) -> Iterator[Following]:
    """Follow the events; the first block, which says where it begins, is read already."""
    headers = {} if last is None else {"Last-Event-ID": last}
    with (
        running.client(token or running.token) as client,
        client.stream("GET", "/v1/events", params=query, headers=headers, timeout=30) as answer,  # type: ignore[arg-type]
    ):
        assert answer.status_code == 200, answer.read()
        read = Following(answer, blocks(answer.iter_lines()))
        read.block()
        yield read


def of(command: str, kind: str) -> Callable[[Document], bool]:
    """Is it the event of this kind of this command?"""
    return lambda event: event["kind"] == kind and event["command"] is not None and event["command"]["id"] == command
