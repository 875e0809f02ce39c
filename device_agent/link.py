"""The one connection to the broker, and the two channels on it: mailbox and uplink.

Everything here runs on one thread, the asyncio loop's; only `Link.call` may be used from others. The link
knows AMQP and reconnecting; what mail and answers mean is its listener's business.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pika
from pika import exceptions, spec
from pika.adapters.utils.connection_workflow import AMQPConnectorSocketConnectError

from device_agent import errors, log, tls
from device_agent.backoff import Backoff
from device_agent.guard import GuardedConnection
from device_agent.identity import Identity
from device_agent.timekeeping import Asker, Times
from topology import names, wire

MAX_UNCONFIRMED = 500  # publishes in flight; beyond, `publish` says no
STABLE_AFTER = 1.0  # seconds a connection must have served before a loss counts as the first again
HEARTBEAT = 30  # seconds
SOCKET_TIMEOUT = 10.0  # seconds to connect
STACK_TIMEOUT = 20.0  # seconds for TCP, TLS and AMQP together; the broker gives up after 10
USER_TIMEOUT = 20_000  # ms that sent bytes may stay unacknowledged before the kernel ends the connection
CLOSE_TIMEOUT = 3.0  # seconds for a clean close

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs every failed attempt as an error; we log our own


@dataclass(frozen=True, slots=True)
class Mail:
    """A delivery from the mailbox. `epoch` says on which connection: a tag of an earlier one can't be acked."""

    tag: int
    epoch: int
    redelivered: bool
    message: wire.Message


class Listener(Protocol):
    """Who is told what the link sees; all calls come on the loop's thread."""

    def link_up(self) -> None:
        """The uplink can be written; the mailbox is not consumed before `open_mailbox`."""

    def link_down(self) -> None:
        """It can't any more. Everything unconfirmed has been given back with False before."""

    def answer(self, message: wire.Message) -> None:
        """Something arrived at the direct reply-to address."""

    def mail(self, mail: Mail) -> None: ...


class Link:
    """Connects for ever, with full-jitter back-off and a new token each time, until stopped."""

    def __init__(
        self,
        identity: Identity,
        renew: Callable[[], Identity],
        follow: Callable[[Sequence[str]], object],
        times: Times,
        listener: Listener,
    ) -> None:
        """`renew` reads the identity again before each connection: its key and pins may be others by then. `follow` is
        told, on another thread, what the authority's successors are said to be."""
        self._identity = identity
        self._renew = renew
        self._times = times
        self._listener = listener
        self._authority = identity.pins.pem(times.floor())
        self._context = tls.pinned(self._authority, times.floor)
        self._asker = Asker(identity.peering.api_url, times, follow)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="restante-io", daemon=True)
        self._connection: GuardedConnection | None = None
        self._uplink: Any = None
        self._mailbox: Any = None
        self._epoch = 0
        self._next_tag = 1
        self._unconfirmed: dict[int, Callable[[bool], None]] = {}
        self._up_since: float | None = None
        self._backoff = Backoff()
        self._dialled_at = 0.0
        self._stopping = False
        self._stopped = threading.Event()
        self.last_error: errors.AgentError | None = None

    @property
    def up(self) -> bool:
        """Can the uplink be written? No longer from the moment the connection is given up."""
        uplink = self._uplink
        return self._up_since is not None and uplink is not None and bool(uplink.is_open)

    @property
    def room(self) -> int:
        """How many more publishes may be in flight now."""
        return MAX_UNCONFIRMED - len(self._unconfirmed) if self.up else 0

    def start(self) -> None:
        self._loop.call_soon(self._connect)
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        return self._stopped.wait(timeout)

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Run the function on the loop's thread, soon; after the stop, never. Safe from any thread."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("link.closed-call")

    def soon(self, function: Callable[..., None], *arguments: object) -> None:
        """Run the function in the loop's next turn. On the loop's thread."""
        self._loop.call_soon(function, *arguments)

    def later(self, delay: float, function: Callable[..., None], *arguments: object) -> asyncio.TimerHandle:
        return self._loop.call_later(delay, function, *arguments)

    def publish(self, key: str, message: wire.Message, done: Callable[[bool], None] | None) -> bool:
        """Publish to `uplink`; `done` is told whether the broker confirmed. False: not now (down, or no room)."""
        if not self.up or len(self._unconfirmed) >= MAX_UNCONFIRMED:
            return False
        self._unconfirmed[self._next_tag] = done or _ignore
        self._next_tag += 1
        self._uplink.basic_publish(names.UPLINK, key, message.body, to_properties(message), mandatory=done is not None)
        return True

    def open_mailbox(self, prefetch: int) -> None:
        """Consume the mailbox on a channel of its own. A second call on the same connection does nothing."""
        if self.up and self._mailbox is None and self._connection is not None:
            epoch = self._epoch
            self._mailbox = self._connection.channel(
                on_open_callback=lambda channel: self._consume_mailbox(channel, prefetch, epoch)
            )

    def close_mailbox(self) -> None:
        """Give back what is not acked, and fetch no more on this connection."""
        # Closing the channel requeues; cancelling the consumer first would make pika reject what is on its way.
        if self._mailbox is not None and self._mailbox.is_open:
            self._mailbox.close()

    def ack(self, mail: Mail) -> None:
        if mail.epoch == self._epoch and self._mailbox is not None and self._mailbox.is_open:
            self._mailbox.basic_ack(mail.tag)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent within leaves in one write, in its order."""
        connection = self._connection
        if connection is None:
            yield
            return
        with connection.together():
            yield

    def reset(self, reason: str) -> None:
        """Give the connection up and come back with back-off: nothing unacked is lost by it."""
        log.warning("link.reset", because=reason)
        self._close()

    def stop(self) -> None:
        """Close cleanly and end the thread. On the loop's thread; stopping twice is stopping once."""
        if self._stopping:
            return
        self._stopping = True
        if self._connection is None or self._connection.is_closed:
            self._loop.stop()
            return
        self._loop.call_later(CLOSE_TIMEOUT, self._loop.stop)
        self._close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
            self._stopped.set()

    def _connect(self) -> None:
        if self._stopping:
            return
        self._look_at_identity()
        peering = self._identity.peering
        parameters = pika.ConnectionParameters(
            host=peering.amqps_host,
            port=peering.amqps_port,
            virtual_host=peering.vhost,
            credentials=pika.PlainCredentials(self._identity.device, self._identity.amqp_token(self._times.now())),
            ssl_options=pika.SSLOptions(self._context, peering.amqps_host),
            heartbeat=HEARTBEAT,
            channel_max=2,
            socket_timeout=SOCKET_TIMEOUT,
            stack_timeout=STACK_TIMEOUT,
            tcp_options={"TCP_USER_TIMEOUT": USER_TIMEOUT},
            client_properties={"product": "restante-agent", "version": wire.VERSION},
        )
        self._epoch += 1
        self._dialled_at = time.monotonic()
        epoch = self._epoch
        self._connection = GuardedConnection(
            parameters,
            on_open_callback=lambda _: self._open_uplink(epoch),
            on_open_error_callback=lambda _, error: self._lost(error, epoch),
            on_close_callback=lambda _, error: self._lost(error, epoch),
            custom_ioloop=self._loop,
        )

    def _look_at_identity(self) -> None:
        try:
            renewed = self._renew()
        except errors.AgentError as error:
            log.warning("identity.unreadable", because=str(error))
            return
        if renewed.key.kid != self._identity.key.kid:
            log.info("identity.new-key", key=renewed.key.kid)
        self._identity = renewed
        authority = renewed.pins.pem(self._times.floor())
        if authority != self._authority:
            self._authority, self._context = authority, tls.pinned(authority, self._times.floor)

    def _open_uplink(self, epoch: int) -> None:
        if epoch == self._epoch and self._connection is not None:
            self._connection.add_on_connection_blocked_callback(lambda *_: log.warning("link.blocked"))
            self._connection.add_on_connection_unblocked_callback(lambda *_: log.info("link.unblocked"))
            self._uplink = self._connection.channel(
                on_open_callback=lambda channel: self._prepare_uplink(channel, epoch)
            )

    def _prepare_uplink(self, channel: Any, epoch: int) -> None:
        self._next_tag = 1
        channel.add_on_close_callback(lambda _, reason: self._channel_closed(reason, epoch))
        channel.add_on_cancel_callback(lambda _: self.reset("the reply consumer was cancelled"))
        channel.confirm_delivery(self._confirmed)
        channel.add_on_return_callback(lambda *_: self._returned())
        channel.basic_consume(
            names.DIRECT_REPLY_TO, self._answered, auto_ack=True, callback=lambda _: self._is_up(epoch)
        )

    def _is_up(self, epoch: int) -> None:
        if epoch != self._epoch or self._stopping:
            return
        self._up_since = time.monotonic()
        self.last_error = None
        peering = self._identity.peering
        log.info("link.up", device=self._identity.device, host=peering.amqps_host, port=peering.amqps_port)
        self._listener.link_up()

    def _consume_mailbox(self, channel: Any, prefetch: int, epoch: int) -> None:
        channel.add_on_close_callback(lambda _, reason: self._channel_closed(reason, epoch))
        channel.add_on_cancel_callback(lambda _: self.reset("the mailbox's consumer was cancelled"))
        channel.basic_qos(prefetch_count=prefetch)

        def delivered(_: object, method: Any, properties: Any, body: bytes) -> None:
            self._listener.mail(Mail(method.delivery_tag, epoch, method.redelivered, from_properties(properties, body)))

        channel.basic_consume(names.mailbox(self._identity.device), delivered)

    def _answered(self, _: object, __: object, properties: Any, body: bytes) -> None:
        self._listener.answer(from_properties(properties, body))

    def _confirmed(self, frame: Any) -> None:
        method = frame.method
        tags = (
            [tag for tag in self._unconfirmed if tag <= method.delivery_tag]
            if method.multiple
            else [method.delivery_tag]
        )
        for tag in tags:
            done = self._unconfirmed.pop(tag, None)
            if done is not None:
                done(isinstance(method, spec.Basic.Ack))

    def _returned(self) -> None:
        """The broker has no queue for what was said, as when it is just being made again: it confirms all the same.

        A return doesn't tell the publish's number, so everything unconfirmed is given back, to be said again.
        """
        log.warning("link.returned", unconfirmed=len(self._unconfirmed))
        self._give_back()

    def _give_back(self) -> None:
        pending, self._unconfirmed = self._unconfirmed, {}
        for done in pending.values():
            done(False)

    def _channel_closed(self, reason: BaseException, epoch: int) -> None:
        if epoch != self._epoch or isinstance(reason, exceptions.ChannelClosedByClient):
            return
        if isinstance(reason, exceptions.ChannelClosedByBroker):
            # A channel the broker closed (no mailbox, no right, an unacked delivery too old) is not repaired
            # in place: a new connection has one well-trodden way up.
            log.warning("link.channel-closed", code=reason.reply_code, text=reason.reply_text)
            self._close()

    def _close(self) -> None:
        connection = self._connection
        if connection is not None and not connection.is_closed and not connection.is_closing:
            connection.close()

    def _lost(self, error: BaseException, epoch: int) -> None:
        if epoch != self._epoch:
            return
        was_up = self._up_since
        self._up_since = None
        self._connection = self._uplink = self._mailbox = None
        self._give_back()
        if was_up is not None:
            self._listener.link_down()
            if time.monotonic() - was_up >= STABLE_AFTER:
                self._backoff.served()
        if self._stopping:
            self._loop.stop()
            return
        peering = self._identity.peering
        self.last_error = _translate(error, peering.amqps_host, peering.amqps_port)
        self._asker.consider(self.last_error, self._authority)
        level = logging.WARNING if was_up is not None or self._backoff.failures == 0 else logging.DEBUG
        reached = was_up is None and not any(isinstance(it, AMQPConnectorSocketConnectError) for it in _layers(error))
        took = time.monotonic() - self._dialled_at if reached else None
        delay = self._backoff.wait(took, random.random())  # noqa: S311 - jitter
        log.event(level, "link.down", code=self.last_error.code, because=str(self.last_error), retry_in=delay)
        self._loop.call_later(delay, self._connect)


def to_properties(message: wire.Message) -> Any:
    """The wire's message as pika's properties."""
    return pika.BasicProperties(
        type=message.type,
        headers=dict(message.headers),
        content_type=message.content_type,
        message_id=message.message_id,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        user_id=message.user_id,
        expiration=None if message.expiration_ms is None else str(message.expiration_ms),
        delivery_mode=2 if message.persistent else 1,
    )


def from_properties(properties: Any, body: bytes) -> wire.Message:
    return wire.Message(
        type=properties.type,
        headers=properties.headers or {},
        body=body,
        content_type=properties.content_type,
        message_id=properties.message_id,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        user_id=properties.user_id,
    )


def _ignore(_: bool) -> None:
    return


def _translate(error: BaseException, host: str, port: int) -> errors.AgentError:
    """What happened lies under several layers of pika's; the innermost telling one is found and put in words."""
    found = list(_layers(error))
    for one in found:
        if isinstance(one, OSError):  # ssl's errors are among them
            return tls.translate(one, host, port)
        if isinstance(one, exceptions.ProbableAuthenticationError | exceptions.ProbableAccessDeniedError):
            return errors.LoginRefused(
                f"{host}:{port} refused this device's login: it is disabled, revoked or enrolled anew elsewhere,"
                " or this machine's clock is far off"
            )
        if isinstance(one, exceptions.ConnectionClosedByBroker):
            return errors.Unreachable(f"{host}:{port} closed the connection: {one.reply_code} {one.reply_text}")
        if isinstance(one, exceptions.ConnectionClosedByClient):
            return errors.Unreachable(f"the connection to {host}:{port} was given up")
    return errors.Unreachable(f"the connection to {host}:{port} was lost ({type(found[-1]).__name__}: {found[-1]})")


def _layers(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    yield error
    if depth < 6:
        inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None), *error.args, error.__cause__]
        for one in inner:
            if isinstance(one, BaseException):
                yield from _layers(one, depth + 1)
