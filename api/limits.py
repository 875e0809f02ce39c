"""A bound on how often somebody may ask, kept in memory."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

from fabric.errors import TooManyRequests


class SourceLimit:
    """A token bucket per source address, and one for all together.

    Args:
        per_minute: requests a minute of one IPv4 address or IPv6 /64.
        in_total: requests a minute of everybody; a flood from many sources ends here.
        remembered: sources that are kept; the longest silent one is forgotten first.
    """

    def __init__(
        self, per_minute: int, in_total: int, remembered: int = 10_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute, self._remembered, self._clock = per_minute, remembered, clock
        self._total = _Bucket(in_total, clock())
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()

    def check(self, host: str | None) -> None:
        """Raises `TooManyRequests`."""
        now = self._clock()
        source = source_of(host)
        bucket = self._sources.get(source)
        if bucket is None:
            while len(self._sources) >= self._remembered:
                self._sources.popitem(last=False)
            bucket = self._sources[source] = _Bucket(self._per_minute, now)
        self._sources.move_to_end(source)
        for one in (bucket, self._total):
            wait = one.take(now)
            if wait > 0:
                raise TooManyRequests("Too many attempts; wait as long as 'Retry-After' says.", wait)


def source_of(host: str | None) -> str:
    """The address as it is counted: IPv6 by its /64, an IPv4-mapped one as the IPv4 it is."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


class _Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self._size = float(per_minute)
        self._level, self._at = self._size, now

    def take(self, now: float) -> float:
        """Seconds to wait; 0 when one was taken."""
        self._level = min(self._size, self._level + (now - self._at) * self._size / 60)
        self._at = now
        if self._level < 1:
            return (1 - self._level) * 60 / self._size
        self._level -= 1
        return 0.0
