"""A connection to the broker that we supervise ourselves.

aio-pika's robust connection waits a fixed 5 s between attempts, restores consumers that sometimes never
come back, and lets a publish hang while it is away. Here one task per link connects, runs the callbacks,
waits for the loss, and starts again with exponential back-off and full jitter; whoever works over the link
asks it for a channel and sets itself up again.
"""

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiormq
from aiormq import exceptions
from aiormq.abc import AbstractChannel
from yarl import URL

from fabric.amqp import guard
from fabric.errors import BrokerUnavailable, FabricError, Temporary
from topology import names

CONNECT_TIMEOUT = 5.0  # seconds for TCP, TLS and the AMQP handshake
CALL_TIMEOUT = 5.0  # seconds for one request on a channel
CALLBACKS_TIMEOUT = 30.0  # seconds for all callbacks of one connection
CLOSE_TIMEOUT = 3.0  # seconds until a close is no longer waited for
HEARTBEAT = 10  # seconds
FIRST_BACKOFF = 0.2  # seconds, doubled with each failure
LONGEST_BACKOFF = 3.0  # seconds: a fabric has few links, and commands wait for them
REFUSED_BACKOFF = 30.0  # seconds, after refused credentials: nothing but a person changes those
STEADY_AFTER = 10.0  # seconds a connection must have lived for the back-off to start over
_TEXT_LIMIT = 300  # characters of a library's error text

_log = logging.getLogger(__name__)
# Every loss and failure is logged here, once and with its context; aiormq's records, at ERROR and with
# tracebacks, would repeat each.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)

T = TypeVar("T")
OnConnect = Callable[["Link"], Awaitable[None]]


class BrokerRefused(FabricError):
    """The broker won't do what was asked: a right is missing. The installation is wrong, not a caller, so
    this is none of the errors that a caller is told about."""

    code = "broker-refused"


class QueueMissing(BrokerRefused):
    """There is no such queue, stream or exchange."""


class Mismatched(BrokerRefused):
    """It exists with other properties, or another connection has it for itself."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a broker listens, and as whom to log in. `tls` is the context for AMQPS, None for AMQP."""

    host: str
    port: int
    username: str
    password: str = field(repr=False)
    vhost: str = names.VHOST
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.username}@{self.host}:{self.port}/{self.vhost}"


class _Connection(aiormq.Connection):
    HEARTBEAT_GRACE_MULTIPLIER = 2  # of HEARTBEAT + 1 s, until a silent broker counts as gone


class Link:
    """One connection, kept up from `start` to `stop`.

    `connected` is set while it is up and its callbacks have run.
    """

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        """`name` is what the broker shows for the connection.

        Raises:
            guard.Unguarded: pamqp decodes poison unguarded.
        """
        guard.install()
        guard.check()
        self.endpoint = endpoint
        self.name = name
        self.connected = asyncio.Event()
        self._callbacks: list[OnConnect] = []
        self._connection: aiormq.Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()  # connected, failed or stopped: whoever waits looks again
        self._failure: Exception | None = None

    def on_connect(self, callback: OnConnect) -> None:
        """Await `callback` after each connect, in the order of registration and before `connected` is set.
        One that raises makes the link close and try again."""
        self._callbacks.append(callback)

    async def start(self) -> None:
        """Start connecting, and return at once. Starting twice is starting once."""
        if self._task is None and not self._stopped.is_set():
            self._task = asyncio.create_task(self._run(), name=f"amqp link {self.name}")

    async def stop(self) -> None:
        """Close the connection and stop. Stopping twice is stopping once."""
        self._stopped.set()
        self._notify()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    @property
    def stopped(self) -> bool:
        """Has it been told to stop?"""
        return self._stopped.is_set()

    async def ready(self, limit: float = CONNECT_TIMEOUT) -> None:
        """Return once connected.

        Raises:
            BrokerUnavailable: not within `limit` seconds, or stopped; the text says what the last attempt met.
            FabricError: a callback failed for good (another program declared the topology differently).
        """
        try:
            async with asyncio.timeout(limit):
                while not self.connected.is_set():
                    if self._stopped.is_set():
                        raise BrokerUnavailable(f"the link '{self.name}' to the broker is stopped")
                    if isinstance(self._failure, FabricError) and not isinstance(self._failure, Temporary):
                        raise self._failure
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            met = f": {_capped(self._failure)}" if self._failure is not None else ""
            raise BrokerUnavailable(f"no connection to the broker {self.endpoint} within {limit:g} s{met}") from None

    async def channel(self, *, confirms: bool = False, limit: float = CALL_TIMEOUT) -> AbstractChannel:
        """A new channel on the connection, waiting up to `limit` seconds for it. Whoever opens it closes it.

        Raises:
            BrokerUnavailable: not in time, or all channels are taken.
        """
        if not self.connected.is_set():
            await self.ready(limit)
        return await self._open(confirms=confirms)

    @contextlib.asynccontextmanager
    async def throwaway(self) -> AsyncIterator[AbstractChannel]:
        """A channel for requests that may fail, which closes it. Works inside `on_connect` callbacks, too."""
        if self._connection is None:
            await self.ready()
        channel = await self._open(confirms=False)
        try:
            yield channel
        finally:
            await quietly(channel.close())

    async def _open(self, *, confirms: bool) -> AbstractChannel:
        connection = self._connection
        if connection is None or connection.is_closed:
            raise BrokerUnavailable(f"the link '{self.name}' has just lost its connection")
        return await call("opening a channel", self._take_number(connection, confirms=confirms))

    async def _take_number(self, connection: aiormq.Connection, *, confirms: bool) -> AbstractChannel:
        # aiormq counts upwards from the highest number in use, past the broker's limit if it must.
        limit = connection.connection_tune.channel_max or 65_535
        number = next((n for n in range(1, limit + 1) if n not in connection.channels), None)
        if number is None:
            raise BrokerUnavailable(f"all {limit} channels of the link '{self.name}' are in use")
        return await connection.channel(number, publisher_confirms=confirms)

    async def _run(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            up = False
            try:
                async with self._session() as connection:
                    up = True
                    if failures:
                        _log.info("broker-reconnected link=%s endpoint=%s", self.name, self.endpoint)
                    began = time.monotonic()
                    await self._lost(connection.closing)
            except Exception as error:  # noqa: BLE001 - a link outlives whatever happens to its connections
                self._failure = error
            if up and time.monotonic() - began > STEADY_AFTER:
                failures = 0
            self._report(up=up, repeated=failures > 0)
            self._notify()
            await asyncio.sleep(self._backoff(failures))
            failures = min(failures + 1, 16)

    def _backoff(self, failures: int) -> float:
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2**failures)
        if isinstance(self._failure, exceptions.ProbableAuthenticationError):
            longest = REFUSED_BACKOFF
        return random.uniform(0, longest)  # noqa: S311 - not a secret

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiormq.Connection]:
        connection = _Connection(self._url(), context=self.endpoint.tls)
        try:
            await bounded(connection.connect(), CONNECT_TIMEOUT)
            self._connection = connection
            async with asyncio.timeout(CALLBACKS_TIMEOUT):
                for callback in self._callbacks:
                    await callback(self)
            self._failure = None
            self.connected.set()
            self._notify()
            yield connection
        finally:
            self.connected.clear()
            self._connection = None
            await quietly(connection.close())

    async def _lost(self, closing: asyncio.Future[Any]) -> None:
        """Wait for the end of the connection and raise what ended it."""
        await asyncio.wait([closing])
        error = None if closing.cancelled() else closing.exception()
        raise BrokerUnavailable(f"connection lost: {_capped(error)}") from error

    def _url(self) -> URL:
        place = self.endpoint
        return URL.build(
            scheme="amqps" if place.tls else "amqp",
            user=place.username,
            password=place.password,
            host=place.host,
            port=place.port,
            path=f"/{place.vhost}",
            query={"heartbeat": str(HEARTBEAT), "name": self.name},
        )

    def _report(self, *, up: bool, repeated: bool) -> None:
        error = self._failure
        if isinstance(error, exceptions.AuthenticationError | exceptions.ProbableAuthenticationError):
            event, level = "broker-refused-credentials", logging.ERROR
        elif isinstance(error, FabricError) and not isinstance(error, Temporary):
            event, level = "broker-setup-failed", logging.ERROR
        elif up:
            event, level = "broker-lost", logging.WARNING
        else:
            event, level = "broker-unreachable", logging.WARNING
        _log.log(
            logging.DEBUG if repeated else level,
            "%s link=%s endpoint=%s error=%s",
            event,
            self.name,
            self.endpoint,
            _capped(error),
        )

    def _notify(self) -> None:
        self._changed.set()


# What aiormq raises on a connection or channel that is gone: RuntimeError("… closed") among it.
LIBRARY_ERRORS = (exceptions.AMQPError, OSError, RuntimeError, EOFError)

# Requests that were given up. Cancelled, aiormq still wants to close their channel, which takes until the
# connection ends if the broker has stopped reading.
_abandoned: set[asyncio.Future[Any]] = set()


async def bounded(request: Awaitable[T], limit: float) -> T:
    """The answer to a request of aiormq's, waiting `limit` seconds and not a moment more.

    Raises:
        TimeoutError: no answer in time.
        ConnectionError: the channel closed under the request.
    """
    task = asyncio.ensure_future(request)
    try:
        done, _ = await asyncio.wait([task], timeout=limit)
    finally:
        if not task.done():
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_forget)
    if not done:
        raise TimeoutError
    if task.cancelled():  # how aiormq ends what waits on a channel that closes
        raise ConnectionError("the channel closed")
    return task.result()


async def call(what: str, request: Awaitable[T], limit: float = CALL_TIMEOUT) -> T:
    """`bounded`, with the fabric's errors.

    Raises:
        BrokerRefused: the broker said no; `QueueMissing` and `Mismatched` when it said why.
        BrokerUnavailable: anything else, a time-out included.
    """
    try:
        return await bounded(request, limit)
    except FabricError:
        raise
    except TimeoutError as error:
        raise BrokerUnavailable(f"{what}: no answer within {limit:g} s") from error
    except exceptions.ChannelNotFoundEntity as error:
        raise QueueMissing(f"{what}: {_capped(error)}") from error
    except exceptions.ChannelAccessRefused as error:
        raise BrokerRefused(f"{what}: {_capped(error)}") from error
    except (exceptions.ChannelPreconditionFailed, exceptions.ChannelLockedResource) as error:
        raise Mismatched(f"{what}: {_capped(error)}") from error
    except LIBRARY_ERRORS as error:
        raise BrokerUnavailable(f"{what}: {_capped(error)}") from error


async def quietly(request: Awaitable[object], limit: float = CLOSE_TIMEOUT) -> None:
    """`bounded`, for what is tidied up: raises nothing."""
    with contextlib.suppress(Exception):
        await bounded(request, limit)


def _forget(request: asyncio.Future[Any]) -> None:
    _abandoned.discard(request)
    if not request.cancelled():
        request.exception()  # retrieved, or asyncio complains


def _capped(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:_TEXT_LIMIT] if error is not None else "closed"
