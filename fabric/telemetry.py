"""Telemetry as it comes over HTTP, and as it is read back from the stream."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from fabric import ids, presenting
from fabric.clock import Clock
from fabric.ports import Delivery, Publisher, StreamReader
from topology import access, names, wire
from topology.names import DeviceId

MAX_BATCH = 1000  # readings of one request


@dataclass(frozen=True, slots=True)
class Reading:
    """A reading as it is read back. `offset` is its place in the stream, `at` when it was measured
    (epoch ms)."""

    offset: int
    device: DeviceId
    channel: str
    at: int
    content_type: str
    body: bytes

    def document(self) -> dict[str, object]:
        """The JSON object of one NDJSON line."""
        return {
            "offset": self.offset,
            "device": self.device,
            "channel": self.channel,
            "at": presenting.time(self.at * 1000),
            **presenting.typed(self.content_type, self.body, "value"),
        }


class Telemetry:
    def __init__(self, publisher: Publisher, streams: StreamReader, clock: Clock) -> None:
        self._publisher, self._streams, self._clock = publisher, streams, clock

    async def publish(
        self,
        device: DeviceId,
        channel: str,
        readings: list[tuple[bytes, str, int | None]],
        traceparent: str | None = None,
    ) -> None:
        """Publish readings `(body, content type, epoch ms or None for now)` in order, each confirmed.

        Raises:
            PublishFailed: the fate of some is unknown; sending them again may make duplicates.
        """
        now = self._clock.now_ms()
        key = names.telemetry_key(device, channel)
        messages = [
            wire.encode_reading(
                wire.Reading(ids.uuid7(now), body, content_type, at or now, traceparent=traceparent), access.GATEWAY
            )
            for body, content_type, at in readings
        ]
        await asyncio.gather(*(self._publisher.publish(names.UPLINK, key, message) for message in messages))

    async def read(
        self,
        start: str | int,
        *,
        device: DeviceId | None,
        channel: str | None,
        limit: int,
        idle: float,
        seen: Callable[[Reading], Awaitable[bool]],
    ) -> AsyncGenerator[Reading, None]:
        """Readings from `first`, `next` or an offset, until `limit` are read or none came for `idle` seconds. Those
        that are not to be seen are left out."""
        async with self._streams.read(names.TELEMETRY, start) as deliveries:
            given = 0
            while given < limit:
                try:
                    async with asyncio.timeout(idle):
                        delivery = await anext(deliveries)
                except (TimeoutError, StopAsyncIteration):
                    return
                await delivery.ack()
                reading = _reading(delivery)
                if reading is None or device not in (None, reading.device) or channel not in (None, reading.channel):
                    continue
                if not await seen(reading):
                    continue
                given += 1
                yield reading


def _reading(delivery: Delivery) -> Reading | None:
    """None for what is no genuine, well-formed reading: it is left in the stream, and left out here."""
    parsed = names.parse_uplink_key(delivery.routing_key)
    if parsed is None or delivery.offset is None:
        return None
    kind, device, channel = parsed
    if kind != "telemetry" or not access.sender_is_genuine(kind, device, delivery.message.user_id):
        return None
    try:
        reading = wire.decode_reading(delivery.message)
    except wire.Malformed:
        return None
    return Reading(delivery.offset, device, channel or "", reading.at, reading.content_type, reading.body)
