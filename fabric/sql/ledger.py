"""The port `Ledger` on SQL: the batch ledger, what is due, the event log.

One thread writes: whatever was submitted while the last transaction ran goes into the next one.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fabric.batch import Batcher
from fabric.command import WAITING, Command, Confirmed, Micros, State
from fabric.errors import LedgerUnavailable
from fabric.model import Accept, Change, LogRow, Mailbox, QuarantineRow, Result, TimelineRow, Write
from fabric.sql import log as event_log
from fabric.sql import rows, schema
from fabric.sql.engine import Database
from fabric.sql.fold import Fold, Stale, are_stored
from fabric.sql.prepared import Prepared, Row, padded
from topology.names import CommandId, DeviceId

READS = 5  # of one batch, before a row that keeps changing under it is given up
QUARANTINED_BODY = 4096  # bytes
QUARANTINED_ROWS = 100  # per device, and for unknown devices together

_Group = tuple[Write, ...]
_Folded = tuple[list[list[Result] | Exception], list[Command]]


class SqlLedger:
    """The commands of one fabric.

    Args:
        clock: the time in microseconds on the database's clock, as `fabric.clock.Clock` keeps it.
        jitter: gives numbers from 0 to 1, for the back-off of retries.
    """

    def __init__(
        self, database: Database, clock: Callable[[], Micros], *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._database, self._now, self._jitter = database, clock, jitter
        self._batcher: Batcher[_Group, list[Result]] = Batcher(self._flush, weigh=len)

    def start(self) -> None:
        """Take writes, in the running event loop."""
        self._batcher.start()

    async def close(self) -> None:
        """Commit what was submitted, then stop; the database stays open. Closing twice is closing once."""
        await self._batcher.stop()

    # ---- Writing ---------------------------------------------------------------------------------------

    async def write(self, *writes: Write, patience: float = 0.0) -> list[Result]:
        """Apply all, in one transaction with others that wait, and commit; results in order.

        When one of several `Accept`s is refused, none of these writes is done.

        Raises:
            NotFound: an `Accept` on an unknown device.
            Conflict: an `Accept` for another generation of the device, or with the id of another command. The
                same command again is no conflict: the result is the command as it is now.
            LedgerUnavailable: the database is away; the writes may have been done.
        """
        return await self._batcher.submit(writes, patience) if writes else []

    async def quarantine(self, mail: Sequence[QuarantineRow]) -> None:
        new = [
            {
                "at": row.at,
                "source": row.source,
                "device": row.device or "",
                "routing_key": row.routing_key,
                "reason": row.reason,
                "body": row.body[:QUARANTINED_BODY],
            }
            for row in mail
        ]

        def store(connection: sa.Connection) -> None:
            connection.execute(sa.insert(schema.quarantine), new)
            for device in sorted({row["device"] for row in new}):
                connection.execute(_PRUNE_QUARANTINE, {"of": device})

        if new:
            await self._database.write(store)

    # ---- Reading ---------------------------------------------------------------------------------------

    async def command(self, id: CommandId) -> tuple[Command, list[TimelineRow]] | None:
        def read(connection: sa.Connection) -> tuple[Command, list[TimelineRow]] | None:
            found = _COMMAND.first(connection, {"of": id})
            if found is None:
                return None
            command = rows.command(found)
            # Read after the command, on a later snapshot: what is newer than the command is left out.
            entries = _TIMELINE.all(connection, {"of": id, "version": command.version})
            return command, [rows.timeline_row(row) for row in entries]

        return await self._database.read(read)

    async def commands(
        self,
        *,
        device: DeviceId | None = None,
        states: Collection[State] | None = None,
        issuer: str | None = None,
        after: tuple[Micros, CommandId] | None = None,
        limit: int = 100,
    ) -> list[Command]:
        """Commands, the newest first; `after` is `(accepted_at, id)` of the last one seen."""
        table = schema.commands.c
        query = sa.select(*rows.COMMAND_COLUMNS).order_by(table.accepted_at.desc(), table.id.desc()).limit(limit)
        if device is not None:
            query = query.where(table.device == device)
        if states is not None:
            query = query.where(table.state.in_(sorted(state.value for state in states)))
        if issuer is not None:
            query = query.where(table.issuer == issuer)
        if after is not None:
            query = query.where(sa.tuple_(table.accepted_at, table.id) < sa.tuple_(*map(sa.literal, after)))
        return await self._database.read(lambda connection: list(map(rows.command, connection.execute(query))))

    async def due(self, now: Micros, limit: int) -> list[tuple[CommandId, State]]:
        found = await self._prepared(_DUE, {"now": now, "limit": limit})
        return [(CommandId(id), State(state)) for id, state in found]

    async def to_publish(self, now: Micros, limit: int) -> list[tuple[CommandId, int]]:
        found = await self._prepared(_TO_PUBLISH, {"now": now, "limit": limit})
        return [(CommandId(id), attempt) for id, attempt in found]

    async def waiting_by_device(self, cell: str) -> Mapping[DeviceId, list[tuple[CommandId, int]]]:
        waiting: dict[DeviceId, list[tuple[CommandId, int]]] = {}
        for row in await self._all(_QUEUED, {"cell": cell}):
            waiting.setdefault(DeviceId(row.device), []).append((CommandId(row.id), row.attempt))
        return waiting

    async def mailboxes(self, devices: Sequence[DeviceId]) -> Mapping[DeviceId, Mailbox]:
        """What may be in these mailboxes: commands that wait, and withdrawn ones until their deadline."""
        return await self._database.read(lambda connection: mailboxes(connection, devices, self._now()))

    # ---- The event log ---------------------------------------------------------------------------------

    async def sequence(self, owner: str, lease: Micros, limit: int) -> list[LogRow] | None:
        now = self._now()
        idle = await self._database.read(lambda connection: event_log.is_idle(connection, owner, now, lease))
        if idle is not None:
            return [] if idle else None
        return await self._database.write(lambda connection: event_log.sequence(connection, owner, now, lease, limit))

    async def sequenced(self, owner: str, position: int) -> None:
        # Forgotten in a crash, it is published again: at least once is what is promised.
        await self._database.write(
            lambda connection: event_log.mark_published(connection, owner, position), durable=False
        )

    async def events(self, after: int, limit: int) -> list[LogRow]:
        """The event log from the position after `after`, in order, without gaps."""
        return await self._database.read(lambda connection: event_log.read(connection, after, limit))

    async def last_position(self) -> int:
        """The last position given to an event; 0 when there is none."""
        return await self._database.read(event_log.last_position)

    # ---- The database ----------------------------------------------------------------------------------

    async def time_offset(self) -> Micros:
        return await self._database.time_offset()

    async def incarnation(self) -> str:
        found = await self._all(_INCARNATION, {})
        if not found:
            raise LedgerUnavailable("The database has no incarnation; run `restante migrate`.")
        return str(found[0].value)

    async def _all(self, query: sa.Select[Any], parameters: rows.Row) -> Sequence["sa.Row[Any]"]:
        return await self._database.read(lambda connection: connection.execute(query, parameters).all())

    async def _prepared(self, query: Prepared, parameters: rows.Row) -> list[Row]:
        return await self._database.read(lambda connection: query.all(connection, parameters))

    async def _flush(self, groups: Sequence[_Group]) -> list[list[Result] | Exception]:
        return await self._database.write_batch(lambda: self._write(groups))

    def _write(self, groups: Sequence[_Group]) -> list[list[Result] | Exception]:
        for fold in (self._fold_new, *(self._fold,) * READS):
            try:
                results, _ = self._database.transact(
                    partial(fold, groups),
                    committed=lambda connection, done: are_stored(connection, done[1]),
                    durable=any(_must_last(write) for group in groups for write in group),
                )
            except Stale:
                continue
            return results
        raise LedgerUnavailable("The commands kept changing under the write; try again.")

    def _fold_new(self, groups: Sequence[_Group], connection: sa.Connection) -> _Folded:
        """The usual case, with a statement or two less: new commands of one device at most.

        Raises:
            Stale: it is not the usual case; nothing was done.
        """
        fold = Fold(connection, self._now, self._jitter)
        ids, new = _split(groups)
        if new:
            device, generation = new[0].device, new[0].generation
            if any((command.device, command.generation) != (device, generation) for command in new):
                raise Stale
            if not fold.count(device, generation, len(new)):
                raise Stale
        fold.load((), ids)
        results: list[list[Result] | Exception] = []
        for group in groups:
            result = fold.apply(group)
            if not isinstance(result, list):
                raise Stale
            results.append(result)
        try:
            written = fold.save()
        except IntegrityError as error:  # an `Accept` for the second time
            raise Stale from error
        return _told(fold, results), written

    def _fold(self, groups: Sequence[_Group], connection: sa.Connection) -> _Folded:
        fold = Fold(connection, self._now, self._jitter)
        ids, new = _split(groups)
        fold.load((command.device for command in new), (*ids, *(command.id for command in new)))
        results: list[list[Result] | Exception] = [fold.apply(group) for group in groups]
        written = fold.save()
        return _told(fold, results), written


def _told(fold: Fold, results: list[list[Result] | Exception]) -> list[list[Result] | Exception]:
    """`Fold.told` for the results of all groups at once."""
    told = iter(fold.told([result for group in results if isinstance(group, list) for result in group]))
    return [[next(told) for _ in group] if isinstance(group, list) else group for group in results]


def _must_last(write: Write) -> bool:
    """Must it survive a crash of the database's machine? A confirm need not: the attempt then counts as of
    unknown fate, as after a crash just before, and is made again."""
    return not (isinstance(write, Change) and isinstance(write.event, Confirmed))


def _split(groups: Sequence[_Group]) -> tuple[list[CommandId], list[Command]]:
    """The ids of changed commands, and the commands to accept."""
    changed: list[CommandId] = []
    new: list[Command] = []
    for group in groups:
        for write in group:
            if isinstance(write, Accept):
                new.append(write.command)
            else:
                changed.append(write.command)
    return changed, new


def mailboxes(connection: sa.Connection, devices: Sequence[DeviceId], now: Micros) -> dict[DeviceId, Mailbox]:
    """The mailboxes of these devices, empty ones too."""
    boxes = {device: Mailbox(0, None) for device in devices}
    if devices:
        for row in connection.execute(_MAILBOXES, {"ids": padded(devices), "now": now}):
            boxes[row.device] = Mailbox(row.depth, row.oldest_at)
    return boxes


_commands = schema.commands.c
# The index's condition in its own words, so that prepared statements use it too.
_in_mailbox = sa.text("state IN ('accepted', 'queued', 'cancelled')")
_waiting = sa.text("state IN ({})".format(", ".join(sorted(f"'{state}'" for state in WAITING))))

_COMMAND = Prepared(sa.select(*rows.COMMAND_COLUMNS).where(_commands.id == sa.bindparam("of")))
_TIMELINE = Prepared(
    sa.select(*rows.TIMELINE_COLUMNS)
    .where(schema.events.c.command == sa.bindparam("of"), schema.events.c.version <= sa.bindparam("version"))
    .order_by(schema.events.c.id)
)
_DUE = Prepared(
    sa.select(_commands.id, _commands.state)
    .where(_commands.due <= sa.bindparam("now"))
    .order_by(_commands.due)
    .limit(sa.bindparam("limit"))
)
# Past its deadline nothing is published any more; what is left is the clock's.
_TO_PUBLISH = Prepared(
    sa.select(_commands.id, _commands.attempt)
    .where(_commands.publish_due <= sa.bindparam("now"), _commands.deadline > sa.bindparam("now"), _waiting)
    .order_by(_commands.publish_due)
    .limit(sa.bindparam("limit"))
)
_QUEUED = (
    sa.select(_commands.device, _commands.id, _commands.attempt)
    .join(schema.devices, schema.devices.c.id == _commands.device)
    .where(
        schema.devices.c.cell == sa.bindparam("cell"),
        schema.devices.c.generation == _commands.generation,
        _commands.state == State.QUEUED.value,
        _in_mailbox,
        _commands.publish_due.is_(None),
    )
    .order_by(_commands.device, _commands.seq)
)
_MAILBOXES = (
    sa.select(_commands.device, sa.func.count().label("depth"), sa.func.min(_commands.accepted_at).label("oldest_at"))
    .where(
        _commands.device.in_(sa.bindparam("ids", expanding=True)),
        _in_mailbox,
        _commands.deadline > sa.bindparam("now"),
        sa.or_(_commands.state != State.CANCELLED.value, _commands.copies != ""),
    )
    .group_by(_commands.device)
)
_INCARNATION = sa.select(schema.meta.c.value).where(schema.meta.c.name == "incarnation")
_PRUNE_QUARANTINE = sa.delete(schema.quarantine).where(
    schema.quarantine.c.device == sa.bindparam("of"),
    schema.quarantine.c.id
    <= sa.select(schema.quarantine.c.id)
    .where(schema.quarantine.c.device == sa.bindparam("of"))
    .order_by(schema.quarantine.c.id.desc())
    .offset(QUARANTINED_ROWS)
    .limit(1)
    .scalar_subquery(),
)
