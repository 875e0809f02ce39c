"""The broker dies and comes back: everything over a link comes back by itself."""

import asyncio
import contextlib
import dataclasses
import logging

import pytest

from fabric.amqp import declarer
from fabric.amqp.connection import Link
from fabric.amqp.consumer import Consumer, wake_consumer
from fabric.amqp.publisher import AmqpPublisher
from fabric.amqp.streams import AmqpStreamReader
from fabric.errors import BrokerUnavailable, PublishFailed
from fabric.ports import Delivery
from tests.harness.broker import Broker, eventually
from topology import access, names
from topology.wire import Message

REPORT = Message("receipt", {"v": "1.0"}, message_id="r")


# Seconds. A node that is killed within one of declaring its first stream ever has its streams "not found" for
# good (measured on 4.3.6: it had not yet written down that it runs a stream coordinator). Not what is tested here.
STREAMS_ARE_KEPT_AFTER = 3.0


async def test_a_killed_broker_comes_back(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handled: list[str | None] = []
    woken: list[bytes] = []
    declared = 0

    async def handle(delivery: Delivery) -> None:
        handled.append(delivery.message.message_id)
        await delivery.ack()

    async def wake(delivery: Delivery) -> None:
        woken.append(delivery.message.body)
        await delivery.ack()

    async def declare(link: Link) -> None:
        nonlocal declared
        assert not link.connected.is_set()
        await declarer.declare_topology(link)
        declared += 1

    async with broker.link("publish", wait=False) as out, broker.link("consume", access.WORKER, wait=False) as into:
        out.on_connect(declare)
        into.on_connect(declare)
        await out.ready(20)
        await into.ready(20)
        publisher = AmqpPublisher(out)
        consumer, waker = Consumer(into, names.REPORTS, handle), wake_consumer(into, wake)
        await consumer.start()
        await waker.start()
        await asyncio.wait_for(waker.consuming.wait(), 5)
        async with AmqpStreamReader(into).read(names.TELEMETRY, "next") as readings:
            await publisher.publish(names.UPLINK, "telemetry.dev.ch", dataclasses.replace(REPORT, body=b"1"))
            assert (await asyncio.wait_for(anext(readings), 10)).message.body == b"1"
            await publisher.publish(names.UPLINK, "receipt.dev", REPORT)
            # At least: the broker is shared, and a test before may have left a report whose fate it did not learn.
            await eventually(lambda: REPORT.message_id in handled)

            await asyncio.sleep(STREAMS_ARE_KEPT_AFTER)
            for round_ in range(2):
                confirmed, unknown = [], 0

                async def keep_publishing(confirmed: list[str] = confirmed, round_: int = round_) -> None:
                    nonlocal unknown
                    for index in range(100_000):
                        name = f"{round_}-{index}"
                        try:
                            await publisher.publish(
                                names.UPLINK, "receipt.dev", dataclasses.replace(REPORT, message_id=name), timeout=1
                            )
                            confirmed.append(name)
                        except PublishFailed:
                            unknown += 1
                            await asyncio.sleep(0.01)

                storm = asyncio.create_task(keep_publishing())
                await eventually(lambda confirmed=confirmed: len(confirmed) > 100)
                broker.node.kill9()
                await eventually(lambda: not out.connected.is_set() and not into.connected.is_set())
                with pytest.raises(PublishFailed):
                    await publisher.publish(names.UPLINK, "receipt.dev", REPORT, timeout=0.2)
                with pytest.raises(BrokerUnavailable):
                    await publisher.depth(names.REPORTS)
                before = len(confirmed)
                await asyncio.to_thread(broker.node.start)
                await eventually(lambda confirmed=confirmed, before=before: len(confirmed) > before + 100, 30)
                storm.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await storm
                # Every confirmed report is consumed, those confirmed right before the kill included.
                await eventually(lambda confirmed=confirmed: set(confirmed) <= set(handled), 20)
                assert unknown > 0
                woken.clear()
                await asyncio.wait_for(waker.consuming.wait(), 20)
                await publisher.send(names.WAKE, "", dataclasses.replace(REPORT, body=b"w", persistent=False))
                await eventually(lambda: woken == [b"w"])
                body = f"after-{round_}".encode()
                await publisher.publish(names.UPLINK, "telemetry.dev.ch", dataclasses.replace(REPORT, body=body))
                assert (await asyncio.wait_for(anext(readings), 20)).message.body == body
        assert declared == 6
        await consumer.stop()
        await waker.stop()
        await publisher.close()
    # Said once when it was lost, not with every attempt.
    lost = [
        record for record in caplog.records if record.levelno >= logging.WARNING and "link=publish" in record.message
    ]
    assert 1 <= len(lost) <= 4


async def test_a_broker_that_is_down_is_unavailable_to_its_administrator(broker: Broker) -> None:
    await asyncio.to_thread(broker.node.stop)
    async with broker.admin() as admin:
        with pytest.raises(BrokerUnavailable):
            await admin.connections()
    await asyncio.to_thread(broker.node.start)
    async with broker.admin() as admin:
        assert await admin.connections() is not None
