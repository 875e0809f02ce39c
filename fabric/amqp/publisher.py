"""Publishes over a link of its own: confirmed on one channel, unconfirmed on another, requests on a third.

No call outlasts its time limit, also while the broker is away.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiormq import exceptions
from aiormq.abc import AbstractChannel

from fabric.amqp import convert, declarer
from fabric.amqp.connection import LIBRARY_ERRORS, Link, QueueMissing, call, quietly
from fabric.errors import BrokerUnavailable, NoMailbox, PublishFailed
from topology.layout import Binding, Queue
from topology.wire import Message

SEND_TIMEOUT = 1.0  # seconds: what may be lost is not waited for
_UNSETTLED_LIMIT = 1_000  # publishes of unknown fate on one channel, until it is replaced


@dataclass(slots=True)
class _Confirming:
    """A channel in confirm mode. `unsettled`: ids whose publisher gave up before the broker answered."""

    channel: AbstractChannel
    publishing: int = 0
    retired: bool = False
    unsettled: set[str] = field(default_factory=set)


class AmqpPublisher:
    """The port `fabric.ports.Publisher`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._confirming: _Confirming | None = None
        self._sending: AbstractChannel | None = None
        self._asking: AbstractChannel | None = None
        self._opening = asyncio.Lock()
        self._request = asyncio.Lock()
        # aiormq tells which publish was returned by the message's id, so an id is in flight once at most.
        self._in_flight: dict[str, asyncio.Future[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def publish(
        self, exchange: str, routing_key: str, message: Message, *, mandatory: bool = False, timeout: float = 5.0
    ) -> None:
        """Return once the broker has confirmed.

        Raises:
            NoMailbox: mandatory and returned.
            PublishFailed: nacked, timed out, or the channel was lost: the fate is unknown.
        """
        try:
            async with (
                asyncio.timeout(timeout),
                self._turn(message.message_id),
                self._confirm_channel(message.message_id) as channel,
            ):
                await _publish(channel, exchange, routing_key, message, mandatory=mandatory)
        except exceptions.PublishError as error:
            raise NoMailbox(f"no queue is bound to '{exchange}' for '{routing_key}'") from error
        except exceptions.DeliveryError as error:
            raise PublishFailed("the broker refused the message (nack): a queue is full or unavailable") from error
        except TimeoutError as error:
            raise PublishFailed(f"the broker did not confirm within {timeout:g} s") from error
        except BrokerUnavailable as error:
            raise PublishFailed(str(error)) from error
        except LIBRARY_ERRORS as error:
            raise PublishFailed(f"the channel was lost before the broker confirmed: {error}") from error

    async def send(self, exchange: str, routing_key: str, message: Message) -> None:
        """Publish without waiting for a confirm (wake-ups and answers, which may be lost).

        Raises:
            PublishFailed: it could not be handed over within a second.
        """
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                channel = self._sending
                if channel is None or channel.is_closed:
                    channel = await self._open_sending()
                await _publish(channel, exchange, routing_key, message, mandatory=False)
        except TimeoutError as error:
            raise PublishFailed(f"the message could not be handed over within {SEND_TIMEOUT:g} s") from error
        except BrokerUnavailable as error:
            raise PublishFailed(str(error)) from error
        except LIBRARY_ERRORS as error:
            raise PublishFailed(f"the channel was lost: {error}") from error

    async def declare(self, queue: Queue, bindings: Sequence[Binding]) -> None:
        """Declare a queue and its bindings, idempotently.

        Raises:
            declarer.TopologyMismatch: the queue exists with other arguments.
        """
        async with self._requests() as channel:
            await declarer.declare_queue(channel, queue)
            for binding in bindings:
                await declarer.bind(channel, binding)

    async def delete_queue(self, name: str) -> None:
        """Delete a queue with what is in it; one that does not exist is no error."""
        async with self._requests() as channel:
            await call(f"deleting the queue '{name}'", channel.queue_delete(name))

    async def depth(self, queue: str) -> int | None:
        """Ready messages of a queue, or None when it does not exist."""
        try:
            async with self._requests() as channel:
                answer = await call(f"asking for the queue '{queue}'", channel.queue_declare(queue, passive=True))
        except QueueMissing:
            return None
        return answer.message_count or 0

    async def close(self) -> None:
        """Close the channels; the link is its owner's."""
        open_ = [self._sending, self._asking, self._confirming.channel if self._confirming else None]
        self._sending = self._asking = self._confirming = None
        await asyncio.gather(*(quietly(channel.close()) for channel in open_ if channel is not None), *self._closing)

    @asynccontextmanager
    async def _turn(self, message_id: str | None) -> AsyncIterator[None]:
        if message_id is None:
            yield
            return
        while (other := self._in_flight.get(message_id)) is not None:
            await asyncio.wait([other])
        mine = self._in_flight[message_id] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._in_flight[message_id]
            mine.set_result(None)

    @asynccontextmanager
    async def _confirm_channel(self, message_id: str | None) -> AsyncIterator[AbstractChannel]:
        held = self._confirming
        if held is None or held.channel.is_closed or message_id in held.unsettled:
            held = await self._open_confirming(message_id)
        held.publishing += 1
        try:
            yield held.channel
        except asyncio.CancelledError:
            # The broker may yet return this one. On the same channel that return would be taken for the
            # answer to the next publish of the id, so that one gets a new channel.
            if message_id is not None:
                held.unsettled.add(message_id)
                if len(held.unsettled) >= _UNSETTLED_LIMIT:
                    self._retire(held)
            raise
        finally:
            held.publishing -= 1
            if held.retired and not held.publishing:
                self._close_later(held.channel)

    async def _open_confirming(self, message_id: str | None) -> _Confirming:
        async with self._opening:
            held = self._confirming
            if held is not None and not held.channel.is_closed and message_id not in held.unsettled:
                return held
            opened = _Confirming(await self._link.channel(confirms=True))
            if held is not None:
                self._retire(held)
            self._confirming = opened
            return opened

    def _retire(self, held: _Confirming) -> None:
        if self._confirming is held:
            self._confirming = None
        if not held.retired:
            held.retired = True
            if not held.publishing:
                self._close_later(held.channel)

    def _close_later(self, channel: AbstractChannel) -> None:
        task = asyncio.create_task(quietly(channel.close()), name="amqp channel close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _open_sending(self) -> AbstractChannel:
        async with self._opening:
            if self._sending is None or self._sending.is_closed:
                self._sending = await self._link.channel()
            return self._sending

    @asynccontextmanager
    async def _requests(self) -> AsyncIterator[AbstractChannel]:
        """The channel for requests, one at a time: a refused request closes the channel under all of them."""
        async with self._request:
            channel = self._asking
            if channel is None or channel.is_closed:
                channel = await self._link.channel()
            self._asking = None
            try:
                yield channel
                self._asking = channel
            finally:
                if self._asking is None:  # refused (then it is closed) or given up (then it soon will be)
                    self._close_later(channel)


async def _publish(
    channel: AbstractChannel, exchange: str, routing_key: str, message: Message, *, mandatory: bool
) -> None:
    try:
        # A connection that is blocked (memory or disk alarm) takes bytes, and publishes them much later.
        await channel.connection.ready()
        await channel.basic_publish(
            message.body,
            exchange=exchange,
            routing_key=routing_key,
            properties=convert.properties(message),
            mandatory=mandatory,
        )
    except asyncio.CancelledError as error:
        # aiormq ends what waits on a channel that closes with CancelledError, as if we had been cancelled.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the channel closed") from error
