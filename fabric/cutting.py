"""Ending what gateways have open by a right that is gone: streams, waiting requests, bodies on their way.

The gateway that took the right away tells the others on the exchange `wake`; each ends its own, and says so. Whose word
it waits for stands in the ledger, where every gateway that serves anybody renews a lease. One that has heard nothing
finds out by looking: each answer that lasts is looked at once a second.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fabric.clock import Clock
from fabric.command import Micros
from fabric.errors import Temporary
from fabric.ports import Delivery, Gateways, Publisher
from topology import access, names, wire
from topology.names import DeviceId

CUT = "cut"
HAVE_CUT = "have-cut"

RENEW_EVERY = 1.0  # seconds
LEASE: Micros = 5_000_000  # a gateway that was not heard of for so long is waited for no more
PATIENCE = 2.0  # seconds for all the others
FOUND_OUT: Micros = 3_000_000  # a second between looks, a second in which a token is believed, and their own time

log = logging.getLogger(__name__)

EndOwn = Callable[[DeviceId | None], Awaitable[None]]


class Cutter:
    """One gateway's part in it.

    Args:
        id: this gateway's, new with each process.
        end_own: ends what this process has open by a right that is gone, of a device or, with None, of all other
            callers, and returns when it has ended.
    """

    def __init__(self, id: str, gateways: Gateways, publisher: Publisher, end_own: EndOwn, clock: Clock) -> None:
        self._id, self._gateways, self._publisher, self._clock = id, gateways, publisher, clock
        self._end_own = end_own
        self._asked: dict[str, _Answers] = {}

    async def cut(self, device: DeviceId | None) -> Micros | None:
        """End it everywhere; what took the right away is committed before.

        Returns:
            None when it has ended; else when it will have, in every gateway that runs.
        """
        correlation = secrets.token_hex(8)
        answers = self._asked[correlation] = _Answers()
        try:
            async with asyncio.timeout(PATIENCE):
                others = set(await self._gateways.live(self._clock.now())) - {self._id}
                if others:
                    await self._publisher.send(names.WAKE, "", _message(CUT, correlation, self._id, device))
                await self._end_own(device)
                await answers.of(others)
        except (TimeoutError, Temporary) as error:
            missing = "its own" if not answers.awaited else ", ".join(sorted(answers.awaited - answers.given))
            log.warning("cut.pending gateways=%s error=%s", missing, error or "no answer")
            return self._clock.now() + FOUND_OUT
        finally:
            del self._asked[correlation]
        return None

    async def on_delivery(self, delivery: Delivery) -> None:
        """Handle a message of type `cut` or `have-cut` from the exchange `wake`; this gateway's own come back, too."""
        message = delivery.message
        said = _read(message)
        if said is not None and message.type == HAVE_CUT:
            if (answers := self._asked.get(message.correlation_id or "")) is not None:
                answers.give(said[0])
        elif said is not None and said[0] != self._id:
            with suppress(Temporary):  # then it is not said, and found out by looking
                await self._end_own(said[1])
                await self._publisher.send(names.WAKE, "", _message(HAVE_CUT, message.correlation_id, self._id, None))
        await delivery.ack()

    async def renew(self) -> None:
        """Say that this gateway serves; before it does, and then every second."""
        await self._gateways.renew(self._id, self._clock.now(), LEASE)

    async def leave(self) -> None:
        """It has ended what it served; otherwise its lease just runs out."""
        with suppress(Temporary):
            await self._gateways.leave(self._id)


class _Answers:
    """What the other gateways have said to one question."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.awaited: set[str] = set()
        self._news = asyncio.Event()

    def give(self, gateway: str) -> None:
        self.given.add(gateway)
        self._news.set()

    async def of(self, gateways: set[str]) -> None:
        """Return when these have answered."""
        self.awaited = gateways
        while not gateways <= self.given:
            self._news.clear()
            await self._news.wait()


def _message(kind: str, correlation: str | None, gateway: str, device: DeviceId | None) -> wire.Message:
    return wire.Message(
        kind,
        body=json.dumps({"gateway": gateway, "device": device}).encode(),
        content_type=wire.JSON,
        correlation_id=correlation,
        user_id=access.GATEWAY,
        persistent=False,
    )


def _read(message: wire.Message) -> tuple[str, DeviceId | None] | None:
    """The gateway and the device; None for what no gateway has said."""
    if message.user_id != access.GATEWAY:
        return None
    try:
        said = json.loads(message.body)
        gateway, device = said["gateway"], said["device"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(gateway, str):
        return None
    if device is None:
        return gateway, None
    return (gateway, DeviceId(device)) if isinstance(device, str) and names.is_device(device) else None
