"""The loops that keep every command's state true when nobody says anything.

Each is one idempotent pass, run again and again; any number of workers may run them at once, since the
transition table, stepped under the row's lock, lets one of them announce.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fabric import command as life
from fabric import events
from fabric.clock import Clock
from fabric.errors import Temporary
from fabric.mail import Republisher
from fabric.model import Change, LogRow
from fabric.ports import Ledger, Publisher
from fabric.worker.gate import Gate
from fabric.worker.reports import Recorder
from topology import names, wire

log = logging.getLogger(__name__)

BATCH = 500  # commands or events of one pass
REFILLED = 100_000  # events that are published again to a stream that is found empty
LEASE: life.Micros = 10_000_000  # of the sequencer
UNASKED = 1.0  # seconds between looks for events to publish of which there was no news


class Deadlines:
    """Announces `expired` and `unanswered` by the fabric's clock."""

    def __init__(self, ledger: Ledger, recorder: Recorder, clock: Clock, gate: Gate) -> None:
        self._ledger, self._recorder, self._clock, self._gate = ledger, recorder, clock, gate

    async def run_once(self) -> bool:
        """Settle what is due; True when there may be more."""
        if not self._gate.is_open():
            return False
        due = await self._ledger.due(self._clock.now(), BATCH)
        if due:
            await self._recorder.record(
                *(
                    Change(id, life.DeadlinePassed() if state in life.WAITING else life.ResponseDue())
                    for id, state in due
                )
            )
        return len(due) == BATCH


async def refill(ledger: Ledger, stream: str) -> None:
    """Have the newest events published again when the stream of events is found empty: what was in it is gone."""
    if stream == names.EVENTS:
        await ledger.publish_again(REFILLED)


class Sequencer:
    """Gives events their positions, and publishes them to the `events` stream in that order, at least once.

    The two are passes of their own: positions are given, and told over HTTP, also while there is no broker.
    """

    def __init__(self, owner: str, ledger: Ledger, publisher: Publisher) -> None:
        self._owner, self._ledger, self._publisher = owner, ledger, publisher
        self._news = asyncio.Event()  # there is something to publish, as far as is known

    async def run_once(self) -> bool:
        """Give positions; True when there may be more to do."""
        given = await self._ledger.sequence(self._owner, LEASE, BATCH)
        if given:
            self._news.set()
        return given == BATCH

    async def leave(self) -> None:
        """Let the next worker go on at once: else it waits until the lease runs out."""
        await self._ledger.leave_sequence(self._owner)

    async def publish_once(self) -> None:
        """Publish what has a position: once there is news of some; or after a second, for what another sequencer left,
        or is to be published again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(UNASKED):
                await self._news.wait()
        self._news.clear()
        try:
            more = await self._publish()
        except Temporary:
            self._news.set()
            raise
        if more:
            self._news.set()

    async def _publish(self) -> bool:
        # What has been read before a connection was lost must not come first in a stream that was made anew meanwhile.
        async with self._publisher.in_order("", names.EVENTS) as publish:
            rows = await self._ledger.unpublished(self._owner, BATCH)
            if rows:
                await publish([_message(row) for row in rows])
                await self._ledger.sequenced(self._owner, rows[0].position, rows[-1].position)
        return len(rows) == BATCH


def _message(row: LogRow) -> wire.Message:
    return wire.Message(
        row.kind,
        {"v": wire.VERSION, "at": row.at // 1000, "position": row.position, "version": row.version},
        json.dumps(events.document(row), separators=(",", ":")).encode(),
        wire.JSON,
        message_id=str(row.position),
    )


class Reconciler:
    """Compares each mailbox with the ledger after a broker came back, and republishes a shortfall.

    The broker's confirm is not proof of an fsync, and an unacked message may be in an agent's hands: a copy
    too many is told from the first by its attempt, and claimed before it is run.
    """

    def __init__(self, cell: str, ledger: Ledger, publisher: Publisher, republisher: Republisher) -> None:
        self._cell, self._ledger, self._publisher, self._republisher = cell, ledger, publisher, republisher

    async def run_once(self) -> int:
        """Returns how many commands were published again."""
        republished = 0
        for device, waiting in (await self._ledger.waiting_by_device(self._cell)).items():
            depth = await self._publisher.depth(names.mailbox(device))
            if (depth or 0) < len(waiting):
                log.warning("mailbox.shortfall device=%s depth=%s ledger=%d", device, depth, len(waiting))
                republished += await self._republisher.republish(list(waiting), "shortfall")
        return republished


async def keep_running(name: str, every: float, run_once: Callable[[], Awaitable[object]]) -> None:
    """Run a pass again and again, `every` seconds apart, or at once while it returns True.

    A ledger or broker that is away makes it back off up to 5 s: the first failure is a warning, the recovery
    one line.
    """
    failures = 0
    while True:
        try:
            more = await run_once()
        except Temporary as error:
            failures += 1
            log.log(logging.WARNING if failures == 1 else logging.DEBUG, "%s.failed error=%s", name, error)
            await asyncio.sleep(min(5.0, 0.1 * 2 ** min(failures, 6)))
            continue
        if failures:
            log.info("%s.recovered after=%d", name, failures)
            failures = 0
        if more is not True:
            await asyncio.sleep(every)
