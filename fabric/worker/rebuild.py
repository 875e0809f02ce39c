"""Everything a broker held, made again from the ledger after it lost its disk.

Each step may be done twice, by anybody, and at any time: a rebuild that was interrupted is run again, and one
that was not needed costs each waiting command an attempt.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fabric.clock import Clock
from fabric.mail import Republisher
from fabric.ports import BrokerAdmin, Ledger, Publisher, Registry, Waiting
from topology import layout
from topology.names import DeviceId

PAGE = 500  # devices
BATCH = 200  # commands published at once
CLOSING = 4  # devices whose connections are closed at once: all of them log in again, with TLS

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What was done: mailboxes declared, connections closed, commands published again, and the new incarnation."""

    mailboxes: int
    closed: int
    republished: int
    incarnation: str


class Rebuild:
    """Makes mailboxes and mail again. The topology and its policies have been declared before.

    Args:
        renew_incarnation: commits a new incarnation and returns it.
        progress: told what is being done, and how many are done so far, as often as there is news.
    """

    def __init__(
        self,
        cell: str,
        ledger: Ledger,
        registry: Registry,
        publisher: Publisher,
        admin: BrokerAdmin,
        republisher: Republisher,
        clock: Clock,
        renew_incarnation: Callable[[], Awaitable[str]],
        progress: Progress,
    ) -> None:
        self._cell, self._ledger, self._registry, self._publisher = cell, ledger, registry, publisher
        self._admin, self._republisher, self._clock = admin, republisher, clock
        self._renew_incarnation, self._progress = renew_incarnation, progress

    async def run(self) -> Rebuilt:
        """Do it all. Raises `Temporary`: the broker or the database went away; run it again."""
        # What is accepted from here on is published to the broker as it is now.
        began = self._clock.now()
        mailboxes = await self._declare_mailboxes()
        # An agent asks for the incarnation on each new connection: the new one is committed before any is closed.
        # Outcomes that come again settle commands, which then need not be published again.
        incarnation = await self._renew_incarnation()
        closed = await self._close_connections()
        republished = await self._republish(began)
        return Rebuilt(mailboxes, closed, republished, incarnation)

    async def _declare_mailboxes(self) -> int:
        declared = 0
        async for page in self._devices():
            for device in page:
                await self._publisher.declare(layout.mailbox(device), [layout.mailbox_binding(device)])
                declared += 1
                self._progress("mailboxes declared", declared)
        return declared

    async def _close_connections(self) -> int:
        # By name, not from the broker's list of connections: that is seconds old, and these have just come.
        closed = 0
        async for page in self._devices():
            for start in range(0, len(page), CLOSING):
                some = page[start : start + CLOSING]
                closed += sum(await asyncio.gather(*map(self._admin.close_connections, some)))
                self._progress("connections closed", closed)
        return closed

    async def _republish(self, began: int) -> int:
        republished = 0
        after: Waiting | None = None
        while batch := await self._ledger.waiting(self._cell, accepted_by=began, after=after, limit=BATCH):
            republished += await self._republisher.republish([(it.command, it.attempt) for it in batch], "rebuild")
            after = batch[-1]
            self._progress("commands published again", republished)
        return republished

    async def _devices(self) -> AsyncIterator[list[DeviceId]]:
        after: DeviceId | None = None
        while page := await self._registry.devices(after, PAGE):
            yield [device.id for device in page if device.cell == self._cell]
            after = page[-1].id
