"""The fabric's one clock: the database's, kept here as an offset to this machine's."""

import time
from collections.abc import Awaitable, Callable

from fabric.command import Micros

MEASURE_EVERY = 30.0  # seconds


class Clock:
    """`now` in microseconds on the database's clock, as last measured.

    Between measurements the monotonic clock counts, so that a jump of this machine's wall clock changes
    nothing.
    """

    def __init__(self, measure: Callable[[], Awaitable[Micros]]) -> None:
        self._measure = measure
        self._base = time.time_ns() // 1000 - _monotonic()

    async def synchronize(self) -> None:
        """Measure the database's clock; raises `LedgerUnavailable`."""
        offset = await self._measure()
        self._base = time.time_ns() // 1000 - _monotonic() + offset

    def now(self) -> Micros:
        return self._base + _monotonic()

    def now_ms(self) -> int:
        return self.now() // 1000


def _monotonic() -> Micros:
    return time.monotonic_ns() // 1000
