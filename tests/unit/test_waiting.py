"""Requests that wait: a wake-up ends the wait, and a lost one costs a second."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from fabric.errors import Unauthenticated
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


class Right:
    """Holds for so many checks."""

    def __init__(self, good_for: int) -> None:
        self.good_for, self.checks, self.left = good_for, 0, False
        self.entered = asyncio.Event()

    async def check(self) -> None:
        self.checks += 1
        if self.checks > self.good_for:
            raise Unauthenticated("the token was revoked")

    @asynccontextmanager
    async def watched(self, lost: Callable[[], None]) -> AsyncIterator[None]:
        self.lost = lost
        self.entered.set()
        try:
            yield
        finally:
            self.left = True


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


async def test_a_wait_ends_when_the_right_to_wait_is_lost() -> None:
    ledger, right = Ledger(RUNNING), Right(good_for=1)
    with Waiters(ledger.read).register(ID) as waiter, pytest.raises(Unauthenticated):
        await waiter.settled(10, right)
    assert (right.checks, ledger.reads) == (2, 1), "a look came before the question"


async def test_a_wait_ends_at_once_when_the_right_to_wait_is_taken_away() -> None:
    right = Right(good_for=0)
    with Waiters(Ledger(RUNNING).read).register(ID) as waiter:
        waiting = asyncio.create_task(waiter.settled(60, right))
        await right.entered.wait()
        right.lost()
        for _ in range(10):  # turns of the loop, in which no second passes
            await asyncio.sleep(0)
        assert waiting.done()
        with pytest.raises(Unauthenticated):
            await waiting
    assert right.left
