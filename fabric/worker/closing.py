"""Closing connections: asked for by a gateway that waits, or queued in the ledger with what made it necessary.

The queue in the ledger is what makes a revocation certain; the request is what makes it quick.
"""

import asyncio
import json
import logging

from fabric import closing
from fabric.errors import Temporary
from fabric.ports import BrokerAdmin, Delivery, Publisher, Registry
from topology import access, names
from topology.names import DeviceId

log = logging.getLogger(__name__)

BATCH = 500  # closures of one pass
HANDS = 8  # swept at once: a peer that does not answer can hold up its closure for seconds
# Seconds after a revocation: past the request that the gateway makes at once, which would wait seconds for peers that a
# sweep has just closed and that don't hang up; past tracking; past the broker's 10 s for a handshake. The last leaves
# half a second to sweep before the `pending_until` of the answer.
SWEEPS = (0.5, 1.5, 10.5)


class CloseRequests:
    """Consumer of `closures`: a gateway waits for the answer, for two seconds or so.

    One that can't be served is not answered: the gateway then says so, and the sweep goes on trying.
    """

    def __init__(self, admin: BrokerAdmin, publisher: Publisher) -> None:
        self._admin, self._publisher = admin, publisher

    async def on_delivery(self, delivery: Delivery) -> None:
        device = _device(delivery.message.body)
        correlation, user = delivery.message.correlation_id, delivery.message.user_id
        if user != access.GATEWAY:
            log.warning("close-request.forged user_id=%r", (user or "")[:64])
        elif device is None or correlation is None:
            log.warning("close-request.malformed")
        else:
            try:
                closed = await self._admin.close_connections(device)
                await self._publisher.send(names.WAKE, "", closing.answer(correlation, closed))
            except Temporary as error:
                log.warning("close-request.failed device=%s error=%s", device, error)
            else:
                log.info("connections.closed device=%s count=%d", device, closed)
        await delivery.ack()


class Closures:
    """Closes the connections of devices that were deleted, suspended or revoked.

    A connection in its handshake is not known to the broker yet, so each closure is swept three times; it
    is done, and forgotten, after the last.

    Attributes:
        oldest: when (by the loop's time) the first of those that are not done was seen; None: all are.
    """

    def __init__(self, registry: Registry, admin: BrokerAdmin) -> None:
        self._registry, self._admin = registry, admin
        self._swept: dict[int, int] = {}
        self._seen: dict[int, float] = {}

    @property
    def oldest(self) -> float | None:
        return min(self._seen.values(), default=None)

    async def run_once(self) -> None:
        """Sweep what is due. Raises `Temporary` when a closure failed, once the others are done."""
        now = asyncio.get_running_loop().time()
        open_closures = await self._registry.closures(BATCH)
        ours = {id for id, _ in open_closures}
        self._seen = {id: self._seen.get(id, now) for id in ours}
        self._swept = {id: self._swept.get(id, 0) for id in ours}  # others: done by another worker
        failures: list[BaseException] = []
        for start in range(0, len(open_closures), HANDS):
            some = (self._sweep(id, device, now) for id, device in open_closures[start : start + HANDS])
            outcomes = await asyncio.gather(*some, return_exceptions=True)
            failures += [outcome for outcome in outcomes if outcome is not None]
        if failures:
            raise failures[0]

    async def _sweep(self, id: int, device: DeviceId, now: float) -> None:
        if now - self._seen[id] < SWEEPS[self._swept[id]]:
            return
        closed = await self._admin.close_connections(device)
        if closed:
            log.info("connections.closed device=%s count=%d", device, closed)
        if self._swept[id] + 1 == len(SWEEPS):
            await self._registry.closed([id])  # when that fails, it is swept once more
            del self._swept[id]
        else:
            self._swept[id] += 1


def _device(body: bytes) -> DeviceId | None:
    try:
        device = json.loads(body)["device"]
    except (ValueError, TypeError, KeyError):
        return None
    return DeviceId(device) if isinstance(device, str) and names.is_device(device) else None
