"""Keeps the ledger at the size of its retention."""

import asyncio

from fabric.clock import Clock
from fabric.command import Micros
from fabric.ports import Audit, Retention

BATCH = 200  # commands of one transaction, and as many rows of each other kind
PAUSE = 0.1  # seconds between transactions, for whoever waits to write: 2,000 commands/s at most


class Pruner:
    """Deletes what was over longer ago than `keep` microseconds, and of the audit what is older than `keep_audit`."""

    def __init__(self, retention: Retention, audit: Audit, clock: Clock, keep: Micros, keep_audit: Micros) -> None:
        self._retention, self._audit, self._clock = retention, audit, clock
        self._keep, self._keep_audit = keep, keep_audit

    async def run_once(self) -> bool:
        """One transaction of each; True, after a pause, when there is more to delete."""
        now = self._clock.now()
        more = await self._retention.prune(now - self._keep, BATCH)
        more = await self._audit.prune(now - self._keep_audit, BATCH) or more
        if more:
            await asyncio.sleep(PAUSE)
        return more
