"""Fabric time, kept as an offset to the boot-time clock, which counts through suspend and never jumps.

A hello gives one sample: the fabric's time somewhere between sending and receiving. The middle is taken;
half the round trip is how wrong it can be.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

DRIFT = 100e-6  # s per s: what a cheap oscillator may drift, so that an old sample's error grows


def boot_ms() -> float:
    """Milliseconds since boot, suspended time included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6


def wall_ms() -> int:
    """The machine's own idea of the time, in epoch ms: for use before the fabric has told."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class _Sample:
    offset: float  # ms: fabric time minus boot time
    error: float  # ms at `taken`
    taken: float  # ms, boot time


class FabricClock:
    """`now` in epoch ms on the fabric's clock, or None before the first answer to a hello."""

    def __init__(self, boot: Callable[[], float] = boot_ms) -> None:
        self._boot = boot
        self._best: _Sample | None = None

    @property
    def known(self) -> bool:
        return self._best is not None

    def boot(self) -> float:
        return self._boot()

    def adjust(self, fabric_ms: int, sent: float, received: float) -> None:
        """Take an answer into account; `sent` and `received` are boot times in ms.

        The sample with the smallest possible error wins, unless the new one contradicts it: then the
        fabric's clock has changed, and the newer is right.
        """
        new = _Sample(fabric_ms - (sent + received) / 2, max(received - sent, 0) / 2, received)
        old = self._best
        if old is not None:
            old_error = old.error + (received - old.taken) * DRIFT
            contradicts = abs(new.offset - old.offset) > new.error + old_error
            if new.error > old_error and not contradicts:
                return
        self._best = new

    def now(self) -> int | None:
        """Fabric time in epoch ms; never more than half a round trip off."""
        return None if self._best is None else round(self._boot() + self._best.offset)

    def now_or(self, floor_ms: int) -> int:
        """Fabric time if it is known, else this machine's, but not before `floor_ms` (the last known fabric time)."""
        known = self.now()
        return known if known is not None else max(wall_ms(), floor_ms)
