"""How much a device may do, as token buckets. Pure: the time is passed in.

A bucket is one number, the time at which it is full again: taking from it moves that time on, and what would move
it further than the bucket is deep is over the limit.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.command import Micros
from topology.names import DeviceId

SECOND: Micros = 1_000_000
HOUR: Micros = 3600 * SECOND
BUCKETS = 50_000  # that one process keeps
CHANNELS_OF = 10_000  # devices whose channels one process keeps


class Meter(enum.StrEnum):
    """What is metered; the names are those in events and logs."""

    REPORTS = "reports"
    INQUIRIES = "inquiries"
    CHANNELS = "channels"
    REFUSALS = "refusals"
    CONNECTIONS = "connections"
    LOGINS = "logins"
    TRAFFIC = "traffic"


@dataclass(frozen=True, slots=True)
class Rate:
    """`units` in each `period`, and `burst` of them at once."""

    units: int
    period: Micros
    burst: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device may do. A burst is the allowance of 20 s: a device that comes back reports on all that waited.
    Of traffic it is 30 s, since it is known in steps of up to so many.

    Attributes:
        reports: receipts, outcomes, claims and hellos a second.
        inquiries: a second.
        channels: telemetry channels within an hour.
        refusals: requests that it has no right to, a minute.
        connections: at once.
        logins: at once; then one each `login_interval` seconds.
        login_interval: seconds.
        traffic: bytes a second over its connections, both ways together.
        takeovers: connections replaced by a newcomer within a minute.
    """

    reports: int = 50
    inquiries: int = 10
    channels: int = 64
    refusals: int = 30
    connections: int = 2
    logins: int = 10
    login_interval: int = 5
    traffic: int = 1_000_000
    takeovers: int = 3

    @property
    def logging_in(self) -> Rate:
        return Rate(1, self.login_interval * SECOND, self.logins)

    @property
    def rates(self) -> Mapping[Meter, Rate]:
        """Of what is metered in each process."""
        return {
            Meter.REPORTS: Rate(self.reports, SECOND, 20 * self.reports),
            Meter.INQUIRIES: Rate(self.inquiries, SECOND, 20 * self.inquiries),
            Meter.REFUSALS: Rate(self.refusals, 60 * SECOND, self.refusals),
            Meter.TRAFFIC: Rate(self.traffic, SECOND, 30 * self.traffic),
        }


def spend(full_at: Micros, now: Micros, rate: Rate, units: int = 1) -> Micros | None:
    """Take from a bucket: when it is full again then, or None when there is not so much in it."""
    after = max(full_at, now) + -(-units * rate.period // rate.units)
    return after if after - now <= -(-rate.burst * rate.period // rate.units) else None


class Meters:
    """The buckets of all devices that were heard of lately, in one process."""

    def __init__(self, limits: Limits) -> None:
        self._rates, self._channels_allowed = limits.rates, limits.channels
        self._buckets: dict[tuple[DeviceId, Meter], Micros] = {}
        self._channels: dict[DeviceId, dict[int, Micros]] = {}

    def spend(self, device: DeviceId, meter: Meter, now: Micros, units: int = 1) -> bool:
        """Take so much of the device's allowance; False, and nothing taken, when that is more than is left."""
        key = (device, meter)
        after = spend(self._buckets.get(key, 0), now, self._rates[meter], units)
        if after is None:
            return False
        if key not in self._buckets and len(self._buckets) >= BUCKETS:
            self._drop_full(now)
        self._buckets[key] = after
        return True

    def use_channel(self, device: DeviceId, channel: str, now: Micros) -> bool:
        """Note that the device writes a channel; False when it is one more than it may within an hour."""
        used = self._channels.pop(device, {})
        if len(self._channels) >= CHANNELS_OF:
            del self._channels[next(iter(self._channels))]  # whose last use is the longest ago
        self._channels[device] = used
        named = hash(channel)
        if named not in used and len(used) >= self._channels_allowed:
            for old in [each for each, at in used.items() if now - at > HOUR]:
                del used[old]
            if len(used) >= self._channels_allowed:
                return False
        used[named] = now
        return True

    def _drop_full(self, now: Micros) -> None:
        """A full bucket is as good as none. If too few are, the oldest go."""
        self._buckets = {key: full_at for key, full_at in self._buckets.items() if full_at > now}
        for key in list(self._buckets)[: max(0, len(self._buckets) - BUCKETS * 9 // 10)]:
            del self._buckets[key]
