"""The loops that keep every command's state true when nobody says anything.

Each is one idempotent pass, run again and again; any number of workers may run them at once, since the
transition table, stepped under the row's lock, lets one of them announce.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from fabric import command as life
from fabric.clock import Clock
from fabric.errors import Temporary
from fabric.mail import Republisher
from fabric.model import Change
from fabric.ports import BrokerAdmin, Ledger, Publisher, Registry
from fabric.worker.gate import Gate
from fabric.worker.reports import Recorder
from topology import names, wire
from topology.names import DeviceId

log = logging.getLogger(__name__)

BATCH = 500  # commands or events of one pass
LEASE: life.Micros = 10_000_000  # of the sequencer
SWEEPS = (0.0, 1.0, 11.0)  # seconds after a revocation: at once, past tracking, past the 10 s handshake time-out


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


class Sequencer:
    """Publishes the event log to the `events` stream, in the order of its positions, at least once."""

    def __init__(self, owner: str, ledger: Ledger, publisher: Publisher) -> None:
        self._owner, self._ledger, self._publisher = owner, ledger, publisher

    async def run_once(self) -> bool:
        rows = await self._ledger.sequence(self._owner, LEASE, BATCH)
        if not rows:
            return False
        await asyncio.gather(
            *(
                self._publisher.publish(
                    "",
                    names.EVENTS,
                    wire.Message(
                        row.kind,
                        {"v": wire.VERSION, "at": row.at // 1000, "position": row.position, "version": row.version},
                        json.dumps({"position": row.position, "kind": row.kind, **row.document}).encode(),
                        wire.JSON,
                        message_id=str(row.position),
                    ),
                )
                for row in rows
            )
        )
        await self._ledger.sequenced(self._owner, rows[-1].position)
        return len(rows) == BATCH


class Closures:
    """Closes the connections of devices that were deleted, suspended or revoked.

    A connection in its handshake is not known to the broker yet, so each closure is swept three times; it
    is done, and forgotten, after the last.
    """

    def __init__(self, registry: Registry, admin: BrokerAdmin) -> None:
        self._registry, self._admin = registry, admin
        self._swept: dict[int, tuple[float, int]] = {}

    async def run_once(self) -> bool:
        now = asyncio.get_running_loop().time()
        open_closures = await self._registry.closures(BATCH)
        ours = {id for id, _ in open_closures}
        self._swept = {id: swept for id, swept in self._swept.items() if id in ours}  # others: done by another worker
        for id, device in open_closures:
            since, sweeps = self._swept.get(id, (now, 0))
            if now - since < SWEEPS[sweeps]:
                continue
            await self._sweep(device)
            self._swept[id] = (since, sweeps + 1)
            if sweeps + 1 == len(SWEEPS):
                await self._registry.closed([id])
                del self._swept[id]
        return False

    async def _sweep(self, device: DeviceId) -> None:
        closed = await self._admin.close_connections(device)
        if closed:
            log.info("connections.closed device=%s count=%d", device, closed)


class Presence:
    """Keeps what the registry says of devices' connections in line with the broker's statistics.

    They are some seconds old, and so is what `GET /v1/devices/{id}` says of a connection.
    """

    def __init__(self, registry: Registry, admin: BrokerAdmin, clock: Clock) -> None:
        self._registry, self._admin, self._clock = registry, admin, clock

    async def run_once(self) -> None:
        users = await self._admin.connected_users()
        after: DeviceId | None = None
        while page := await self._registry.devices(after, BATCH):
            for device in page:
                if device.connected != (device.id in users):
                    await self._registry.connection(device.id, not device.connected, self._clock.now())
            after = page[-1].id


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
