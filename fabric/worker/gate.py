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

    Args:
        depth: how many reports are ready now; None when the queue does not exist.
        shed: how many reports were dropped, ever, since their devices were over the limit.
        connected: is the connection that consumes `reports` up?
    """

    def __init__(
        self, depth: Callable[[], Awaitable[int | None]], shed: Callable[[], int], connected: Callable[[], bool]
    ) -> None:
        self._depth, self._shed, self._connected = depth, shed, connected
        self._backlog: int | None = None  # None: not known, since the consumer has not (re)started
        self._closed_since: float | None = None
        self._ready_since: float | None = None
        self._handled = 0  # since the last look
        self._shed_before = 0

    def started(self, depth: int) -> None:
        """The consumer of `reports` has (re)started and found so many messages."""
        self._backlog = depth

    def handled(self) -> None:
        """One report has been handled."""
        self._handled += 1
        if self._backlog:
            self._backlog -= 1

    def is_open(self) -> bool:
        now = asyncio.get_running_loop().time()
        if not self._connected():
            self._backlog = None
        lagging = self._ready_since is not None and now - self._ready_since > BEHIND_AFTER
        if self._backlog == 0 and not lagging:
            self._closed_since = None
            return True
        if self._closed_since is None:
            self._closed_since = now
            log.info("deadlines.held reports=%s", self._backlog)
        return now - self._closed_since >= WAIT_AT_MOST

    async def look(self) -> None:
        """Follow the depth of `reports`; to be called every `LOOK_EVERY` seconds. Raises `Temporary`.

        A lag that is made by a flood holds nothing back: other devices' deadlines don't wait for a throttled one.
        """
        ready = await self._depth()
        shed, self._shed_before = self._shed() - self._shed_before, self._shed()
        handled, self._handled = self._handled, 0
        if not ready or 2 * shed > handled:
            self._ready_since = None
        elif self._ready_since is None:
            self._ready_since = asyncio.get_running_loop().time()
