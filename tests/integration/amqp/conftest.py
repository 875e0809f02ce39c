"""One broker for all of this folder; whoever stops it starts it again."""

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest

from fabric.amqp import declarer
from fabric.amqp.publisher import AmqpPublisher
from tests.harness.broker import Broker, running_broker
from topology import layout, names


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with running_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
async def publisher(broker: Broker) -> AsyncIterator[AmqpPublisher]:
    """A publisher on a declared topology, with empty shared queues."""
    async with broker.link("publish") as link:
        await declarer.declare_topology(link)
        async with link.throwaway() as channel:
            for queue in (names.REPORTS, names.RETURNED):
                await channel.queue_purge(queue)
        made = AmqpPublisher(link)
        yield made
        await made.close()


@pytest.fixture
async def device(publisher: AmqpPublisher) -> AsyncIterator[names.DeviceId]:
    """A device with a mailbox."""
    made = names.device(f"dev-{uuid4().hex[:12]}")
    await publisher.declare(layout.mailbox(made), [layout.mailbox_binding(made)])
    yield made
    await publisher.delete_queue(names.mailbox(made))
