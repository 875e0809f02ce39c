"""Declaring the topology, and what a broker that has another one is told about."""

import dataclasses
import logging
import time

import pytest

from fabric.amqp import declarer
from fabric.amqp.connection import BrokerRefused, Endpoint, Link
from fabric.amqp.declarer import TopologyMismatch
from fabric.amqp.publisher import AmqpPublisher
from fabric.errors import BrokerUnavailable
from fabric.management.client import ManagementClient, ManagementRefused
from tests.harness.broker import LOOPBACK, Broker
from topology import access, layout, names
from topology.layout import Exchange, Policy, Queue


async def test_declaring_twice_is_declaring_once(broker: Broker) -> None:
    async with broker.link() as link:
        for _ in range(2):
            await declarer.declare_topology(link)
        publisher = AmqpPublisher(link)
        for queue in layout.QUEUES:
            assert await publisher.depth(queue.name) is not None
        await publisher.close()


async def test_a_queue_that_differs_is_named(broker: Broker) -> None:
    async with broker.link() as link:
        await declarer.declare_topology(link)
        other = Queue(names.REPORTS, {"x-queue-type": "classic"})
        with pytest.raises(TopologyMismatch, match=r"queue 'reports' exists with other arguments.*delete it"):
            await declarer.declare_topology(link, queues=[other])
        with pytest.raises(TopologyMismatch, match="exchange 'uplink' exists"):
            await declarer.declare_topology(link, exchanges=[Exchange(names.UPLINK, "direct")])
        await declarer.declare_topology(link)


async def test_a_mismatch_ends_the_wait_for_the_link(broker: Broker) -> None:
    link = Link(broker.endpoint(), "mismatch")
    other = Queue(names.REPORTS, {"x-queue-type": "classic"})
    link.on_connect(lambda up: declarer.declare_topology(up, queues=[other]))
    await link.start()
    began = time.monotonic()
    with pytest.raises(TopologyMismatch):
        await link.ready(20)
    assert time.monotonic() - began < 5
    assert not link.connected.is_set()
    await link.stop()


async def test_what_an_account_may_not_declare_is_refused(broker: Broker) -> None:
    async with broker.link("gateway", access.GATEWAY) as link:
        with pytest.raises(BrokerRefused):
            await declarer.declare_topology(link)


async def test_callbacks_run_in_order_at_each_connect(broker: Broker) -> None:
    calls: list[str] = []
    link = Link(broker.endpoint(), "ordered")

    async def first(_: Link) -> None:
        calls.append("first")

    async def second(_: Link) -> None:
        calls.append("second")
        if len(calls) < 4:
            raise BrokerUnavailable("try again")

    link.on_connect(first)
    link.on_connect(second)
    await link.start()
    await link.start()
    await link.ready(10)
    assert calls == ["first", "second"] * 2
    await link.stop()


async def test_bad_credentials_are_said_once_and_clearly(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    link = Link(dataclasses.replace(broker.endpoint(), password="not-it"), "bad")
    await link.start()
    with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED"):
        await link.ready(2)
    await link.stop()
    assert "not-it" not in caplog.text
    assert "not-it" not in repr(link.endpoint)
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "broker-refused-credentials" in said.message


async def test_a_vhost_that_is_not_there_and_a_port_that_is_no_broker(broker: Broker) -> None:
    for endpoint in (
        dataclasses.replace(broker.endpoint(), vhost="elsewhere"),
        Endpoint(LOOPBACK, broker.node.management_port, "x", "y"),
    ):
        link = Link(endpoint, "lost")
        await link.start()
        with pytest.raises(BrokerUnavailable):
            await link.ready(1)
        began = time.monotonic()
        await link.stop()
        assert time.monotonic() - began < 5


async def _policies(admin: ManagementClient) -> list[Policy]:
    found = await admin._call("GET", "/api/policies/devices")
    return [Policy(row["name"], row["pattern"], row["apply-to"], row["definition"]) for row in found]


async def test_policies(broker: Broker) -> None:
    odd = Policy("a/b c", "^x$", "queues", {"max-length": 5})
    async with broker.admin() as admin:
        for policy in (*layout.policies(layout.LARGEST_BACKLOG), odd):
            for _ in range(2):
                await admin.put_policy(policy)
            assert policy in await _policies(admin)
        with pytest.raises(ManagementRefused, match="400"):
            await admin.put_policy(dataclasses.replace(odd, definition={"no-such-key": 1}))
        await admin.close()
        await admin.close()
