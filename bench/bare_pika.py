"""Bare AMQP command round trips: what the broker allows bare pika clients, without anything of the fabric.

A sender publishes persistent messages, confirmed and mandatory, to the durable queues of its devices in turn, and keeps
so many in flight; each device consumes its own queue over TLS, acks, and answers by direct reply-to. A round trip is
done when both its confirm and its answer are there. The programs of both sides are `native/amqp_floor.c` too, on
librabbitmq: the physical limit.

    python -m bench.bare_pika devices HOST PORT AUTHORITY USER VHOST PREFIX FIRST COUNT
    python -m bench.bare_pika load HOST PORT USER VHOST PREFIX COUNT IN_FLIGHT
"""

import asyncio
import os
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pika
import uvloop
from pika.adapters.asyncio_connection import AsyncioConnection

from bench.run import percentile
from topology import names

PASSWORD = "BENCH_PASSWORD"  # noqa: S105 - the name of a variable
AT_ONCE = 16  # connections that are made at the same time
PREFETCH = 3


async def channel(host: str, port: int, authority: str, user: str, vhost: str) -> Any:
    """A channel on a connection of its own; over TLS if an authority is given."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[Any] = loop.create_future()

    def fail(_: object, error: BaseException) -> None:
        if not opened.done():
            opened.set_exception(error)
        else:
            sys.exit(f"bench.bare_pika: a connection was lost: {error!r}")

    context = pika.SSLOptions(ssl.create_default_context(cafile=authority), host) if authority else None
    parameters = pika.ConnectionParameters(
        host, port, vhost, pika.PlainCredentials(user, os.environ[PASSWORD]), ssl_options=context, heartbeat=0
    )
    AsyncioConnection(
        parameters,
        on_open_callback=lambda connection: connection.channel(on_open_callback=opened.set_result),
        on_open_error_callback=fail,
        on_close_callback=fail,
        custom_ioloop=loop,
    )
    return await opened


async def _devices(host: str, port: int, authority: str, user: str, vhost: str, queues: list[str]) -> None:
    def answer(channel: Any, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
        channel.basic_ack(method.delivery_tag)
        said = pika.BasicProperties(correlation_id=properties.correlation_id)
        channel.basic_publish("", properties.reply_to, body, said)

    turn = asyncio.Semaphore(AT_ONCE)

    async def device(queue: str) -> None:
        async with turn:
            own = await channel(host, port, authority, user, vhost)
            consuming = asyncio.get_running_loop().create_future()
            own.basic_qos(prefetch_count=PREFETCH)
            own.basic_consume(queue, answer, callback=consuming.set_result)
            await consuming

    await asyncio.gather(*(device(queue) for queue in queues))
    print("ready", flush=True)
    await lines(_ignore)


class _Sender:
    """One connection, and what is on its way over it."""

    def __init__(self, channel: Any, queues: list[str], in_flight: int) -> None:
        self._channel, self._queues, self._in_flight = channel, queues, in_flight
        self._sent = 0
        self._began: dict[int, float] = {}
        self._unconfirmed: dict[int, None] = {}  # in order
        self._unanswered: set[int] = set()
        self._taken: list[float] = []
        self._until = 0.0
        self._over = asyncio.Event()

    async def start(self) -> None:
        consuming = asyncio.get_running_loop().create_future()
        self._channel.confirm_delivery(self._on_confirm)
        self._channel.add_on_return_callback(lambda *_: sys.exit("bench.bare_pika: a message was returned"))
        self._channel.basic_consume(
            names.DIRECT_REPLY_TO, self._on_answer, auto_ack=True, callback=consuming.set_result
        )
        await consuming

    async def keep_up(self, seconds: float) -> None:
        """So long; then print how many round trips there were, in how many seconds, and their p50 and p99 (ms)."""
        self._taken, self._over = [], asyncio.Event()
        began = time.perf_counter()
        self._until = began + seconds
        for _ in range(self._in_flight):
            self._send()
        await self._over.wait()
        taken = time.perf_counter() - began
        parts = (percentile(self._taken, part) for part in (0.5, 0.99))
        print(len(self._taken), taken, *parts, flush=True)

    def _send(self) -> None:
        self._sent += 1
        properties = pika.BasicProperties(
            reply_to=names.DIRECT_REPLY_TO,
            delivery_mode=2,
            content_type="application/json",
            correlation_id=str(self._sent),
        )
        self._began[self._sent] = time.perf_counter()
        self._unconfirmed[self._sent] = None
        self._unanswered.add(self._sent)
        queue = self._queues[self._sent % len(self._queues)]
        self._channel.basic_publish("", queue, b"{}", properties, mandatory=True)

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        if not isinstance(method, pika.spec.Basic.Ack):
            sys.exit("bench.bare_pika: a message was refused")
        tags = [method.delivery_tag]
        if method.multiple:
            tags = [tag for tag in self._unconfirmed if tag <= method.delivery_tag]
        for tag in tags:
            del self._unconfirmed[tag]
            if tag not in self._unanswered:
                self._done(tag)

    def _on_answer(self, _: object, __: object, properties: pika.BasicProperties, ___: bytes) -> None:
        tag = int(properties.correlation_id)
        self._unanswered.remove(tag)
        if tag not in self._unconfirmed:
            self._done(tag)

    def _done(self, tag: int) -> None:
        now = time.perf_counter()
        self._taken.append((now - self._began.pop(tag)) * 1000)
        if now < self._until:
            self._send()
        elif not self._began:
            self._over.set()


async def _load(host: str, port: int, user: str, vhost: str, queues: list[str], in_flight: int) -> None:
    sender = _Sender(await channel(host, port, "", user, vhost), queues, in_flight)
    await sender.start()
    await lines(lambda line: sender.keep_up(float(line)))


async def lines(do: Callable[[bytes], Awaitable[None]]) -> None:
    """Do what each line of standard input says, until that is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await do(line)


async def _ignore(_: bytes) -> None:
    """Devices are told nothing but the end."""


def _main(arguments: list[str]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        match arguments:
            case ["devices", host, port, authority, user, vhost, prefix, first, count]:
                queues = [f"{prefix}.{int(first) + number}" for number in range(int(count))]
                runner.run(_devices(host, int(port), authority, user, vhost, queues))
            case ["load", host, port, user, vhost, prefix, count, in_flight]:
                queues = [f"{prefix}.{number}" for number in range(int(count))]
                runner.run(_load(host, int(port), user, vhost, queues, int(in_flight)))
            case _:
                sys.exit(__doc__)


if __name__ == "__main__":
    _main(sys.argv[1:])
