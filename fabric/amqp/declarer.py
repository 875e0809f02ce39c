"""Declares the topology on a broker, idempotently."""

from collections.abc import Sequence

from aiormq.abc import AbstractChannel

from fabric.amqp.connection import BrokerRefused, Link, Mismatched, call
from topology import layout


class TopologyMismatch(BrokerRefused):
    """An exchange or queue exists, and differently: a person must decide what becomes of it."""

    code = "topology-mismatch"


async def declare_topology(
    link: Link,
    exchanges: Sequence[layout.Exchange] = layout.EXCHANGES,
    queues: Sequence[layout.Queue] = layout.QUEUES,
    bindings: Sequence[layout.Binding] = layout.BINDINGS,
) -> None:
    """Declare everything shared; a callback for `Link.on_connect`.

    Raises:
        TopologyMismatch: something exists with other properties.
        BrokerUnavailable: the connection was lost, or the broker did not answer.
    """
    async with link.throwaway() as channel:
        for exchange in exchanges:
            await declare_exchange(channel, exchange)
        for queue in queues:
            await declare_queue(channel, queue)
        for binding in bindings:
            await bind(channel, binding)


async def declare_exchange(channel: AbstractChannel, exchange: layout.Exchange) -> None:
    try:
        request = channel.exchange_declare(exchange.name, exchange_type=exchange.kind, durable=True)
        await call(f"declaring the exchange '{exchange.name}'", request)
    except Mismatched as error:
        raise TopologyMismatch(
            f"the exchange '{exchange.name}' exists with other properties than durable {exchange.kind}; "
            f"delete it, and it is declared anew with its bindings ({error})"
        ) from error


async def declare_queue(channel: AbstractChannel, queue: layout.Queue) -> int:
    """Declare a durable queue; returns how many messages are ready in it."""
    try:
        request = channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
        answer = await call(f"declaring the queue '{queue.name}'", request)
    except Mismatched as error:
        raise TopologyMismatch(
            f"the queue '{queue.name}' exists with other arguments than {dict(queue.arguments)}; empty and delete it "
            f"(a queue's arguments can't be changed), and it is declared anew ({error})"
        ) from error
    return answer.message_count or 0


async def counts(link: Link, queue: str) -> tuple[int, int]:
    """How many messages of a queue are ready, and how many consumers it has, now; the broker's statistics are older.

    Raises:
        QueueMissing: there is no such queue.
        BrokerUnavailable: the connection was lost, or the broker did not answer.
    """
    async with link.throwaway() as channel:
        answer = await call(f"asking for the queue '{queue}'", channel.queue_declare(queue, passive=True))
    return answer.message_count or 0, answer.consumer_count or 0


async def bind(channel: AbstractChannel, binding: layout.Binding) -> None:
    request = channel.queue_bind(binding.queue, binding.exchange, binding.key)
    await call(f"binding '{binding.queue}' to '{binding.exchange}'", request)
