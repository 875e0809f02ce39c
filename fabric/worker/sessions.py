"""Presence, from the broker's events, and from its listing where events were lost."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from fabric.clock import Clock
from fabric.command import Micros
from fabric.guarding import FloodGuard
from fabric.identity.meters import Meter
from fabric.ports import BrokerAdmin, Delivery, Sessions
from fabric.presence import (
    REMEMBERED,
    SETTLED_AFTER,
    Change,
    Closed,
    Epoch,
    Life,
    Listed,
    Opened,
    Session,
    compare,
    creation,
    outlived,
    pause_after,
    recent,
    surplus,
)
from topology import guard, names
from topology.names import DeviceId

log = logging.getLogger(__name__)

BATCH = 500  # events of one transaction
_NAME_LIMIT = 255  # characters of a connection's, node's or process's name


class Lives:
    """Which life of each node the broker's events are of."""

    def __init__(self) -> None:
        self.current: dict[str, Life] = {}
        self._begun = asyncio.Event()

    def hear(self, node: str, pid: str, at: Micros) -> None:
        """A process of the node took up a connection."""
        of = creation(pid)
        if of is not None and (node not in self.current or self.current[node].creation != of):
            log.info("node.started node=%s creation=%s", node, of)
            self.current[node] = Life(of, at)
            self._begun.set()

    async def begun(self, within: float) -> None:
        """Wait until another has begun, or so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._begun.wait()
        self._begun.clear()


class SessionEvents:
    """Consumer of `sessions`. Events are applied in their order and acked after the commit.

    They wait here, as many as the consumer fetches; when the ledger is away they go on waiting, in their order.
    """

    def __init__(self, cell: str, sessions: Sessions, flood: FloodGuard, clock: Clock) -> None:
        self._cell, self._sessions, self._flood, self._clock = cell, sessions, flood, clock
        self.lives = Lives()
        self._waiting: deque[tuple[Delivery, Change]] = deque()
        self._some = asyncio.Event()
        self.refused: Counter[str] = Counter()

    def started(self, _: int) -> None:
        """The consumer has (re)started: what was not acked comes again."""
        self._waiting.clear()

    async def on_delivery(self, delivery: Delivery) -> None:
        try:
            change = self._change(delivery)
        except ValueError as error:
            # A device's client properties are in the event, and can make it too large to be decoded. Its session is
            # then found in the listing.
            self.refused["undecodable"] += 1
            log.warning("session-event.undecodable key=%.100r reason=%.200r", delivery.routing_key, str(error))
            change = None
        if change is None:
            await delivery.ack()
        else:
            self._waiting.append((delivery, change))
            self._some.set()

    async def run_once(self) -> bool:
        """Apply what waits, once there is any. Raises `Temporary`, and nothing is lost then."""
        await self._some.wait()
        batch = list(islice(self._waiting, BATCH))
        live = await self._sessions.apply([change for _, change in batch])
        for delivery, _ in batch:
            await delivery.ack()
        for one in batch:
            if self._waiting and self._waiting[0] is one:
                self._waiting.popleft()
        if not self._waiting:
            self._some.clear()
        for device, many in live.items():
            if many > self._flood.limits.connections:
                self._flood.exceed(device, Meter.CONNECTIONS)
        return True

    def _change(self, delivery: Delivery) -> Change | None:
        """None for what is no device's. Raises ValueError."""
        said = delivery.message.headers
        if delivery.message.type == guard.UNDECODABLE:
            raise ValueError(said.get(guard.REASON))
        now = self._clock.now()
        at = min(now, _number(said.get("timestamp_in_ms")) * 1000)
        node, name, pid = (_text(said.get(each)) for each in ("node", "name", "pid"))
        if delivery.routing_key == names.CLOSED:
            return Closed(node, name, pid, at)
        self.lives.hear(node, pid, at)
        user = _text(said.get("user"))
        if not names.is_device(user):
            return None
        opened_at = _number(said.get("connected_at")) * 1000
        return Opened(Session(DeviceId(user), self._cell, node, name, opened_at, pid, now), at)


class Presence:
    """Compares the sessions of a cell with its broker's listing: events are sent at most once, and none when a node
    dies. When one has started again, what it had is over at once: its devices are on their way back, and each would
    otherwise have its old connection closed first. Meters the traffic of each connection, and closes connections whose
    logins crossed."""

    def __init__(
        self, cell: str, sessions: Sessions, lives: Lives, admin: BrokerAdmin, flood: FloodGuard, clock: Clock
    ) -> None:
        self._cell, self._sessions, self._lives, self._admin = cell, sessions, lives, admin
        self._flood, self._clock = flood, clock
        self._pause = pause_after(0.0)
        self._missing: set[Epoch] = set()
        self._listed_at: Micros | None = None
        self._octets: dict[Epoch, int] = {}

    async def run_once(self) -> None:
        await self._lives.begun(self._pause)
        known = await self._sessions.live(self._cell)
        over = outlived(known, self._lives.current, self._clock.now())
        await self._apply(over)
        listed = [each for each in await self._list() if names.is_device(each.user)]
        ended = {change.session.epoch for change in over}
        known = [each for each in known if each.epoch not in ended]
        now = self._clock.now()
        changes, self._missing = compare(self._cell, known, listed, self._missing, now)
        await self._apply(changes)
        self._meter(listed, now)
        for session in surplus(session for session in known if session.replaced_at is None):
            log.info("connections.surplus device=%s", session.device)
            await self._admin.close_connection(session.name)
        await self._sessions.forget(now - REMEMBERED)

    async def _list(self) -> list[Listed]:
        began = time.monotonic()
        try:
            return await self._admin.connections()
        finally:
            self._pause = pause_after(time.monotonic() - began)

    async def _apply(self, changes: Sequence[Change]) -> None:
        for start in range(0, len(changes), BATCH):
            await self._sessions.apply(changes[start : start + BATCH])
        if changes:
            log.info("presence.reconciled changes=%d", len(changes))

    def _meter(self, listed: list[Listed], now: Micros) -> None:
        span = 0 if self._listed_at is None else now - self._listed_at
        self._listed_at = now
        for each in listed:
            # Of an old connection that is new to this worker, what it moved before is not known to be recent.
            young = now - each.opened_at < max(SETTLED_AFTER, span)
            moved = each.octets - self._octets.get(each.epoch, 0 if young else each.octets)
            if moved > 0:
                self._flood.count(DeviceId(each.user), Meter.TRAFFIC, recent(moved, span))
        self._octets = {each.epoch: each.octets for each in listed}


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _NAME_LIMIT:
        raise ValueError("a name is missing or too long")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**50:
        raise ValueError("a time is missing or out of range")
    return value
