"""Reads streams over AMQP 0-9-1, each reader at its own offset."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.common import FieldValue

from fabric.amqp import convert
from fabric.amqp.connection import LIBRARY_ERRORS, Link, call, quietly
from fabric.errors import BrokerUnavailable, FabricError
from fabric.ports import Delivery

PREFETCH = 200  # messages in hand; acks give credit and settle nothing
LONGEST_BACKOFF = 5.0  # seconds between attempts to attach again
_OFFSET = "x-stream-offset"

_log = logging.getLogger(__name__)


class AmqpStreamReader:
    """The port `fabric.ports.StreamReader`. Each reader takes one channel of the link (the broker allows 16)."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @asynccontextmanager
    async def read(self, stream: str, offset: str | int) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Messages of a stream from `first`, `next` or an offset, as they come, without end.

        After a lost connection it goes on behind the last message it gave. An offset that the stream has
        dropped starts at the oldest kept; one beyond the end waits until the stream has grown that far.
        The deliveries need no ack.

        Raises:
            QueueMissing: no such stream (on entry).
            BrokerUnavailable: the broker can't be reached (on entry), or the link was stopped (while reading).
        """
        reading = _Reading(self._link, stream, offset)
        try:
            await reading.attach()
            async with contextlib.aclosing(reading.deliveries()) as deliveries:
                yield deliveries
        finally:
            await reading.detach()


class _Reading:
    def __init__(self, link: Link, stream: str, offset: str | int) -> None:
        self._link = link
        self._stream = stream
        self._from: FieldValue = offset
        self._began: datetime | None = None
        self._channel: AbstractChannel | None = None
        self._arrived: asyncio.Queue[DeliveredMessage | None] = asyncio.Queue()  # bounded by the prefetch

    async def attach(self) -> None:
        if self._from == "next":
            if self._began is not None:
                # Nothing came before the connection was lost: what was published meanwhile is still new.
                self._from = self._began
            self._began = datetime.fromtimestamp(int(time.time()), UTC)
        channel = await self._link.channel()
        self._channel = channel
        arrived = self._arrived = asyncio.Queue()
        channel.closing.add_done_callback(lambda _: arrived.put_nowait(None))
        channel.on_consumer_cancel_callbacks.add(lambda _: arrived.put_nowait(None))

        async def take(delivered: DeliveredMessage) -> None:
            arrived.put_nowait(delivered)

        await call("setting the prefetch", channel.basic_qos(prefetch_count=PREFETCH))
        request = channel.basic_consume(self._stream, take, arguments={_OFFSET: self._from})
        await call(f"reading the stream '{self._stream}'", request)

    async def detach(self) -> None:
        """Close the channel; its consumer goes with it."""
        if self._channel is not None:
            await quietly(self._channel.close())

    async def deliveries(self) -> AsyncGenerator[Delivery, None]:
        unacked = 0
        while True:
            delivered = await self._arrived.get()
            if delivered is None:
                await self._attach_again()
                unacked = 0
                continue
            unacked += 1
            if unacked >= PREFETCH // 2:
                unacked = 0
                with contextlib.suppress(*LIBRARY_ERRORS):  # lost: the next message says so
                    await delivered.channel.basic_ack(delivered.delivery_tag or 0, multiple=True)
            yield self._delivery(delivered)

    def _delivery(self, delivered: DeliveredMessage) -> Delivery:
        message = convert.message(delivered)
        found = message.headers.get(_OFFSET)
        if isinstance(found, int):
            offset: int | None = found
        else:
            # Undecodable mail has lost its offset with its headers: it is the one behind the last.
            offset = self._from if isinstance(self._from, int) else None
        if offset is not None:
            self._from = offset + 1
        return Delivery(
            message=message,
            exchange=delivered.exchange or "",
            routing_key=delivered.routing_key or "",
            redelivered=bool(delivered.redelivered),
            ack=_nothing,
            offset=offset,
        )

    async def _attach_again(self) -> None:
        await self.detach()
        failures = 0
        while True:
            try:
                await self.attach()
            except FabricError as error:
                if self._link.stopped:
                    raise BrokerUnavailable(
                        f"reading the stream '{self._stream}' ended: the link is stopped"
                    ) from error
                _log.debug("stream-attach-failed stream=%s error=%.300r", self._stream, str(error))
                await self.detach()
                failures = min(failures + 1, 16)
                await asyncio.sleep(random.uniform(0, min(LONGEST_BACKOFF, 0.1 * 2**failures)))  # noqa: S311
            else:
                return


async def _nothing() -> None:
    """Streams keep what was read: there is nothing to settle."""
