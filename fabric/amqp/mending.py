"""Finds streams that the broker has lost, and makes them anew."""

import logging
from collections.abc import Awaitable, Callable, Sequence

from fabric.amqp.connection import Link, call
from fabric.amqp.declarer import bind, declare_queue
from fabric.amqp.publisher import AmqpPublisher
from fabric.errors import PublishFailed
from topology import layout
from topology.wire import Message

_log = logging.getLogger(__name__)


async def mend_streams(
    link: Link, on_new: Callable[[str], Awaitable[None]], queues: Sequence[layout.Queue] = layout.QUEUES
) -> None:
    """Make anew the streams that the broker has lost; for a callback of `Link.on_connect`, after `declare_topology`.

    `on_new` is awaited, once or twice, for each stream that has nothing in it, before anything is: the broker may have
    lost its disk.

    Measured on RabbitMQ 4.3.6: a node that is killed within a moment of a stream's first declaration forgets its log
    and keeps its queue. Declaring it again is then answered with success, and yet every publish that is routed to
    it closes the publisher's *connection*: one lost stream would silence every device. So each stream gets a
    message of the type `probe`, over a connection that may be lost.
    """
    for queue in queues:
        if queue.arguments.get("x-queue-type") != "stream":
            continue
        async with link.throwaway() as channel:
            known = await call(f"asking for the stream '{queue.name}'", channel.queue_declare(queue.name, passive=True))
        if not known.message_count:
            await on_new(queue.name)
        if await _is_lost(link, queue.name):
            _log.warning("stream-lost queue=%s what='made anew; what was in it is gone'", queue.name)
            await on_new(queue.name)
            async with link.throwaway() as channel:
                await call(f"deleting the lost stream '{queue.name}'", channel.queue_delete(queue.name))
                await declare_queue(channel, queue)
                for binding in layout.BINDINGS:
                    if binding.queue == queue.name:
                        await bind(channel, binding)


async def _is_lost(link: Link, stream: str) -> bool:
    probing = Link(link.endpoint, f"{link.name}: probing {stream}")
    await probing.start()
    publisher = AmqpPublisher(probing)
    try:
        await publisher.publish("", stream, Message("probe"))
    except PublishFailed as error:
        return f"Stream not found for queue '{stream}'" in str(error)
    finally:
        await publisher.close()
        await probing.stop()
    return False
