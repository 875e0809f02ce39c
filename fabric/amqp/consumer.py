"""Consumes a queue, and goes on after whatever ended it: a lost connection, a closed channel, a cancel."""

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Awaitable, Callable

from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.common import FieldTable

from fabric.amqp import convert
from fabric.amqp.connection import CLOSE_TIMEOUT, LIBRARY_ERRORS, Link, call, quietly
from fabric.errors import FabricError
from fabric.ports import Delivery
from topology import names

FIRST_BACKOFF = 0.1  # seconds, doubled with each failure, of the handler or of setting up
LONGEST_BACKOFF = 5.0  # seconds
DRAIN_TIMEOUT = 5.0  # seconds that `stop` gives handlers to finish
WAKE_LIMIT = 10_000  # messages of a wake queue; a gateway that far behind reads the ledger anyway

_log = logging.getLogger(__name__)

Handler = Callable[[Delivery], Awaitable[None]]
OnStart = Callable[[int], None]
SetUp = Callable[[AbstractChannel], Awaitable[tuple[str, int]]]


class Consumer:
    """Calls `handler` once for each message, up to `prefetch` at a time, in the order of the queue.

    The handler (or whomever it hands the delivery to) acks. When it raises, the message goes back to the
    queue after a back-off. A handler is not interrupted when the connection is lost: its ack is then
    forgotten, and the message comes again.

    Attributes:
        found: messages that were ready when it last (re)connected, None before.
        consuming: set while messages can come.
    """

    def __init__(
        self,
        link: Link,
        queue: str,
        handler: Handler,
        *,
        prefetch: int = 100,
        on_start: OnStart | None = None,
        set_up: SetUp | None = None,
        settles: bool = True,
    ) -> None:
        """Describe a consumer.

        Args:
            link: over which; use one that publishes nothing, or an alarm blocks the acks too.
            queue: its name.
            handler: called for each message.
            prefetch: messages in hand at most, and so handlers at once.
            on_start: gets the depth found at each (re)connect, before the first message is handled.
            set_up: what to do on the new channel instead of asking for the depth: returns the queue and its depth.
            settles: False for a queue that goes with the connection: to the broker, what it has sent is done. Then
                `ack` does nothing, what the handler fails on is gone, and there is no prefetch.
        """
        self._link = link
        self._queue = queue
        self._handler = handler
        self._prefetch = prefetch
        self._on_start = on_start
        self._set_up = set_up or self._ask_depth
        self._settles = settles
        self._task: asyncio.Task[None] | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._acks: _Acks | _NoAcks | None = None
        self.found: int | None = None
        self.consuming = asyncio.Event()

    @property
    def settled(self) -> int:
        """Messages acked since the last (re)connect."""
        return self._acks.settled if self._acks is not None else 0

    @property
    def backlog(self) -> int | None:
        """How many of the messages found at the last (re)connect this consumer may still have to settle."""
        return None if self.found is None else max(0, self.found - self.settled)

    async def start(self) -> None:
        """Start, and return at once; `consuming` is set while messages can come. Starting twice is starting once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"consumer of {self._queue}")

    async def stop(self) -> None:
        """Stop fetching, let the handlers finish, send the acks. Stopping twice is stopping once."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            for handler in self._handlers:
                handler.cancel()
            if self._handlers:
                await asyncio.wait(set(self._handlers))

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                channel = await self._link.channel()
                try:
                    await self._consume(channel)
                finally:
                    self.consuming.clear()
                    await quietly(channel.close())
            except FabricError as error:
                failures = min(failures + 1, 16)
                reason = str(error)
            else:
                failures = 1
                reason = "the channel closed, or the broker cancelled the consumer"
            if self._link.stopped:
                return
            level = logging.WARNING if failures == 1 else logging.DEBUG
            _log.log(level, "consumer-lost queue=%s reason=%.300r", self._queue, reason)
            await asyncio.sleep(_backoff(failures))

    async def _consume(self, channel: AbstractChannel) -> None:
        """Set up on the channel, and return when it, or the consumer, is gone."""
        lost = asyncio.Event()
        channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())
        channel.closing.add_done_callback(lambda _: lost.set())
        queue, depth = await call(f"asking for the queue '{self._queue}'", self._set_up(channel))
        await call("setting the prefetch", channel.basic_qos(prefetch_count=self._prefetch))
        acks = self._acks = _Acks(channel) if self._settles else _NoAcks()
        self.found = depth
        if self._on_start is not None:
            self._on_start(depth)

        async def take(delivered: DeliveredMessage) -> None:
            self._take(delivered, acks)

        answer = await call(f"consuming '{self._queue}'", channel.basic_consume(queue, take, no_ack=not self._settles))
        self.consuming.set()
        try:
            await lost.wait()
        except asyncio.CancelledError:
            await quietly(channel.basic_cancel(answer.consumer_tag or ""))
            if self._handlers:
                await asyncio.wait(set(self._handlers), timeout=DRAIN_TIMEOUT)
            raise
        finally:
            await acks.finish()

    async def _ask_depth(self, channel: AbstractChannel) -> tuple[str, int]:
        answer = await channel.queue_declare(self._queue, passive=True)
        return self._queue, answer.message_count or 0

    def _take(self, delivered: DeliveredMessage, acks: "_Acks | _NoAcks") -> None:
        tag = delivered.delivery_tag or 0
        delivery = Delivery(
            message=convert.message(delivered),
            exchange=delivered.exchange or "",
            routing_key=delivered.routing_key or "",
            redelivered=bool(delivered.redelivered),
            ack=acks.open(tag),
        )
        # Not a task of the channel's: aiormq cancels those when the channel closes, in the middle of a write.
        task = asyncio.create_task(self._handle(delivery, tag, acks))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, delivery: Delivery, tag: int, acks: "_Acks | _NoAcks") -> None:
        try:
            await self._handler(delivery)
        except Exception as error:  # noqa: BLE001 - one message must not stop the others
            self._failures = min(self._failures + 1, 16)
            _log.log(
                logging.WARNING if self._failures == 1 else logging.DEBUG,
                "handler-failed queue=%s key=%.300r error=%.300r",
                self._queue,
                delivery.routing_key,
                f"{type(error).__name__}: {error}",
            )
            await asyncio.sleep(_backoff(self._failures))
            await acks.requeue(tag)
        else:
            self._failures = 0


class _Acks:
    """The unsettled deliveries of one channel. Acks go out together, a run of tags in one frame."""

    def __init__(self, channel: AbstractChannel) -> None:
        self._channel = channel
        self._open: dict[int, None] = {}  # an ordered set: tags come in ascending order
        self._acked: set[int] = set()
        self._some = asyncio.Event()
        self._finished = False
        self._task = asyncio.create_task(self._run(), name="acks")
        self.settled = 0

    def open(self, tag: int) -> Callable[[], Awaitable[None]]:
        """Note a delivery; returns what acks it."""
        self._open[tag] = None

        async def ack() -> None:
            if tag in self._acked or tag not in self._open:
                _log.warning("settled-twice tag=%s second=ack", tag)
                return
            self._acked.add(tag)
            self.settled += 1
            self._some.set()

        return ack

    async def requeue(self, tag: int) -> None:
        if tag in self._acked or tag not in self._open:
            return  # the handler acked before it failed
        del self._open[tag]
        await quietly(self._channel.basic_nack(tag, requeue=True))  # a lost channel requeues by itself

    async def finish(self) -> None:
        """Send what is left and end."""
        self._finished = True
        self._some.set()
        await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT)
        self._task.cancel()

    async def _run(self) -> None:
        with contextlib.suppress(*LIBRARY_ERRORS):  # a lost channel: the messages come again
            while not self._finished or self._acked:
                await self._some.wait()
                self._some.clear()
                await self._flush()

    async def _flush(self) -> None:
        acked, self._acked = self._acked, set()
        run = 0
        for tag in self._open:
            if tag not in acked:
                break
            run = tag
        for tag in acked:
            del self._open[tag]
        if run:
            await self._channel.basic_ack(run, multiple=True)
        for tag in sorted(acked):
            if tag > run:
                await self._channel.basic_ack(tag, wait=False)


class _NoAcks:
    """What `_Acks` is, where nothing is to be settled."""

    settled = 0

    def open(self, _: int) -> Callable[[], Awaitable[None]]:
        return self.finish

    async def requeue(self, _: int) -> None:
        pass

    async def finish(self) -> None:
        pass


def wake_consumer(link: Link, handler: Handler) -> Consumer:
    """A consumer of everything published to the exchange `wake` from now on, in a queue of its own.

    The queue goes with the connection, and each new connection declares another.
    """

    async def declare(channel: AbstractChannel) -> tuple[str, int]:
        # A name of its own each time: the broker may not have noticed yet that the last connection is gone.
        name = f"{names.WAKE}.{uuid.uuid4()}"
        arguments: FieldTable = {"x-queue-type": "classic", "x-max-length": WAKE_LIMIT}
        await channel.queue_declare(name, exclusive=True, auto_delete=True, arguments=arguments)
        await channel.queue_bind(name, names.WAKE)
        return name, 0

    return Consumer(link, names.WAKE, handler, set_up=declare, settles=False)


def _backoff(failures: int) -> float:
    return random.uniform(0, min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (failures - 1)))  # noqa: S311
