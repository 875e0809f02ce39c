"""When may deadlines be announced? Not while the evidence against them still waits in `reports`.

A worker that was down would otherwise announce `expired` for commands whose receipts lie in the queue.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25  # seconds
BEHIND_AFTER = 1.0  # seconds with ready reports, after which no deadline is announced
WAIT_AT_MOST = 30.0  # seconds: then the clocks run, whatever waits


class Gate:
    """Open when the reports found at connecting are handled and the queue does not lag.

    `depth` tells how many reports are ready now; None when the broker can't say.
    """

    def __init__(self, depth: Callable[[], Awaitable[int | None]]) -> None:
        self._depth = depth
        self._backlog = 0
        self._closed_since: float | None = None
        self._ready_since: float | None = None
        self._connected = False

    def connected(self, depth: int) -> None:
        """The consumer of `reports` has (re)connected and found so many messages."""
        self._backlog = depth
        self._connected = True
        self._closed_since = asyncio.get_running_loop().time() if depth else None

    def handled(self) -> None:
        """One report has been handled."""
        if self._backlog:
            self._backlog -= 1

    def is_open(self) -> bool:
        now = asyncio.get_running_loop().time()
        if not self._behind(now):
            self._closed_since = None
            return True
        if self._closed_since is None:
            self._closed_since = now
            log.info("deadlines.held reports=%d", self._backlog)
        return now - self._closed_since >= WAIT_AT_MOST

    async def watch(self) -> None:
        """Follow the depth of `reports`; runs until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            ready = await self._depth()
            now = asyncio.get_running_loop().time()
            if not ready:
                self._ready_since = None
            elif self._ready_since is None:
                self._ready_since = now

    def _behind(self, now: float) -> bool:
        lagging = self._ready_since is not None and now - self._ready_since > BEHIND_AFTER
        return not self._connected or self._backlog > 0 or lagging
