"""Mail that breaks client libraries passes the broker; it must not break us, nor hide what lies behind it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fabric.amqp import declarer
from fabric.amqp.connection import Link
from fabric.amqp.consumer import Consumer
from fabric.amqp.streams import AmqpStreamReader
from fabric.ports import Delivery
from tests.harness.broker import LOOPBACK, Broker, eventually, running_broker
from tests.harness.rawamqp import RawClient, long, properties, short
from topology import access, guard, names, wire


def _nested(levels: int, prefix: bytes) -> bytes:
    """Containers in each other; `prefix` is a key, or nothing, and the container's type."""
    sizes = [0]
    for _ in range(levels):
        sizes.append(sizes[-1] + len(prefix) + 4)
    return b"".join(prefix + size.to_bytes(4, "big") for size in reversed(sizes[:-1]))


def _headers(entries: bytes) -> bytes:
    return properties(headers=long(entries))


KEY = "telemetry.dev.poison"
HARMLESS = properties(message_id=short("innocent"))

# What makes pamqp raise, and with it ends a connection that is not guarded.
DEADLY: dict[str, tuple[str | bytes, bytes]] = {
    "timestamp": (KEY, properties(timestamp=b"\xff" * 8)),
    "timestamp-header": (KEY, _headers(short("t") + b"T" + b"\xff" * 8)),
    "correlation-id": (KEY, properties(correlation_id=short(b"\xff\xfe"))),
    "content-type": (KEY, properties(content_type=short(b"text/\xff"))),
    "header-key": (KEY, _headers(short(b"\xff") + b"S" + long("x"))),
    "routing-key": (b"telemetry.dev.\xff", HARMLESS),
    "nested-tables": (KEY, _headers(_nested(20_000, b"\x00F"))),
    "nested-arrays": (KEY, _headers(short("a") + _nested(20_000, b"A"))),
}
# What pamqp decodes, at a price that a device must not be able to charge.
COSTLY: dict[str, tuple[str | bytes, bytes]] = {
    "12,000-headers": (KEY, _headers(b"".join(short(f"{n:05}") + b"V" for n in range(12_000)))),
    "100-kb-header": (KEY, _headers(short("k") + b"S" + long("." * 100_000))),
}
POISON = DEADLY | COSTLY

KINDS = {
    "quorum": {"x-queue-type": "quorum", "x-delivery-limit": -1},
    "classic": {"x-queue-type": "classic"},
    "stream": {"x-queue-type": "stream"},
}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    # Ours replaces every timestamp by its own; another broker that a back end reads from may not.
    plain = "message_interceptors.incoming.set_header_timestamp.overwrite = false\n"
    with running_broker(tmp_path_factory.mktemp("broker"), plain) as running:
        yield running


@contextmanager
def poisoned(broker: Broker, kind: str, *poison: str) -> Iterator[str]:
    """A queue (its name) with an innocent message before and behind each poison."""
    queue = f"poison-{kind}"
    with raw(broker) as client:
        client.declare_exchange(names.UPLINK, "topic")
        client.declare(queue, KINDS[kind])
        client.bind(queue, names.UPLINK, "#")
        for name in poison:
            key, raw_properties = POISON[name]
            for body, its_key, its_properties in (
                (f"before {name}", KEY, HARMLESS),
                (name, key, raw_properties),
                (f"behind {name}", KEY, HARMLESS),
            ):
                client.publish(names.UPLINK, its_key, body.encode(), its_properties)
                assert client.confirmed(), f"the broker refused {body}"
    try:
        yield queue
    finally:
        with raw(broker) as client:
            client.delete(queue)


@contextmanager
def raw(broker: Broker) -> Iterator[RawClient]:
    with RawClient(LOOPBACK, broker.node.amqp_port) as client:
        client.login(access.WORKER, broker.node.password(access.WORKER))
        client.open_channel(confirms=True)
        yield client


# A stream keeps messages as AMQP 1.0, whose application properties hold no containers: the broker drops them.
DEFUSED_BY_STREAMS = {"nested-tables", "nested-arrays"}


def check_arrivals(poison: list[str], arrived: list[Delivery], *, stream: bool) -> None:
    bodies = [delivery.message.body.decode() for delivery in arrived]
    assert bodies == [body for name in poison for body in (f"before {name}", name, f"behind {name}")]
    for delivery, body in zip(arrived, bodies, strict=True):
        if body == "routing-key":
            # The properties are innocent; the key is outside every grammar, and can be logged and stored.
            assert delivery.routing_key == "telemetry.dev.\\xff"
            assert names.parse_uplink_key(delivery.routing_key) is None
        elif stream and body in DEFUSED_BY_STREAMS:
            assert set(delivery.message.headers) <= {"timestamp_in_ms", "x-stream-offset"}
        elif body in POISON:
            assert delivery.message.type == guard.UNDECODABLE
            assert delivery.message.headers[guard.REASON]
            assert delivery.routing_key == KEY
            with pytest.raises(wire.Malformed, match="undecodable"):
                wire.decode_reading(delivery.message)
        else:
            assert delivery.message.message_id == "innocent"


async def read(link: Link, kind: str, queue: str, count: int) -> list[Delivery]:
    arrived: list[Delivery] = []
    if kind == "stream":
        async with AmqpStreamReader(link).read(queue, "first") as deliveries, asyncio.timeout(60):
            while len(arrived) < count:
                arrived.append(await anext(deliveries))
        return arrived

    async def handle(delivery: Delivery) -> None:
        arrived.append(delivery)
        await delivery.ack()

    consumer = Consumer(link, queue, handle, prefetch=4)
    await consumer.start()
    await eventually(lambda: len(arrived) >= count, 60)
    await consumer.stop()
    return arrived


@pytest.mark.parametrize("kind", list(KINDS))
async def test_poison_is_marked_and_hides_nothing(broker: Broker, kind: str) -> None:
    poison = list(POISON)
    with poisoned(broker, kind, *poison) as queue:
        async with broker.link("read") as link:
            connection = link._connection
            check_arrivals(poison, await read(link, kind, queue, 3 * len(poison)), stream=kind == "stream")
            assert link._connection is connection
            assert link.connected.is_set()
        if kind != "stream":
            async with broker.link("again") as link, link.throwaway() as channel:
                left = await channel.queue_declare(queue, passive=True)
                assert left.message_count == 0


async def test_a_stream_is_resumed_behind_poison(broker: Broker) -> None:
    """Undecodable mail has lost its offset with its headers, and must not be read again for ever."""
    with poisoned(broker, "stream", "header-key", "correlation-id") as queue:
        async with (
            broker.link("read", access.WORKER) as link,
            AmqpStreamReader(link).read(queue, "first") as deliveries,
            asyncio.timeout(60),
        ):
            first = [await anext(deliveries) for _ in range(5)]
            assert [delivery.offset for delivery in first] == [0, 1, 2, 3, 4]
            async with broker.admin() as admin:
                await admin.close_connections(access.WORKER)
            last = await anext(deliveries)
            assert (last.offset, last.message.body) == (5, b"behind correlation-id")


async def test_the_shared_queues_take_poison_too(broker: Broker) -> None:
    """As a device would send it: through `uplink` into `reports`, `claims` and `telemetry`."""
    async with broker.link("declare") as link:
        await declarer.declare_topology(link)
        with raw(broker) as client:
            for key in ("receipt.dev", "hello.dev", "telemetry.dev.ch"):
                client.publish(names.UPLINK, key, b"poison", DEADLY["correlation-id"][1])
                client.publish(names.UPLINK, key, b"innocent", HARMLESS)
                assert client.confirmed()
                assert client.confirmed()
        for queue, kind in ((names.REPORTS, "quorum"), (names.CLAIMS, "classic"), (names.TELEMETRY, "stream")):
            arrived = await read(link, kind, queue, 2)
            assert [delivery.message.body for delivery in arrived] == [b"poison", b"innocent"]
            assert arrived[0].message.type == guard.UNDECODABLE


UNGUARDED = """
import asyncio, json, logging, sys
import aiormq

async def main():
    url, queue = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    arrived = asyncio.Queue()
    await channel.basic_qos(prefetch_count=10)
    await channel.basic_consume(queue, arrived.put, no_ack=False)
    closed = asyncio.ensure_future(asyncio.wait([connection.closing]))
    bodies = []
    while len(bodies) < 3:
        message = asyncio.ensure_future(arrived.get())
        await asyncio.wait([closed, message], return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if not message.done():
            break
        bodies.append(message.result().body.decode())
    print(json.dumps({"bodies": bodies, "died": closed.done()}))
    await connection.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("poison", list(DEADLY))
def test_without_the_guard_the_connection_dies(broker: Broker, poison: str) -> None:
    """What the guard is for; if this fails, pamqp has changed, and the tests above prove less."""
    with poisoned(broker, "classic", poison) as queue:
        password = broker.node.password(access.WORKER)
        url = f"amqp://{access.WORKER}:{password}@{LOOPBACK}:{broker.node.amqp_port}/{names.VHOST}"
        done = subprocess.run(
            [sys.executable, "-c", UNGUARDED, url, queue], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["died"], "the connection survived"
    assert f"behind {poison}" not in result["bodies"]
