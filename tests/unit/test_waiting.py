"""Requests that wait: a wake-up ends the wait, and a lost one costs a second."""

import asyncio
import json

from fabric.ports import Delivery
from fabric.presenting import Document
from fabric.waiting import Waiters
from topology.names import CommandId
from topology.wire import Message

ID = CommandId("0199c0de-0000-7000-8000-000000000001")
RUNNING: Document = {"id": ID, "state": "running", "timeline": []}
DONE: Document = {"id": ID, "state": "succeeded", "timeline": []}


class Ledger:
    """Counts its readers; `document` is what it holds."""

    def __init__(self, document: Document | None) -> None:
        self.document, self.reads = document, 0

    async def read(self, _: CommandId) -> Document | None:
        self.reads += 1
        return self.document


def delivery(body: bytes, acks: list[bytes]) -> Delivery:
    async def ack() -> None:
        acks.append(body)

    return Delivery(Message("wake", body=body), "wake", "", redelivered=False, ack=ack)


async def test_a_wake_up_brings_the_document_and_nothing_is_read() -> None:
    ledger, acks = Ledger(RUNNING), list[bytes]()
    waiters = Waiters(ledger.read)
    with waiters.register(ID) as waiter:
        waiting = asyncio.create_task(waiter.settled(10))
        await asyncio.sleep(0)
        await waiters.on_delivery(delivery(json.dumps(DONE).encode(), acks))
        assert await waiting == DONE
    assert ledger.reads == 0
    assert len(acks) == 1


async def test_a_wake_up_without_a_document_makes_the_waiter_look() -> None:
    ledger, acks = Ledger(DONE), list[bytes]()
    waiters = Waiters(ledger.read)
    with waiters.register(ID) as waiter:
        waiting = asyncio.create_task(waiter.settled(10))
        await asyncio.sleep(0)
        await waiters.on_delivery(delivery(json.dumps({"id": ID, "state": "succeeded"}).encode(), acks))
        assert await waiting == DONE
    assert ledger.reads == 1


async def test_without_a_wake_up_the_ledger_is_looked_at_all_the_same() -> None:
    ledger = Ledger(DONE)
    with Waiters(ledger.read).register(ID) as waiter:
        assert await waiter.settled(10) == DONE


async def test_when_the_time_is_up_the_command_is_shown_as_it_is() -> None:
    with Waiters(Ledger(RUNNING).read).register(ID) as waiter:
        assert await waiter.settled(0.05) == RUNNING


async def test_every_wake_up_is_acked_whatever_is_in_it() -> None:
    acks = list[bytes]()
    waiters = Waiters(Ledger(None).read)
    bodies = [b"", b"\xff", b"[]", b"{}", b'{"id": 1}', json.dumps(DONE).encode(), b"null", b'"x"']
    for body in bodies:
        await waiters.on_delivery(delivery(body, acks))
    assert acks == bodies, "a wake-up that is not acked would use up the prefetch"
