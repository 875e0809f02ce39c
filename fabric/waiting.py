"""Requests that wait for a command to settle, and the wake-ups that end their wait.

A wake-up carries the settled command's document, as the ledger committed it, so that nobody has to read it
again. It may be lost with its exchange's transient queue: every waiter also looks for itself once a second.
"""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol

from fabric import presenting
from fabric.command import SETTLED, Command
from fabric.errors import Temporary
from fabric.model import TimelineRow
from fabric.ports import Delivery, Publisher
from fabric.presenting import Document
from topology import names
from topology.names import CommandId
from topology.wire import JSON, Message


class Right(Protocol):
    """What lets somebody wait."""

    async def check(self) -> object:
        """Raises when it is lost."""
        ...

    def watched(self, lost: Callable[[], None]) -> AbstractAsyncContextManager[object]:
        """Within it, `lost` is called at once when the right is taken away; a `check` then raises. Raises on entering
        when it was lost meanwhile."""
        ...


LOOK_EVERY = 1.0  # seconds: how late a lost wake-up can make an answer
LARGEST = 64 * 1024  # bytes of a document in a wake-up; a larger one is read from the ledger


class Waiters:
    """The commands that requests of this process wait for. `read` gives a command's document from the ledger."""

    def __init__(self, read: Callable[[CommandId], Awaitable[Document | None]]) -> None:
        self._read = read
        self._waiting: defaultdict[CommandId, set[Waiter]] = defaultdict(set)
        self.latest = math.inf  # when every wait ends, on the event loop's clock

    def end(self, within: float) -> None:
        """Let nobody wait longer than so many seconds from now (or a look later): the process is about to end."""
        self.latest = asyncio.get_running_loop().time() + within

    @property
    def open(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    async def on_delivery(self, delivery: Delivery) -> None:
        """Handle a message of the `wake` exchange; one that can't be read only costs a second's wait."""
        with suppress(ValueError, TypeError, KeyError):
            document = json.loads(delivery.message.body)
            for waiter in self._waiting.get(CommandId(document["id"]), ()):
                waiter.wake(document if "timeline" in document else None)
        await delivery.ack()

    def register(self, command: CommandId) -> "Waiter":
        """Start to listen. To be called before the mail is published, or the wake-up may be missed."""
        waiter = Waiter(self, command)
        self._waiting[command].add(waiter)
        return waiter

    def forget(self, command: CommandId, waiter: "Waiter") -> None:
        waiting = self._waiting.get(command)
        if waiting is not None:
            waiting.discard(waiter)
            if not waiting:
                del self._waiting[command]

    async def read(self, command: CommandId) -> Document | None:
        return await self._read(command)


class Waiter:
    """One request's wait; a context manager, so that it is forgotten whatever happens."""

    def __init__(self, waiters: Waiters, command: CommandId) -> None:
        self._waiters, self._command = waiters, command
        self._event = asyncio.Event()
        self._document: Document | None = None

    def __enter__(self) -> "Waiter":
        return self

    def __exit__(self, *_: object) -> None:
        self._waiters.forget(self._command, self)

    def wake(self, document: Document | None) -> None:
        self._document = document
        self._event.set()

    async def settled(self, seconds: float, right: Right | None = None) -> Document | None:
        """The command once it is settled, or as it is when the time is up; None when it is unknown.

        Raises what the `check` of `right` does, which is asked at each look.
        """
        if right is None:
            return await self._settled(seconds, None)
        async with right.watched(self._event.set):
            return await self._settled(seconds, right)

    async def _settled(self, seconds: float, right: Right | None) -> Document | None:
        loop = asyncio.get_running_loop()
        wanted = loop.time() + seconds
        while True:
            end = min(wanted, self._waiters.latest)
            remaining = end - loop.time()
            if remaining > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining, LOOK_EVERY)):
                        await self._event.wait()
            if self._document is not None:
                return self._document
            self._event.clear()
            if right is not None:
                await right.check()
            found = await self._waiters.read(self._command)
            if found is None or is_settled(found) or loop.time() >= end:
                return found


def is_settled(document: Document) -> bool:
    return document["state"] in SETTLED


async def announce(publisher: Publisher, command: Command, timeline: Sequence[TimelineRow] = ()) -> None:
    """Tell every gateway that a command has settled. Without a broker they find out by looking."""
    body = json.dumps(presenting.command(command, timeline), separators=(",", ":")).encode() if timeline else b""
    if not 0 < len(body) <= LARGEST:
        body = json.dumps({"id": command.id, "state": command.state}).encode()
    with suppress(Temporary):
        await publisher.send(names.WAKE, "", Message("wake", {}, body, JSON, persistent=False))
