"""A back-end service on the fabric's Python API: what stands behind `POST …/commands`, without HTTP."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager

from api.operator import rings, wiring
from api.operator.stack import Stack
from fabric import presenting
from fabric.amqp.consumer import wake_consumer
from fabric.commands import Commands, Request
from fabric.mail import Postman
from fabric.presenting import Document
from fabric.sql import Store, open_store
from fabric.waiting import Waiters
from topology import access, wire
from topology.names import CommandId, DeviceId


class Tasks:
    """Publishes that go on when the call has returned."""

    def __init__(self) -> None:
        self._open: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return task

    async def drain(self) -> None:
        await asyncio.gather(*self._open)


def commands(stack: Stack, store: Store, broker: wiring.Broker, waiters: Waiters, tasks: Tasks) -> Commands:
    """The domain's own object, put together as the gateway does it."""
    return Commands(
        store.ledger,
        store.registry,
        broker.publisher,
        Postman(store.ledger, broker.publisher, store.clock),
        waiters,
        store.clock,
        rings.open_keys(stack.files.command_keys, store.clock.now),
        stack.settings.backlog,
        tasks.start,
    )


class Service:
    """Sends commands and waits for them."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def command(self, device: str) -> None:
        """One that does nothing, to its outcome."""
        request = Request(DeviceId(device), "noop", b"{}", wire.JSON, "bench")
        done = await self._commands.submit(request, wait=20.0)
        if done["state"] != "succeeded":
            raise RuntimeError(f"a command is {done['state']}: {done}")


@asynccontextmanager
async def service(stack: Stack) -> AsyncIterator[Service]:
    """One that is connected, with a ledger of its own on the stack's database."""
    async with AsyncExitStack() as cleanup:
        store = await open_store(stack.settings.database)
        cleanup.push_async_callback(store.close)
        broker = wiring.broker(stack.settings, access.GATEWAY)
        await broker.start()
        cleanup.push_async_callback(broker.stop)

        async def read(id: CommandId) -> Document | None:
            found = await store.ledger.command(id)
            return None if found is None else presenting.command(*found)

        waiters = Waiters(read)
        wakes = wake_consumer(broker.consuming, waiters.on_delivery)
        await wakes.start()
        cleanup.push_async_callback(wakes.stop)
        await wakes.consuming.wait()
        tasks = Tasks()
        cleanup.push_async_callback(tasks.drain)
        yield Service(commands(stack, store, broker, waiters, tasks))
