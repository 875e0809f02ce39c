"""Reading streams: from where, and on from where after a loss."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from fabric.amqp.connection import QueueMissing
from fabric.amqp.publisher import AmqpPublisher
from fabric.amqp.streams import PREFETCH, AmqpStreamReader
from fabric.errors import BrokerUnavailable
from fabric.ports import Delivery
from tests.harness.broker import Broker, evaluate, eventually
from topology import access, layout, names
from topology.layout import Binding, Queue
from topology.wire import Message

STREAM = "wake.test-stream"  # a name that the gateway's account may read


@pytest.fixture
async def stream(publisher: AmqpPublisher) -> AsyncIterator[str]:
    await publisher.declare(Queue(STREAM, {"x-queue-type": "stream"}), [Binding(names.UPLINK, STREAM, "telemetry.#")])
    yield STREAM
    await publisher.delete_queue(STREAM)


async def say(publisher: AmqpPublisher, *numbers: int) -> None:
    for number in numbers:
        await publisher.publish(names.UPLINK, "telemetry.dev.ch", Message("telemetry", {}, str(number).encode()))


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[tuple[int | None, int]]:
    taken: list[tuple[int | None, int]] = []
    async with asyncio.timeout(15):
        while len(taken) < count:
            delivery = await anext(deliveries)
            await delivery.ack()
            taken.append((delivery.offset, int(delivery.message.body)))
    return taken


async def test_first_next_and_an_offset(publisher: AmqpPublisher, broker: Broker, stream: str) -> None:
    await say(publisher, *range(5))
    async with broker.link("read") as link:
        reader = AmqpStreamReader(link)
        async with reader.read(stream, "first") as found:
            assert await take(found, 5) == [(n, n) for n in range(5)]
        async with reader.read(stream, 3) as found:
            assert await take(found, 2) == [(3, 3), (4, 4)]
        async with reader.read(stream, "next") as found:
            await say(publisher, 5)
            assert await take(found, 1) == [(5, 5)]


async def test_more_than_the_prefetch_comes(publisher: AmqpPublisher, broker: Broker, stream: str) -> None:
    count = 3 * PREFETCH + 7
    await asyncio.gather(*(say(publisher, n) for n in range(count)))
    async with broker.link("read") as link, AmqpStreamReader(link).read(stream, "first") as found:
        taken = await take(found, count)
    assert [offset for offset, _ in taken] == list(range(count))


async def test_after_a_loss_it_goes_on_behind_the_last_message(
    publisher: AmqpPublisher, broker: Broker, stream: str
) -> None:
    await say(publisher, *range(10))
    async with broker.link("read", access.GATEWAY) as link, AmqpStreamReader(link).read(stream, 2) as found:
        assert await take(found, 4) == [(n, n) for n in range(2, 6)]
        async with broker.admin() as admin:
            for round_ in range(2):
                await admin.close_connections(access.GATEWAY)
                await say(publisher, 10 + round_)
        assert await take(found, 6) == [(n, n) for n in range(6, 12)]


async def test_next_misses_nothing_when_the_loss_comes_before_the_first_message(
    publisher: AmqpPublisher, broker: Broker, stream: str
) -> None:
    await say(publisher, 0, 1, 2)
    await asyncio.sleep(2.1)  # the broker seeks by whole seconds, and by chunks
    async with broker.link("read", access.GATEWAY) as link, AmqpStreamReader(link).read(stream, "next") as found:
        async with broker.admin() as admin:
            await admin.close_connections(access.GATEWAY)
        await say(publisher, 3, 4)
        assert await take(found, 2) == [(3, 3), (4, 4)]


async def test_reading_ends_promptly_and_gives_its_channel_back(
    publisher: AmqpPublisher, broker: Broker, stream: str
) -> None:
    await say(publisher, *range(1_000))
    async with broker.link("read") as link:
        reader = AmqpStreamReader(link)
        began = time.monotonic()
        for _ in range(40):  # more than a connection has channels
            async with reader.read(stream, "first") as found:
                await anext(found)
        assert time.monotonic() - began < 10
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(16):
                await stack.enter_async_context(reader.read(stream, "next"))
            with pytest.raises(BrokerUnavailable, match="channels"):
                await stack.enter_async_context(reader.read(stream, "next"))
        async with reader.read(stream, "first") as found:
            assert await take(found, 1) == [(0, 0)]


async def test_a_cancelled_reader_is_gone(publisher: AmqpPublisher, broker: Broker, stream: str) -> None:
    async with broker.link("read") as link:

        async def read() -> None:
            async with AmqpStreamReader(link).read(stream, "next") as found:
                async for _ in found:
                    pass

        def channels() -> int:
            return int(evaluate(broker.node, "length(rabbit_channel:list())."))

        before = channels()
        task = asyncio.create_task(read())
        await eventually(lambda: channels() == before + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert channels() == before


async def test_no_such_stream(broker: Broker) -> None:
    async with broker.link("read") as link:
        with pytest.raises(QueueMissing):
            async with AmqpStreamReader(link).read("no-such-stream", "first"):
                pass


async def test_reading_ends_with_the_link(publisher: AmqpPublisher, broker: Broker, stream: str) -> None:
    async with broker.link("read") as link, AmqpStreamReader(link).read(stream, "first") as found:
        await link.stop()
        with pytest.raises(BrokerUnavailable):
            await asyncio.wait_for(anext(found), 10)


def test_the_fabrics_own_streams_are_declared_as_streams() -> None:
    kinds = {queue.name: queue.arguments["x-queue-type"] for queue in layout.QUEUES}
    assert kinds[names.TELEMETRY] == kinds[names.EVENTS] == "stream"
