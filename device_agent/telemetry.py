"""Readings on their way to the broker: a bounded buffer, confirmed, in order. `offer` is safe from any thread."""

import json
import random
import threading
import uuid
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from device_agent import errors
from device_agent.link import Link
from topology import names, wire

MAX_READINGS = 2_000  # waiting or in flight
MAX_BYTES = 16 * 1024 * 1024  # of their bodies
WINDOW = 200  # in flight, so that telemetry never takes the outcomes' room
RETRY_BASE = 0.2  # seconds
RETRY_MAX = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class _Queued:
    key: str
    reading: wire.Reading
    confirmed: "Future[None]"


class Telemetry:
    """What is offered is sent until the broker confirms it, or lost with the process."""

    def __init__(self, link: Link, device: names.DeviceId) -> None:
        self._link = link
        self._device = device
        self._lock = threading.Lock()
        self._offered: deque[_Queued] = deque()  # until the I/O thread takes them up, all at once
        self._waiting: deque[_Queued] = deque()
        self._in_flight: dict[str, _Queued] = {}
        self._bytes = 0
        self._count = 0
        self._nacks = 0
        self._retry_pending = False
        self._pump_pending = False

    @property
    def idle(self) -> bool:
        return self._count == 0

    def offer(self, channel: str, body: bytes, content_type: str, at: int) -> "Future[None]":
        """Queue a reading; the future is done once the broker has it. From any thread.

        Raises:
            errors.BufferFull: too much waits already.
            errors.InvalidValue: the channel's name, the content type or the size is outside the contract.
        """
        check(channel, body, content_type)
        reading = wire.Reading(str(uuid.uuid4()), body, content_type, at)
        queued = _Queued(names.telemetry_key(self._device, channel), reading, Future())
        with self._lock:
            if self._count >= MAX_READINGS or self._bytes + len(body) > MAX_BYTES:
                raise errors.BufferFull(
                    f"{self._count} readings ({self._bytes} bytes) wait for the broker already; send less, or try later"
                )
            self._count += 1
            self._bytes += len(body)
            self._offered.append(queued)
            first = len(self._offered) == 1
        if first:  # whoever comes before it is taken up needs no call of its own
            self._link.call(self._take_up)
        return queued.confirmed

    def pump(self) -> None:
        """Send what fits, in one write. On the I/O thread, like everything below."""
        self._pump_pending = False
        with self._link.together():
            while self._waiting and len(self._in_flight) < WINDOW and not self._retry_pending:
                queued = self._waiting[0]
                if not self._publish(queued):
                    if self._link.up:
                        self._retry()
                    return
                self._waiting.popleft()

    def _take_up(self) -> None:
        with self._lock:
            self._waiting += self._offered
            self._offered.clear()
        self.pump()

    def _pump_soon(self) -> None:
        """Once for all that is confirmed in this turn of the loop."""
        if not self._pump_pending:
            self._pump_pending = True
            self._link.soon(self.pump)

    def _publish(self, queued: _Queued) -> bool:
        message = wire.encode_reading(queued.reading, self._device)
        sent = self._link.publish(queued.key, message, lambda confirmed: self._settled(queued, confirmed))
        if sent:
            self._in_flight[queued.reading.id] = queued
        return sent

    def _settled(self, queued: _Queued, confirmed: bool) -> None:
        del self._in_flight[queued.reading.id]
        if confirmed:
            self._nacks = 0
            with self._lock:
                self._count -= 1
                self._bytes -= len(queued.reading.body)
            queued.confirmed.set_result(None)
            self._pump_soon()
        else:
            # Those behind it may have been confirmed: order is kept among what is still to be sent, no more.
            self._waiting.appendleft(queued)
            if self._link.up:
                self._retry()

    def _retry(self) -> None:
        if not self._retry_pending:
            self._retry_pending = True
            bound = min(RETRY_MAX, RETRY_BASE * 2.0 ** min(self._nacks, 16))
            self._nacks += 1
            self._link.later(random.random() * bound, self._retry_now)  # noqa: S311 - jitter

    def _retry_now(self) -> None:
        self._retry_pending = False
        self.pump()


def check(channel: str, body: bytes, content_type: str) -> None:
    """Raises `errors.InvalidValue`."""
    try:
        names.dotted(channel, "channel name")
    except names.NameRefused as error:
        raise errors.InvalidValue(str(error)) from None
    if not wire.is_content_type(content_type):
        raise errors.InvalidValue("the content type is not of the form type/subtype")
    if len(body) > wire.MAX_BODY:
        raise errors.InvalidValue(f"a reading has {len(body)} bytes; {wire.MAX_BODY} are allowed")


def encode(value: object, content_type: str | None) -> tuple[bytes, str]:
    """A value as body and content type: bytes as they are, everything else as JSON.

    Raises:
        errors.InvalidValue: it is not JSON.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), content_type or "application/octet-stream"
    if content_type is not None and content_type != wire.JSON:
        raise errors.InvalidValue("a value of another content type than JSON must be given as bytes")
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), wire.JSON
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidValue(f"the value is not JSON: {error}") from error
