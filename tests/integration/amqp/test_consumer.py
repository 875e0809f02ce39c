"""Consuming: acks, failures, and coming back after whatever ended it."""

import asyncio
import dataclasses
import time
from collections import Counter

import pytest

from fabric.amqp.consumer import Consumer, wake_consumer
from fabric.amqp.publisher import AmqpPublisher
from fabric.ports import Delivery
from tests.harness.broker import Broker, evaluate, eventually
from topology import access, layout, names
from topology.wire import Message

REPORT = Message("receipt", {"v": "1.0"}, message_id="r")


async def fill(publisher: AmqpPublisher, count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        await publisher.publish(names.UPLINK, "receipt.dev", dataclasses.replace(REPORT, message_id=str(index)))


async def test_all_is_handled_in_order_and_acked(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 500)
    seen: list[str | None] = []
    depths: list[int] = []

    async def handle(delivery: Delivery) -> None:
        assert depths, "the depth is told before the first message"
        seen.append(delivery.message.message_id)
        await delivery.ack()

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle, prefetch=50, on_start=depths.append)
        assert consumer.backlog is None
        await consumer.start()
        await consumer.start()
        await eventually(lambda: len(seen) == 500)
        assert seen == [str(index) for index in range(500)]
        assert (consumer.found, depths, consumer.backlog) == (500, [500], 0)
        await consumer.stop()
        await consumer.stop()
    assert await publisher.depth(names.REPORTS) == 0


async def test_acks_may_come_in_any_order(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 100)
    held: list[Delivery] = []

    async def handle(delivery: Delivery) -> None:
        held.append(delivery)

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle, prefetch=100)
        await consumer.start()
        await eventually(lambda: len(held) == 100)
        for delivery in held[::-1]:
            if delivery.message.message_id != "7":
                await delivery.ack()
                await delivery.ack()  # logged, and no protocol error
                if delivery.message.message_id == "50":
                    await asyncio.sleep(0.05)
        assert consumer.settled == 99
        await consumer.stop()
        # What goes back takes its time in the broker: its depth does not tell.
        held.clear()
        again = Consumer(link, names.REPORTS, handle, prefetch=100)
        await again.start()
        await eventually(lambda: held)
        assert [(each.message.message_id, each.redelivered) for each in held] == [("7", True)]
        await held[0].ack()
        await again.stop()
    assert await publisher.depth(names.REPORTS) == 0


async def test_no_more_than_the_prefetch_at_once(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 40)
    busy = most = done = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal busy, most, done
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.01)
        busy -= 1
        done += 1
        await delivery.ack()

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle, prefetch=5)
        await consumer.start()
        await eventually(lambda: done == 40)
        await consumer.stop()
    assert most == 5


async def test_what_a_handler_fails_on_comes_again_and_not_at_once(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 3)
    tries: Counter[str | None] = Counter()
    healed = False

    async def handle(delivery: Delivery) -> None:
        tries[delivery.message.message_id] += 1
        if delivery.message.message_id == "1" and not healed:
            raise ValueError("\x1b[31m" + "x" * 10_000)
        await delivery.ack()

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle)
        await consumer.start()
        await asyncio.sleep(1.5)
        assert tries["0"] == tries["2"] == 1
        assert 2 <= tries["1"] < 40
        before, healed = tries["1"], True
        await eventually(lambda: tries["1"] > before)
        await consumer.stop()
    assert await publisher.depth(names.REPORTS) == 0


async def test_a_handler_that_acked_before_it_failed_has_settled(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 1)
    tries = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal tries
        tries += 1
        await delivery.ack()
        raise ValueError("too late")

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle)
        await consumer.start()
        await eventually(lambda: tries == 1)
        await asyncio.sleep(0.3)
        await consumer.stop()
    assert (tries, await publisher.depth(names.REPORTS)) == (1, 0)


async def test_stop_lets_handlers_finish_and_sends_their_acks(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 10)
    started = finished = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal started, finished
        started += 1
        await asyncio.sleep(0.3)
        await delivery.ack()
        finished += 1

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle)
        await consumer.start()
        await eventually(lambda: started == 10)
        await consumer.stop()
        assert finished == 10
    assert await publisher.depth(names.REPORTS) == 0


async def test_it_comes_back_after_its_connection_was_closed(publisher: AmqpPublisher, broker: Broker) -> None:
    await fill(publisher, 20)
    handled: list[Delivery] = []
    go = asyncio.Event()
    depths: list[int] = []

    async def handle(delivery: Delivery) -> None:
        await go.wait()
        handled.append(delivery)
        await delivery.ack()

    async with broker.link("consume", access.WORKER) as link:
        consumer = Consumer(link, names.REPORTS, handle, on_start=depths.append)
        await consumer.start()
        await asyncio.wait_for(consumer.consuming.wait(), 5)
        async with broker.admin() as admin:
            assert await admin.close_connections(access.WORKER) == 2  # the publisher's, too
            assert await admin.close_connections("nobody") == 0
        await eventually(lambda: len(depths) == 2)
        go.set()  # the handlers of the lost connection finish now; their acks are forgotten
        await eventually(lambda: len(handled) == 40)
        assert sum(delivery.redelivered for delivery in handled) == 20
        assert (depths, consumer.found, consumer.settled) == ([20, 20], 20, 20)
        await fill(publisher, 5, first=100)
        await eventually(lambda: len(handled) == 45)
        await consumer.stop()
    assert await publisher.depth(names.REPORTS) == 0


async def test_it_comes_back_after_its_queue_was_deleted_and_declared_again(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    handled = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal handled
        handled += 1
        await delivery.ack()

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.mailbox(device), handle)
        await consumer.start()
        await asyncio.wait_for(consumer.consuming.wait(), 5)
        await publisher.delete_queue(names.mailbox(device))
        await eventually(lambda: not consumer.consuming.is_set())
        await asyncio.sleep(0.3)  # a few vain attempts
        await publisher.declare(layout.mailbox(device), [layout.mailbox_binding(device)])
        await publisher.publish(names.MAIL, device, REPORT, mandatory=True)
        await eventually(lambda: handled == 1)
        await consumer.stop()


async def test_it_ends_with_its_link(broker: Broker, publisher: AmqpPublisher) -> None:
    async def handle(delivery: Delivery) -> None:
        await delivery.ack()

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle)
        await consumer.start()
        await asyncio.wait_for(consumer.consuming.wait(), 5)
    began = time.monotonic()
    await consumer.stop()
    assert time.monotonic() - began < 2


async def test_a_wake_queue_is_the_gateways_own_and_comes_back(publisher: AmqpPublisher, broker: Broker) -> None:
    first: list[bytes] = []
    second: list[bytes] = []

    async def to_first(delivery: Delivery) -> None:
        first.append(delivery.message.body)
        await delivery.ack()

    async def to_second(delivery: Delivery) -> None:
        second.append(delivery.message.body)
        await delivery.ack()

    async with broker.link("one", access.GATEWAY) as one, broker.link("two", access.GATEWAY) as two:
        consumers = [wake_consumer(one, to_first), wake_consumer(two, to_second)]
        for consumer in consumers:
            await consumer.start()
        for consumer in consumers:
            await asyncio.wait_for(consumer.consuming.wait(), 5)
        await publisher.send(names.WAKE, "", Message("wake", {}, b"1", persistent=False))
        await eventually(lambda: first == second == [b"1"])
        async with broker.admin() as admin:
            assert await admin.close_connections(access.GATEWAY) == 2
        await eventually(lambda: not any(consumer.consuming.is_set() for consumer in consumers))
        for consumer in consumers:
            await asyncio.wait_for(consumer.consuming.wait(), 10)
        await publisher.send(names.WAKE, "", Message("wake", {}, b"2", persistent=False))
        await eventually(lambda: first == second == [b"1", b"2"])
        await eventually(lambda: evaluate(broker.node, COUNT_WAKE) == "2")
        for consumer in consumers:
            await consumer.stop()
    await eventually(lambda: evaluate(broker.node, COUNT_WAKE) == "0")


async def test_a_wake_up_that_its_handler_fails_on_is_gone(publisher: AmqpPublisher, broker: Broker) -> None:
    came: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        came.append(delivery.message.body)
        if delivery.message.body == b"bad":
            raise ValueError
        await delivery.ack()
        await delivery.ack()  # there is nothing to settle, and so nothing to settle twice

    async with broker.link("one", access.GATEWAY) as link:
        consumer = wake_consumer(link, handle)
        await consumer.start()
        await asyncio.wait_for(consumer.consuming.wait(), 5)
        sent = [b"bad", *(str(number).encode() for number in range(50))]
        for body in sent:
            await publisher.send(names.WAKE, "", Message("wake", {}, body, persistent=False))
        await eventually(lambda: len(came) == len(sent))
        await consumer.stop()
    assert came == sent, "each once, in order"


COUNT_WAKE = """
    length([found || Q <- rabbit_amqqueue:list(),
                     match =:= re:run(element(4, amqqueue:get_name(Q)), "^wake", [{capture, none}])]).
"""


@pytest.mark.parametrize("prefetch", [1, 1_000])
async def test_any_prefetch_drains_a_queue(publisher: AmqpPublisher, broker: Broker, prefetch: int) -> None:
    await fill(publisher, 50)
    handled = 0

    async def handle(delivery: Delivery) -> None:
        nonlocal handled
        await delivery.ack()
        handled += 1

    async with broker.link("consume") as link:
        consumer = Consumer(link, names.REPORTS, handle, prefetch=prefetch)
        await consumer.start()
        await eventually(lambda: handled == 50)
        await consumer.stop()
    assert await publisher.depth(names.REPORTS) == 0
