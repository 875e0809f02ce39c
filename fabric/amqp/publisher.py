"""Publishes over a link of its own: confirmed on one channel, in order on another, unconfirmed on a third, requests on
a fourth.

No call outlasts its time limit, also while the broker is away.
"""

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from aiormq import exceptions
from aiormq.abc import AbstractChannel

from fabric.amqp import convert, declarer
from fabric.amqp.connection import LIBRARY_ERRORS, Link, QueueMissing, call, quietly
from fabric.errors import BrokerUnavailable, NoMailbox, PublishFailed
from fabric.measures import Histogram
from fabric.ports import PublishAll
from topology.layout import Binding, Queue
from topology.wire import Message

SEND_TIMEOUT = 1.0  # seconds: what may be lost is not waited for
_UNSETTLED_LIMIT = 1_000  # publishes of unknown fate on one channel, until it is replaced


class Fate(enum.StrEnum):
    """What became of a publish that waited for its confirm."""

    CONFIRMED = "confirmed"
    NACKED = "nacked"
    RETURNED = "returned"
    TIMED_OUT = "timed-out"
    LOST = "lost"


@dataclass(slots=True)
class _Confirming:
    """A channel in confirm mode. `unsettled`: ids whose publisher gave up before the broker answered."""

    channel: AbstractChannel
    publishing: int = 0
    retired: bool = False
    unsettled: set[str] = field(default_factory=set)


class AmqpPublisher:
    """The port `fabric.ports.Publisher`.

    Attributes:
        fates: how long it took until that was known of publishes that wait for it.
    """

    def __init__(self, link: Link) -> None:
        self.fates: Mapping[Fate, Histogram] = {fate: Histogram() for fate in Fate}
        self._link = link
        self._confirming: _Confirming | None = None
        self._sending: AbstractChannel | None = None
        self._ordered, self._asking = _Kept(link, confirms=True), _Kept(link, confirms=False)
        self._opening = asyncio.Lock()
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
        with self._told(exchange, routing_key, timeout):
            async with (
                asyncio.timeout(timeout),
                self._turn(message.message_id),
                self._confirm_channel(message.message_id) as channel,
            ):
                await _publish(channel, exchange, routing_key, message, mandatory=mandatory)

    @asynccontextmanager
    async def in_order(self, exchange: str, routing_key: str) -> AsyncIterator[PublishAll]:
        """One channel of the connection that there is now; what is published goes over it, or nowhere.

        Raises:
            BrokerUnavailable: there is no connection (on entry).
            PublishFailed: nacked, returned, timed out, or the channel was lost: the fate is unknown.
        """
        async with self._ordered.taken() as channel:

            async def publish(messages: Sequence[Message], timeout: float = 5.0) -> None:
                try:
                    with self._told(exchange, routing_key, timeout, len(messages)):
                        async with asyncio.timeout(timeout):
                            await asyncio.gather(
                                *(_publish(channel, exchange, routing_key, each, mandatory=True) for each in messages)
                            )
                except NoMailbox as error:
                    raise PublishFailed(str(error)) from error

            yield publish

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
        async with self._asking.taken() as channel:
            await declarer.declare_queue(channel, queue)
            for binding in bindings:
                await declarer.bind(channel, binding)

    async def delete_queue(self, name: str) -> None:
        """Delete a queue with what is in it; one that does not exist is no error."""
        async with self._asking.taken() as channel:
            await call(f"deleting the queue '{name}'", channel.queue_delete(name))

    async def depth(self, queue: str) -> int | None:
        """Ready messages of a queue, or None when it does not exist."""
        try:
            async with self._asking.taken() as channel:
                answer = await call(f"asking for the queue '{queue}'", channel.queue_declare(queue, passive=True))
        except QueueMissing:
            return None
        return answer.message_count or 0

    async def close(self) -> None:
        """Close the channels; the link is its owner's."""
        open_ = [self._sending, self._confirming.channel if self._confirming else None]
        self._sending = self._confirming = None
        await asyncio.gather(
            *(quietly(channel.close()) for channel in open_ if channel is not None),
            *self._closing,
            self._ordered.close(),
            self._asking.close(),
        )

    @contextmanager
    def _told(self, exchange: str, routing_key: str, timeout: float, messages: int = 1) -> Iterator[None]:
        """What the library raises, as what became of a confirmed publish; of `messages`, all or some."""
        began, fate = time.perf_counter(), Fate.LOST
        try:
            yield
            fate = Fate.CONFIRMED
        except exceptions.PublishError as error:
            fate = Fate.RETURNED
            raise NoMailbox(f"no queue is bound to '{exchange}' for '{routing_key}'") from error
        except exceptions.DeliveryError as error:
            fate = Fate.NACKED
            raise PublishFailed("the broker refused the message (nack): a queue is full or unavailable") from error
        except TimeoutError as error:
            fate = Fate.TIMED_OUT
            raise PublishFailed(f"the broker did not confirm within {timeout:g} s") from error
        except BrokerUnavailable as error:
            raise PublishFailed(str(error)) from error
        except LIBRARY_ERRORS as error:
            raise PublishFailed(f"the channel was lost before the broker confirmed: {error}") from error
        finally:
            took = time.perf_counter() - began
            for _ in range(messages):
                self.fates[fate].observe(took)

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


class _Kept:
    """A channel that one at a time takes, replaced once something has gone wrong while it was taken: a refused request
    closes it, and what was given up may yet be answered."""

    def __init__(self, link: Link, *, confirms: bool) -> None:
        self._link, self._confirms = link, confirms
        self._channel: AbstractChannel | None = None
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[AbstractChannel]:
        """Raises `BrokerUnavailable`."""
        async with self._turn:
            channel = self._channel
            if channel is None or channel.is_closed:
                channel = await self._link.channel(confirms=self._confirms)
            self._channel = None
            try:
                yield channel
                self._channel = channel
            finally:
                if self._channel is None:
                    await quietly(channel.close())

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await quietly(channel.close())


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
            # Whoever waits for a confirm need not first wait for the socket, one after the other.
            wait=not channel.publisher_confirms,  # type: ignore[attr-defined, call-arg]  # only the abstract channel lacks them
        )
    except asyncio.CancelledError as error:
        # aiormq ends what waits on a channel that closes with CancelledError, as if we had been cancelled.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the channel closed") from error
