"""The flood guard: what a device does is counted against its limits; one that goes over is closed and kept out."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from fabric.clock import Clock
from fabric.command import Micros
from fabric.errors import Temporary
from fabric.identity.meters import Limits, Meter, Meters
from fabric.ports import Sessions
from topology.names import DeviceId

log = logging.getLogger(__name__)

HANDS = 8  # passes at once: a peer that does not end its TLS can hold up its closure for seconds
PENDING = 1_000  # devices that wait to be closed; the next excess of one more says so again
CLOSED_EVERY: Micros = 1_000_000  # between two closures of a device that goes on being over a limit

Close = Callable[[DeviceId], Awaitable[int]]


class FloodGuard:
    """Counts at once, and acts in a pass of its own: nobody who counts has to wait.

    Attributes:
        limits: what one device may do.
        exceeded: how often each limit was exceeded.
        throttled: how often that began a time in which a device is refused.
    """

    def __init__(self, limits: Limits, sessions: Sessions, close: Close, clock: Clock) -> None:
        self.limits = limits
        self.exceeded: Counter[Meter] = Counter()
        self.throttled: Counter[Meter] = Counter()
        self._sessions, self._close, self._clock = sessions, close, clock
        self._meters = Meters(limits)
        self._pending: dict[DeviceId, Meter] = {}
        self._closed_at: dict[DeviceId, Micros] = {}
        self._some = asyncio.Event()

    def count(self, device: DeviceId, meter: Meter, units: int = 1) -> bool:
        """Count what a device did; False when that is over the limit, and is not to be served."""
        within = self._meters.spend(device, meter, self._clock.now(), units)
        if not within:
            self.exceed(device, meter)
        return within

    def use_channel(self, device: DeviceId, channel: str) -> bool:
        """Count a telemetry channel that a device writes; False when it is one too many."""
        within = self._meters.use_channel(device, channel, self._clock.now())
        if not within:
            self.exceed(device, Meter.CHANNELS)
        return within

    def exceed(self, device: DeviceId, meter: Meter) -> None:
        """The device is over a limit."""
        self.exceeded[meter] += 1
        if len(self._pending) < PENDING:
            self._pending.setdefault(device, meter)
            self._some.set()

    async def run_once(self) -> bool:
        """Wait for devices that are over a limit, then keep them out and close their connections. Any number of these
        may run at once. Raises `Temporary`, and tries again the next time."""
        await self._some.wait()
        while self._pending:
            device = next(iter(self._pending))
            meter = self._pending.pop(device)
            try:
                await self._act(device, meter)
            except Temporary:
                self._pending.setdefault(device, meter)  # behind the others
                raise
        self._some.clear()
        return True

    async def _act(self, device: DeviceId, meter: Meter) -> None:
        now = self._clock.now()
        self._closed_at = {id: at for id, at in self._closed_at.items() if now - at < CLOSED_EVERY}
        if device in self._closed_at:
            return
        # First the mark: whoever is closed before it would be back at once.
        refused_for = await self._sessions.throttle(device, meter, now)
        if refused_for is not None:
            self.throttled[meter] += 1
            log.warning("device.throttled device=%s exceeded=%s seconds=%d", device, meter, refused_for // 1_000_000)
        self._closed_at[device] = now
        try:
            await self._close(device)
        except Temporary:
            self._closed_at.pop(device, None)
            raise
