"""Taking rights away: a device's, those of one of its keys, or those of callers' tokens.

First it is committed, so that no login is allowed any more; then the live connections are closed, since an open
one keeps its rights, and what gateways have open is ended; and the answer says what nobody can know yet. What could
not be closed at once stays queued in the ledger, and a worker closes it.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.clock import Clock
from fabric.command import Micros
from fabric.cutting import Cutter
from fabric.errors import Temporary
from fabric.measures import Histogram
from fabric.model import RevokedTokens
from fabric.ports import ConnectionCloser, Publisher, Registry
from fabric.waiting import announce
from topology.names import DeviceId

log = logging.getLogger(__name__)

HANDSHAKE: Micros = 11_000_000  # the broker's 10 s handshake timeout, and 1 s until it knows the connection


@dataclass(frozen=True, slots=True)
class Cut:
    """`closed`: live connections that were closed; None when no worker has answered, and they may still be open.
    `pending_until`: until then, one that was in its handshake may appear, and a gateway that has not answered may have
    something open; it is closed then. None: there is none."""

    closed: int | None
    pending_until: Micros | None


class Ending(enum.StrEnum):
    """What was known when it was answered that a right is gone.

    `ENDED`: nothing is open by it. `PENDING`: something may appear, or go on at a gateway that has not answered.
    `UNKNOWN`: no worker has answered.
    """

    ENDED = "ended"
    PENDING = "pending"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Revoked:
    """`withdrawn`: commands that waited for the device and were cancelled. `in_hand`: commands that it has picked up,
    which nobody can call back."""

    cut: Cut
    withdrawn: int
    in_hand: int


@dataclass(frozen=True, slots=True)
class Disowned:
    """`tokens` were good until then. `subjects`: of these and of all that were made with them, revoked before or not.
    `pending_until`: until then, what was open by them may be so at a gateway that has not answered. None: it has
    ended."""

    tokens: int
    subjects: tuple[str, ...]
    pending_until: Micros | None


class Revocation:
    """Takes rights away, and closes what was open by them.

    Attributes:
        took: from the commit until it was answered.
    """

    def __init__(
        self, registry: Registry, publisher: Publisher, closer: ConnectionCloser, cutter: Cutter, clock: Clock
    ) -> None:
        self._registry, self._publisher, self._clock = registry, publisher, clock
        self._closer, self._cutter = closer, cutter
        self.took: Mapping[Ending, Histogram] = {ending: Histogram() for ending in Ending}

    async def device(self, id: DeviceId) -> Revoked:
        """Drop all its keys and codes and start a new generation. It can be enrolled again.

        Raises `NotFound`.
        """
        _, withdrawn = await self._registry.revoke_device(id, self._clock.now())
        cut = await self.cut(id)
        for command in withdrawn:
            await announce(self._publisher, command)
        return Revoked(cut, len(withdrawn), await self._registry.in_hand(id))

    async def key(self, id: DeviceId, kid: str) -> Revoked:
        """Drop a key, and all that were registered under it; commands go on waiting. Raises `NotFound`."""
        await self._registry.revoke_key(id, kid, self._clock.now())
        return Revoked(await self.cut(id), 0, await self._registry.in_hand(id))

    async def retire(self, id: DeviceId, kid: str, by: str) -> Revoked:
        """Drop a key at the word of one that descends from it, `by`, which stays good.

        Raises `NotFound`, `Forbidden`, `Unauthenticated`.
        """
        await self._registry.retire_key(id, kid, by, self._clock.now())
        return Revoked(await self.cut(id), 0, await self._registry.in_hand(id))

    async def token(self, jti: str) -> Disowned:
        """Revoke a token and all that were made with it. Raises `NotFound`."""
        return await self._disown(await self._registry.revoke_token(jti, self._clock.now()))

    async def subject(self, subject: str) -> Disowned:
        """Revoke all tokens of a subject, and all that were made with them."""
        return await self._disown(await self._registry.revoke_subject(subject, self._clock.now()))

    async def _disown(self, revoked: RevokedTokens) -> Disowned:
        # Also when none was good: then somebody may ask again whether it has all ended.
        began = time.perf_counter()
        pending_until = await self._cutter.cut(None)
        self._measure(began, Ending.ENDED if pending_until is None else Ending.PENDING)
        return Disowned(revoked.count, revoked.subjects, pending_until)

    async def cut(self, id: DeviceId) -> Cut:
        """Close the device's connections, and what gateways have open for it. What takes its right to log in is
        committed before."""
        began = time.perf_counter()
        closed, pending_until = await asyncio.gather(self._close(id), self._cutter.cut(id))
        cut = Cut(closed.closed, max(filter(None, (closed.pending_until, pending_until)), default=None))
        known = Ending.ENDED if cut.pending_until is None else Ending.PENDING
        self._measure(began, Ending.UNKNOWN if cut.closed is None else known)
        return cut

    def _measure(self, began: float, ending: Ending) -> None:
        self.took[ending].observe(time.perf_counter() - began)

    async def _close(self, id: DeviceId) -> Cut:
        began = self._clock.now()
        try:
            closed = await self._closer.close(id)
            login = await self._registry.last_login(id)
        except Temporary as error:
            log.warning("revocation.pending device=%s error=%s", id, error)
            return Cut(None, began + HANDSHAKE)
        until = None if login is None else login + HANDSHAKE
        return Cut(closed, until if until is not None and until > self._clock.now() else None)
