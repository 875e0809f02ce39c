"""What tests do behind the gateway's back: with the service accounts' passwords, or in the database."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pika

from device_agent.link import to_properties
from fabric import presenting
from fabric.command import Command
from fabric.mail import to_wire
from fabric.sql import open_store
from tests.harness.stack import Document, RunningStack
from topology import access, names, wire
from topology.names import CommandId


@contextmanager
def channel(running: RunningStack) -> Iterator[Any]:
    """A channel of the worker's account."""
    broker = running.stack.broker
    assert broker is not None
    credentials = pika.PlainCredentials(access.WORKER, broker.password(access.WORKER))
    place = pika.ConnectionParameters("127.0.0.1", broker.amqp_port, names.VHOST, credentials)
    with pika.BlockingConnection(place) as connection:
        yield connection.channel()


def depth(running: RunningStack, queue: str) -> int:
    """The ready messages of a queue."""
    with channel(running) as opened:
        found: int = opened.queue_declare(queue, passive=True).method.message_count
        return found


def publish_copy(running: RunningStack, id: str) -> None:
    """Put another attempt of a command into its mailbox, whatever its state; the ledger knows nothing of it."""
    command = asyncio.run(_command(running, id))
    copy = wire.encode_command(to_wire(replace(command, attempt=command.attempt + 1)), command.accepted_at // 1000)
    with channel(running) as opened:
        opened.confirm_delivery()
        opened.basic_publish(names.MAIL, command.device, copy.body, to_properties(copy), mandatory=True)


def documents(running: RunningStack, ids: Sequence[str]) -> list[Document]:
    """The commands as `GET /v1/commands/{id}` shows them, read from the ledger: thousands in a moment."""

    async def read() -> list[Document]:
        store = await open_store(running.stack.settings.database)
        try:
            found = [await store.ledger.command(CommandId(id)) for id in ids]
            return [json.loads(json.dumps(presenting.command(*it))) for it in found if it is not None]
        finally:
            await store.close()

    return asyncio.run(read())


def events(running: RunningStack, device: str, *kinds: str) -> list[Any]:
    """The events of these kinds that the log has about a device, in order."""

    async def read() -> list[Any]:
        store = await open_store(running.stack.settings.database)
        try:
            found, after = [], 0
            while rows := await store.ledger.events(after, 1_000):
                found += [row for row in rows if row.device == device and row.kind in kinds]
                after = rows[-1].position
            return found
        finally:
            await store.close()

    return asyncio.run(read())


def management(running: RunningStack, method: str, path: str, body: Document | None = None) -> httpx.Response:
    """A call of the broker's management API, as its administrator."""
    broker = running.stack.broker
    assert broker is not None
    url = f"http://127.0.0.1:{broker.management_port}/api{path}"
    auth = (access.ADMIN, broker.password(access.ADMIN))
    answer = httpx.request(method, url, auth=auth, json=body, timeout=10)
    assert answer.is_success, answer.text
    return answer


def close_connections(running: RunningStack, username: str) -> None:
    management(running, "DELETE", f"/connections/username/{username}")


async def _command(running: RunningStack, id: str) -> Command:
    store = await open_store(running.stack.settings.database)
    try:
        found = await store.ledger.command(CommandId(id))
        assert found is not None
        return found[0]
    finally:
        await store.close()
