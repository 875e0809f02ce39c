"""The ends of telemetry, as processes: the agent's library, a bare pika client that pipelines its confirms, and a bare
pika consumer of the stream.

    python -m bench.readings agent STATE_DIR
    python -m bench.readings pika HOST PORT AUTHORITY USER VHOST KEY
    python -m bench.readings consumer HOST PORT USER VHOST

For each line with a number, a publisher publishes so many readings, and prints the number again when all are confirmed;
the consumer prints it when it has had so many more.
"""

import asyncio
import sys
from collections import deque
from concurrent.futures import Future
from typing import Any

import pika

from bench import bare_pika
from device_agent import Agent
from device_agent.errors import BufferFull
from topology import names

CHANNEL = "bench.readings"
VALUE = {"value": 21.5}
BODY = b'{"value":21.5}'
WINDOW = 500  # unconfirmed readings of the bare client
PREFETCH = 2_000
_PATIENCE = 60.0  # seconds


def _agent(state_dir: str) -> None:
    agent = Agent()
    agent.start(state_dir)
    try:
        for line in sys.stdin:
            _offer(agent, int(line))
            print(line.strip(), flush=True)
    finally:
        agent.stop()


def _offer(agent: Agent, count: int) -> None:
    """As a program does that never has fewer readings than the agent takes."""
    waiting: deque[Future[None]] = deque()
    while count:
        try:
            waiting.append(agent.publish(CHANNEL, VALUE))
            count -= 1
        except BufferFull:
            waiting.popleft().result(_PATIENCE)
    for each in waiting:
        each.result(_PATIENCE)


class _Bare:
    """Publishes as many as its window lets out."""

    def __init__(self, channel: Any, key: str) -> None:
        self._channel, self._key = channel, key
        self._sent = self._confirmed = self._wanted = 0
        self._over = asyncio.Event()
        channel.confirm_delivery(self._on_confirm)

    async def publish(self, count: int) -> None:
        self._wanted += count
        self._over.clear()
        self._fill()
        await asyncio.wait_for(self._over.wait(), _PATIENCE)

    def _fill(self) -> None:
        while self._sent < self._wanted and self._sent - self._confirmed < WINDOW:
            self._sent += 1
            properties = pika.BasicProperties(content_type="application/json", delivery_mode=2)
            self._channel.basic_publish(names.UPLINK, self._key, BODY, properties)

    def _on_confirm(self, frame: Any) -> None:
        if not isinstance(frame.method, pika.spec.Basic.Ack):
            sys.exit("bench.readings: a reading was refused")
        # They come in order from one stream; a single one stands for itself, another for all before it.
        self._confirmed = frame.method.delivery_tag if frame.method.multiple else self._confirmed + 1
        self._fill()
        if self._confirmed == self._wanted:
            self._over.set()


async def _pika(host: str, port: int, authority: str, user: str, vhost: str, key: str) -> None:
    publisher = _Bare(await bare_pika.channel(host, port, authority, user, vhost), key)

    async def publish(line: bytes) -> None:
        await publisher.publish(int(line))
        print(line.decode().strip(), flush=True)

    await bare_pika.lines(publish)


class _Consumer:
    """A back end that follows the stream from now on."""

    def __init__(self, channel: Any) -> None:
        self._had = self._wanted = 0
        self._news = asyncio.Event()
        self.consuming = asyncio.get_running_loop().create_future()
        channel.basic_qos(prefetch_count=PREFETCH)
        arguments = {"x-stream-offset": "next"}
        channel.basic_consume(
            names.TELEMETRY, self._on_reading, arguments=arguments, callback=self.consuming.set_result
        )

    async def wait(self, count: int) -> None:
        self._wanted += count
        while self._had < self._wanted:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), _PATIENCE)

    def _on_reading(self, channel: Any, method: Any, _: object, __: bytes) -> None:
        self._had += 1
        if self._had % (PREFETCH // 4) == 0:
            channel.basic_ack(method.delivery_tag, multiple=True)
        if self._had >= self._wanted:
            self._news.set()


async def _consume(host: str, port: int, user: str, vhost: str) -> None:
    consumer = _Consumer(await bare_pika.channel(host, port, "", user, vhost))
    await consumer.consuming
    print("ready", flush=True)

    async def wait(line: bytes) -> None:
        await consumer.wait(int(line))
        print(line.decode().strip(), flush=True)

    await bare_pika.lines(wait)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["agent", state_dir]:
            _agent(state_dir)
        case ["pika", host, port, authority, user, vhost, key]:
            asyncio.run(_pika(host, int(port), authority, user, vhost, key))
        case ["consumer", host, port, user, vhost]:
            asyncio.run(_consume(host, int(port), user, vhost))
        case _:
            sys.exit(__doc__)
