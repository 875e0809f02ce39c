"""What arrives from devices: checked for its sender, decoded, or kept aside.

Every consumer of `uplink` passes its deliveries through `Inbox.open`, so that forged and broken mail is
dealt with in one place: dropped, counted and logged, or stored in quarantine. It never raises for what a
message contains.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fabric.clock import Clock
from fabric.command import Micros
from fabric.guarding import FloodGuard
from fabric.identity.meters import Meter
from fabric.model import QuarantineRow
from fabric.ports import Delivery, Ledger
from topology import access, guard, names, wire
from topology.names import DeviceId

log = logging.getLogger(__name__)
T = TypeVar("T")

STAMP = "timestamp_in_ms"  # the broker's header: milliseconds since the epoch
_METERS = {"inquiry": Meter.INQUIRIES}  # of the kinds that have one of their own
_KEPT = 4096  # bytes of a quarantined body


@dataclass(frozen=True, slots=True)
class Letter:
    """An uplink message whose sender is genuine."""

    kind: str
    device: DeviceId
    message: wire.Message


def said_at(message: wire.Message) -> Micros | None:
    """When the broker had a message, by its own clock: it stamps each, whatever the sender wrote."""
    stamp = message.headers.get(STAMP)
    return stamp * 1000 if isinstance(stamp, int) and not isinstance(stamp, bool) else None


class Inbox:
    """Checks deliveries of one queue.

    Attributes:
        queue: its name.
        taken: messages that passed, by kind.
        refused: those that did not, by reason.
    """

    def __init__(self, queue: str, ledger: Ledger, clock: Clock, flood: FloodGuard) -> None:
        self.queue, self._ledger, self._clock, self._flood = queue, ledger, clock, flood
        self.taken: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    async def open(self, delivery: Delivery) -> Letter | None:
        """The letter, or None when it was over the device's limit or forged (dropped), or could not be decoded
        (quarantined)."""
        parsed = names.parse_uplink_key(delivery.routing_key)
        # Before anything that costs more than this: nobody but the device could write the key.
        if parsed is not None and not self._flood.count(parsed[1], _METERS.get(parsed[0], Meter.REPORTS)):
            self.refused["flood"] += 1
            return None
        if delivery.message.type == guard.UNDECODABLE or parsed is None:
            await self.set_aside(delivery, str(delivery.message.headers.get(guard.REASON, "no such routing key")))
            return None
        kind, device, _ = parsed
        if not access.sender_is_genuine(kind, device, delivery.message.user_id):
            self.refused["sender"] += 1
            log.warning(
                "uplink.forged queue=%s kind=%s device=%s user_id=%r",
                self.queue, kind, device, (delivery.message.user_id or "")[:64],
            )  # fmt: skip
            return None
        self.taken[kind] += 1
        return Letter(kind, device, delivery.message)

    async def read(self, delivery: Delivery, decode: Callable[[wire.Message], T]) -> T | None:
        """The decoded message, or None when it was malformed, and is now in quarantine."""
        try:
            return decode(delivery.message)
        except wire.Malformed as error:
            await self.set_aside(delivery, str(error))
            return None

    async def set_aside(self, delivery: Delivery, reason: str) -> None:
        """Keep a message that can't be understood, and count it against the device in its key."""
        self.refused["undecodable"] += 1
        parsed = names.parse_uplink_key(delivery.routing_key)
        device = parsed[1] if parsed else None
        log.warning("uplink.quarantined queue=%s device=%s reason=%r", self.queue, device, reason[:200])
        row = QuarantineRow(
            self._clock.now(),
            self.queue,
            device,
            delivery.routing_key[:255],
            reason[:200],
            delivery.message.body[:_KEPT],
        )
        await self._ledger.quarantine([row])
