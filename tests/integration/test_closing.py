"""A gateway asks, a worker closes: the answer comes when the connections are closed, or not at all."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from api.operator import wiring
from fabric import closing
from fabric.amqp.consumer import wake_consumer
from fabric.amqp.publisher import AmqpPublisher
from fabric.closing import RemoteCloser
from fabric.errors import Temporary
from tests.harness.device import Device
from tests.harness.rawamqp import Closed
from tests.harness.stack import RunningStack, eventually
from topology import access, names, wire
from topology.names import DeviceId


@pytest.fixture
async def closer(own_stack: RunningStack) -> AsyncIterator[RemoteCloser]:
    broker = wiring.broker(own_stack.stack.settings, access.GATEWAY)
    made = RemoteCloser(broker.publisher)
    wakes = wake_consumer(broker.consuming, made.on_answer)
    await broker.start()
    await wakes.start()
    async with asyncio.timeout(20):
        await wakes.consuming.wait()
    # What can't be read is dropped, and harms nobody.
    for body in (b"", b"[]", b'{"device": 1}', b'{"device": "fabric.worker"}', b"\xff"):
        await ask(broker.publisher, body, access.GATEWAY)
        await broker.publisher.send(names.WAKE, "", wire.Message("closed", body=body, correlation_id="x"))
    yield made
    await wakes.stop()
    await broker.stop()


@pytest.fixture
async def publishers(own_stack: RunningStack) -> AsyncIterator[dict[str, AmqpPublisher]]:
    """Of each account that may write to `control` and `wake`."""
    brokers = {account: wiring.broker(own_stack.stack.settings, account) for account in access.FABRIC_ACCOUNTS}
    for broker in brokers.values():
        await broker.publishing.start()
        await broker.publishing.ready()
    yield {account: broker.publisher for account, broker in brokers.items()}
    for broker in brokers.values():
        await broker.stop()


async def ask(publisher: AmqpPublisher, body: bytes, user_id: str | None) -> None:
    request = wire.Message("close", body=body, correlation_id="x", user_id=user_id, persistent=False)
    await publisher.publish(names.CONTROL, names.CLOSURES, request)


async def test_the_answer_says_how_many_were_closed(own_stack: RunningStack, home: Path, closer: RemoteCloser) -> None:
    with own_stack.agent(home) as agent:
        device = DeviceId(agent.id)
        assert await closer.close(device) == 0
        agent.start()
        await asyncio.to_thread(own_stack.send, agent.id, "note", {"text": "up"}, wait=20)
        assert await closer.close(device) == 1
        # It was not revoked, so it comes back by itself.
        await asyncio.to_thread(own_stack.send, agent.id, "note", {"text": "back"}, wait=30)


async def test_only_a_gateways_request_is_served(
    own_stack: RunningStack, closer: RemoteCloser, publishers: dict[str, AmqpPublisher]
) -> None:
    device = await asyncio.to_thread(Device.enrolled, own_stack, "kept")
    body = json.dumps({"device": device.id}).encode()
    with await asyncio.to_thread(device.raw) as client:
        for account, user_id in ((access.GATEWAY, None), (access.WORKER, None), (access.WORKER, access.WORKER)):
            await ask(publishers[account], body, user_id)
        assert await closer.close(DeviceId("nobody")) == 0  # what came before has been looked at, too
        assert client.declare(device.mailbox, passive=True) == 0, "it is connected"
        await ask(publishers[access.GATEWAY], body, access.GATEWAY)
        with pytest.raises((Closed, OSError, EOFError)):
            await asyncio.to_thread(client.receive, timeout=20)


async def test_without_a_worker_it_says_so_in_time_whatever_others_answer(
    own_stack: RunningStack, closer: RemoteCloser, publishers: dict[str, AmqpPublisher]
) -> None:
    own_stack.stack.kill_service("worker")
    began = time.monotonic()
    asking = asyncio.create_task(closer.close(DeviceId("nobody"), timeout=0.5))
    await asyncio.sleep(0)  # it has asked
    (correlation,) = closer._asked
    answer = closing.answer(correlation, 1)
    await publishers[access.GATEWAY].send(names.WAKE, "", replace(answer, user_id=access.GATEWAY))
    await publishers[access.WORKER].send(names.WAKE, "", replace(answer, user_id=None))
    with pytest.raises(Temporary, match="no worker"):
        await asking
    assert time.monotonic() - began < 5
    await asyncio.to_thread(own_stack.stack.start_service, "worker")
    async with asyncio.timeout(30):
        while True:
            try:
                assert await closer.close(DeviceId("nobody"), timeout=1) == 0
                break
            except Temporary:
                continue
    eventually(lambda: not closer._asked, "nothing is kept of a question")
