"""The loops that keep every command's state true when nobody says anything.

Each is one idempotent pass, run again and again; any number of workers may run them at once, since the
transition table, stepped under the row's lock, lets one of them announce.
"""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fabric import command as life
from fabric import events
from fabric.clock import Clock
from fabric.errors import Temporary
from fabric.mail import Republisher
from fabric.model import Change, LogRow
from fabric.ports import Due, Ledger, Publisher
from fabric.worker.gate import Gate
from fabric.worker.reports import Recorder
from topology import names, wire

log = logging.getLogger(__name__)

BATCH = 500  # commands or events of one pass
REFILLED = 100_000  # events that are published again to a stream that is found empty
LOOK_AHEAD: life.Micros = 200_000  # from one look at the deadlines to the next
TOGETHER = 0.02  # seconds, at most, that one waits for others
LEASE: life.Micros = 10_000_000  # of the sequencer
UNASKED = 1.0  # seconds between looks for events to publish of which there was no news


class Deadlines:
    """Announces `expired` and `unanswered` by the fabric's clock.

    A look at the ledger also says what is due before the next one, so that each is announced at its time. What was
    given less time than lies between two looks is announced at the next.
    """

    def __init__(self, ledger: Ledger, recorder: Recorder, clock: Clock, gate: Gate) -> None:
        self._ledger, self._recorder, self._clock, self._gate = ledger, recorder, clock, gate

    async def run_once(self) -> bool:
        """Settle what is due, then wait until something else is, or for the next look; True when more may be due."""
        now = self._clock.now()
        next_at = now + LOOK_AHEAD
        if self._gate.is_open():
            found = await self._ledger.due(next_at, BATCH)
            due = [each for each in found if each.at <= now]
            if due:
                await self._recorder.record(*map(_passed, due))
            if len(due) == BATCH:
                return True
            if len(due) < len(found):
                next_at = found[len(due)].at
        # What is due a moment later goes along; and of several workers one finds it settled by another.
        await asyncio.sleep(max(0, next_at - self._clock.now()) / 1_000_000 + random.uniform(0, TOGETHER))  # noqa: S311
        return False


def _passed(due: Due) -> Change:
    return Change(due.id, life.DeadlinePassed() if due.state in life.WAITING else life.ResponseDue())


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
