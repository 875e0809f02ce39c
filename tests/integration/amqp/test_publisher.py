"""Publishing: confirms, returns, refusals, and never hanging."""

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fabric.amqp.connection import Endpoint, Link
from fabric.amqp.declarer import TopologyMismatch
from fabric.amqp.publisher import AmqpPublisher, Fate
from fabric.errors import BrokerUnavailable, NoMailbox, PublishFailed
from tests.harness.broker import LOOPBACK, Broker, evaluate, eventually
from tests.harness.rawamqp import Got, RawClient, long, properties, short
from topology import access, layout, names
from topology.wire import Message

COMMAND = Message("command", {"v": "1.0"}, b"{}", "application/json", message_id="id-1")


@contextmanager
def raw(broker: Broker, account: str = access.WORKER) -> Iterator[RawClient]:
    with RawClient(LOOPBACK, broker.node.amqp_port) as client:
        client.login(account, broker.node.password(account))
        client.open_channel()
        yield client


@contextmanager
def stopped(broker: Broker) -> Iterator[None]:
    """The broker takes bytes (into the kernel's buffers) and does nothing."""
    pid = broker.node.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 10
        while any(_state(thread) != "T" for thread in Path(f"/proc/{pid}/task").iterdir()):
            assert time.monotonic() < until
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _state(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(") ")[2][:1]


async def test_a_confirmed_message_is_there_with_all_it_carries(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    message = Message(
        "command",
        {"v": "1.0", "at": 1_763_690_598_123, "seq": 12, "claim": True, "name": "door.close"},
        b"\x00\xff",
        "application/json",
        message_id="m-1",
        correlation_id="c-1",
        reply_to="r-1",
        user_id=access.WORKER,
        expiration_ms=123_457,
    )
    await publisher.publish(names.MAIL, device, message, mandatory=True)
    assert await publisher.depth(names.mailbox(device)) == 1
    with raw(broker) as client:
        got = client.get(names.mailbox(device), no_ack=True)
    assert got is not None
    assert got.body == b"\x00\xff"
    # As bytes: epoch ms is a 64-bit integer, a flag a boolean, the expiration exactly what was asked.
    assert short("at") + b"l" + (1_763_690_598_123).to_bytes(8, "big") in got.header
    assert short("claim") + b"t\x01" in got.header
    assert short("name") + b"S" + long("door.close") in got.header
    for text in ("application/json", "m-1", "c-1", "r-1", access.WORKER, "123457", "command"):
        assert short(text) in got.header


async def test_a_mandatory_message_without_a_mailbox_comes_back(publisher: AmqpPublisher) -> None:
    with pytest.raises(NoMailbox):
        await publisher.publish(names.MAIL, "nobody", COMMAND, mandatory=True)
    await publisher.publish(names.MAIL, "nobody", COMMAND)  # not mandatory: confirmed, and gone


async def test_the_same_id_at_once_is_not_confused(publisher: AmqpPublisher, device: names.DeviceId) -> None:
    keys = [device if index % 3 else "nobody" for index in range(60)]
    results = await asyncio.gather(
        *(publisher.publish(names.MAIL, key, COMMAND, mandatory=True) for key in keys), return_exceptions=True
    )
    for key, result in zip(keys, results, strict=True):
        assert (result is None) if key == device else isinstance(result, NoMailbox)
    assert await publisher.depth(names.mailbox(device)) == 40


async def test_a_late_return_is_not_taken_for_the_answer_to_a_retry(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    await publisher.publish(names.MAIL, device, COMMAND)  # the channel is open
    with stopped(broker), pytest.raises(PublishFailed):
        await publisher.publish(names.MAIL, "nobody", COMMAND, mandatory=True, timeout=0.3)
    await publisher.publish(names.MAIL, device, COMMAND, mandatory=True)
    with pytest.raises(NoMailbox):
        await publisher.publish(names.MAIL, "nobody", COMMAND, mandatory=True)
    assert await publisher.depth(names.mailbox(device)) == 2
    fates = {fate: sum(histogram.counts) for fate, histogram in publisher.fates.items()}
    assert fates == {Fate.CONFIRMED: 2, Fate.TIMED_OUT: 1, Fate.RETURNED: 1, Fate.NACKED: 0, Fate.LOST: 0}


async def test_a_full_mailbox_refuses_and_dead_letters(publisher: AmqpPublisher, broker: Broker) -> None:
    device = names.device("full")
    (usual,) = layout.policies(layout.LARGEST_BACKLOG)
    small = {**usual.definition, "max-length": 2}
    async with broker.admin() as admin:
        await admin.put_policy(dataclasses.replace(usual, definition=small))
        try:
            await publisher.declare(layout.mailbox(device), [layout.mailbox_binding(device)])
            for index in range(2):
                message = dataclasses.replace(COMMAND, message_id=f"full-{index}")
                await publisher.publish(names.MAIL, device, message, mandatory=True)
            with pytest.raises(PublishFailed, match="nack"):
                await publisher.publish(names.MAIL, device, COMMAND, mandatory=True)
            assert sum(publisher.fates[Fate.NACKED].counts) == 1
        finally:
            await admin.put_policy(usual)
    dead: Got | None = None
    with raw(broker) as client:
        until = time.monotonic() + 10
        while dead is None and time.monotonic() < until:
            dead = client.get(names.RETURNED, no_ack=True)
    assert dead is not None
    assert short("x-first-death-reason") + b"S" + long("maxlen") in dead.header
    assert short("id-1") in dead.header
    assert await publisher.depth(names.mailbox(device)) == 2
    await publisher.delete_queue(names.mailbox(device))


async def test_nothing_hangs_on_a_broker_that_has_stopped(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    await publisher.publish(names.MAIL, device, COMMAND)
    await publisher.send(names.WAKE, "", COMMAND)
    big = dataclasses.replace(COMMAND, body=b"." * 200_000)
    began = time.monotonic()
    with stopped(broker):
        # More than the socket takes, so that some wait to be sent and some to be confirmed.
        results = await asyncio.gather(
            *(
                publisher.publish(names.MAIL, device, dataclasses.replace(big, message_id=str(index)), timeout=1)
                for index in range(100)
            ),
            return_exceptions=True,
        )
        assert all(isinstance(result, PublishFailed) for result in results)
        assert time.monotonic() - began < 10
        with pytest.raises(PublishFailed):
            await publisher.send(names.WAKE, "", big)
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await publisher.depth(names.mailbox(device))
        assert time.monotonic() - began < 15
    await publisher.publish(names.MAIL, device, COMMAND, timeout=20)
    assert await publisher.depth(names.mailbox(device)) is not None


async def test_nothing_hangs_without_a_broker() -> None:
    with_nobody = Link(Endpoint(LOOPBACK, 1, access.WORKER, "x"), "nobody")
    await with_nobody.start()
    publisher = AmqpPublisher(with_nobody)
    began = time.monotonic()
    with pytest.raises(PublishFailed):
        await publisher.publish(names.MAIL, "x", COMMAND, timeout=0.5)
    assert time.monotonic() - began < 10
    with pytest.raises(PublishFailed):
        await publisher.send(names.WAKE, "", COMMAND)
    with pytest.raises(BrokerUnavailable, match="no connection"):
        await with_nobody.ready(0.3)
    await publisher.close()
    await with_nobody.stop()
    await with_nobody.stop()
    with pytest.raises(BrokerUnavailable, match="stopped"):
        await with_nobody.ready(5)


async def test_an_alarm_delays_and_loses_nothing(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    await publisher.publish(names.MAIL, device, COMMAND)
    alarm = "{{resource_limit, memory, node()}, []}"
    # Once it is in the list, all connections have been told.
    evaluate(broker.node, f"rabbit_alarm:set_alarm({alarm}), rabbit_alarm:get_alarms().")
    try:
        # The broker tells a publisher that it is blocked when it first publishes.
        for _ in range(2):
            with pytest.raises(PublishFailed):
                await publisher.publish(names.MAIL, device, COMMAND, timeout=0.5)
    finally:
        evaluate(broker.node, "rabbit_alarm:clear_alarm({resource_limit, memory, node()}).")
    await publisher.publish(names.MAIL, device, dataclasses.replace(COMMAND, message_id="after"))
    # The first of the two was on the wire when the connection was blocked; the second never left.
    assert await publisher.depth(names.mailbox(device)) == 3


async def test_a_cancelled_publish_leaves_the_publisher_usable(
    publisher: AmqpPublisher, device: names.DeviceId
) -> None:
    for delay in (0, 0.0005, 0.001, 0.002):
        tasks = [
            asyncio.create_task(publisher.publish(names.MAIL, device, dataclasses.replace(COMMAND, message_id=f"c{n}")))
            for n in range(20)
        ]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.done() for task in tasks)
        await publisher.publish(names.MAIL, device, dataclasses.replace(COMMAND, message_id="c0"), mandatory=True)


async def test_thousands_at_once_are_all_confirmed(publisher: AmqpPublisher) -> None:
    sent = [dataclasses.replace(COMMAND, message_id=str(index)) for index in range(3_000)]
    await asyncio.gather(*(publisher.publish(names.UPLINK, "receipt.x", message, timeout=60) for message in sent))
    assert await publisher.depth(names.REPORTS) == 3_000


async def test_what_is_published_in_order_goes_over_one_connection(
    publisher: AmqpPublisher, broker: Broker, device: names.DeviceId
) -> None:
    sent = [dataclasses.replace(COMMAND, message_id=str(index)) for index in range(100)]
    async with broker.link("in order") as link, broker.admin() as admin:
        ordered = AmqpPublisher(link)
        async with ordered.in_order(names.MAIL, device) as publish:
            await publish(sent)
            await admin.close_connections(access.WORKER)
            await eventually(lambda: not link.connected.is_set())
            await link.ready()
            # The connection is back, and another one.
            with pytest.raises(PublishFailed):
                await publish([COMMAND])
        with pytest.raises(PublishFailed, match="no queue"):
            async with ordered.in_order(names.MAIL, "nobody") as publish:
                await publish([COMMAND])
        async with ordered.in_order(names.MAIL, device) as publish:
            await publish([COMMAND])
        await ordered.close()
    assert await publisher.depth(names.mailbox(device)) == len(sent) + 1
    with raw(broker) as client:
        for message in sent:
            got = client.get(names.mailbox(device), no_ack=True)
            assert got is not None
            assert short(str(message.message_id)) in got.header


async def test_what_the_broker_refuses_closes_a_channel_and_no_more(
    publisher: AmqpPublisher, device: names.DeviceId
) -> None:
    with pytest.raises(PublishFailed, match="NOT_FOUND"):
        await publisher.publish("no-such-exchange", "x", COMMAND)
    with pytest.raises(PublishFailed, match="user_id"):
        await publisher.publish(names.MAIL, device, dataclasses.replace(COMMAND, user_id="somebody.else"))
    await publisher.send("no-such-exchange", "x", COMMAND)
    await asyncio.sleep(0.05)
    await publisher.send(names.MAIL, device, COMMAND)
    await publisher.publish(names.MAIL, device, COMMAND, mandatory=True)


async def test_queues_are_declared_measured_and_deleted(publisher: AmqpPublisher) -> None:
    device = names.device("once")
    for _ in range(2):
        await publisher.declare(layout.mailbox(device), [layout.mailbox_binding(device)])
    assert await publisher.depth(names.mailbox(device)) == 0
    other = dataclasses.replace(layout.mailbox(device), arguments={"x-queue-type": "classic"})
    with pytest.raises(TopologyMismatch, match=r"mailbox\.once"):
        await publisher.declare(other, [])
    for _ in range(2):
        await publisher.delete_queue(names.mailbox(device))
    assert await publisher.depth(names.mailbox(device)) is None
    depths = await asyncio.gather(*(publisher.depth(name) for name in ["gone", names.REPORTS] * 10))
    assert depths == [None, 0] * 10


async def test_an_answer_reaches_a_direct_reply_to_address(publisher: AmqpPublisher, broker: Broker) -> None:
    with raw(broker) as client:
        client.consume(names.DIRECT_REPLY_TO, no_ack=True)
        client.publish(names.UPLINK, "receipt.x", b"?", properties(reply_to=short(names.DIRECT_REPLY_TO)))
        client.sync()
        with raw(broker) as other:
            asked = other.get(names.REPORTS, no_ack=True)
        assert asked is not None
        at = asked.header.index(b"amq.rabbitmq.reply-to")
        address = asked.header[at : at + asked.header[at - 1]].decode()
        await publisher.send("", address, Message("welcome", {"v": "1.0"}, b"!", correlation_id="c"))
        assert client.delivery().body == b"!"
    await publisher.send("", address, COMMAND)  # nobody listens any more: no error
    await publisher.send("", "amq.rabbitmq.reply-to.rubbish", COMMAND)
    await publisher.send(names.UPLINK, "receipt.x", COMMAND)
    async with asyncio.timeout(10):
        while await publisher.depth(names.REPORTS) != 1:  # noqa: ASYNC110 - the broker has no event for it
            await asyncio.sleep(0.01)
