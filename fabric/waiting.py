"""Requests that wait for a command to settle, and the wake-ups that end their wait.

A wake-up is a hint: it may be lost with its exchange's transient queue, so every waiter also looks for
itself once a second. The ledger is what is believed.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fabric.command import SETTLED, Command
from fabric.errors import Temporary
from fabric.model import TimelineRow
from fabric.ports import Delivery, Publisher
from topology import names
from topology.names import CommandId
from topology.wire import JSON, Message

LOOK_EVERY = 1.0  # seconds: how late a lost wake-up can make an answer

Record = tuple[Command, list[TimelineRow]]


class Waiters:
    """The commands that requests of this process wait for."""

    def __init__(self, read: Callable[[CommandId], Awaitable[Record | None]]) -> None:
        self._read = read
        self._events: defaultdict[CommandId, set[asyncio.Event]] = defaultdict(set)

    def wake(self, command: CommandId) -> None:
        for event in self._events.get(command, ()):
            event.set()

    async def on_delivery(self, delivery: Delivery) -> None:
        """Handle a message of the `wake` exchange; one that can't be read only costs a second's wait."""
        with suppress(ValueError, TypeError, KeyError):
            self.wake(CommandId(json.loads(delivery.message.body)["id"]))

    def register(self, command: CommandId) -> "Waiter":
        """Start to listen. To be called before the mail is published, or the wake-up may be missed."""
        event = asyncio.Event()
        self._events[command].add(event)
        return Waiter(self, command, event)

    def forget(self, command: CommandId, event: asyncio.Event) -> None:
        waiting = self._events.get(command)
        if waiting is not None:
            waiting.discard(event)
            if not waiting:
                del self._events[command]

    async def read(self, command: CommandId) -> Record | None:
        return await self._read(command)


class Waiter:
    """One request's wait; a context manager, so that it is forgotten whatever happens."""

    def __init__(self, waiters: Waiters, command: CommandId, event: asyncio.Event) -> None:
        self._waiters, self._command, self._event = waiters, command, event

    def __enter__(self) -> "Waiter":
        return self

    def __exit__(self, *_: object) -> None:
        self._waiters.forget(self._command, self._event)

    async def settled(self, seconds: float) -> Record | None:
        """The command once it is settled, or as it is when the time is up; None when it is unknown."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            remaining = end - loop.time()
            if remaining > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining, LOOK_EVERY)):
                        await self._event.wait()
            self._event.clear()
            found = await self._waiters.read(self._command)
            if found is None or found[0].state in SETTLED or loop.time() >= end:
                return found


async def announce(publisher: Publisher, command: Command) -> None:
    """Tell every gateway that a command has settled. Without a broker they find out by looking."""
    body = json.dumps({"id": command.id, "state": command.state}).encode()
    with suppress(Temporary):
        await publisher.send(names.WAKE, "", Message("wake", {}, body, JSON, persistent=False))
