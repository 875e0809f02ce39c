"""The port `Ledger` on SQL: the batch ledger, what is due, the event log.

One thread writes: whatever was submitted while the last transaction ran goes into the next one.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from fabric.audit import By, acting
from fabric.batch import Batcher
from fabric.command import WAITING, Command, Confirmed, Micros, State
from fabric.errors import LedgerUnavailable
from fabric.measures import Lives
from fabric.model import Accept, Change, LogRow, Mailbox, QuarantineRow, Result, TimelineRow, Write
from fabric.ports import Due, Waiting
from fabric.sql import log as event_log
from fabric.sql import mailboxes, rows, schema, waiting
from fabric.sql.engine import Database, refused
from fabric.sql.fold import Fold, Stale, are_stored
from fabric.sql.greetings import incarnation
from fabric.sql.prepared import Prepared, Row
from fabric.sql.retention import PRUNED_THROUGH
from topology.names import CommandId, DeviceId

READS = 5  # of one batch, before a row that keeps changing under it is given up
QUARANTINED_BODY = 4096  # bytes
QUARANTINED_ROWS = 100  # per device, and for unknown devices together


@dataclass(frozen=True, slots=True)
class _Group:
    """What is written together, and who asks for it."""

    writes: tuple[Write, ...]
    by: By


_Folded = tuple[list[list[Result] | Exception], list[Command]]


class SqlLedger:
    """The commands of one fabric.

    Args:
        clock: the time in microseconds on the database's clock, as `fabric.clock.Clock` keeps it.
        jitter: gives numbers from 0 to 1, for the back-off of retries.

    Attributes:
        lives: what became of commands by the writes of this process.
    """

    def __init__(
        self, database: Database, clock: Callable[[], Micros], *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._database, self._now, self._jitter = database, clock, jitter
        self.lives = Lives()
        self._batcher: Batcher[_Group, list[Result]] = Batcher(self._flush, weigh=lambda group: len(group.writes))

    def start(self) -> None:
        """Take writes, in the running event loop."""
        self._batcher.start()

    async def close(self) -> None:
        """Commit what was submitted, then stop; the database stays open. Closing twice is closing once."""
        await self._batcher.stop()

    # ---- Writing ---------------------------------------------------------------------------------------

    async def write(self, *writes: Write, patience: float = 0.0) -> list[Result]:
        """Apply all, in one transaction with others that wait, and commit; results in order.

        When one of several `Accept`s is refused, none of these writes is done. Commands that somebody sends or
        cancels are recorded in the audit with them.

        Raises:
            NotFound: an `Accept` on an unknown device.
            Conflict: an `Accept` for another generation of the device, or with the id of another command. The
                same command again is no conflict: the result is the command as it is now.
            KeyReused: an `Accept` whose idempotency key stands for another request.
            BacklogFull: an `Accept` for a mailbox that may be full.
            LedgerUnavailable: the database is away; the writes may have been done.
        """
        if not writes:
            return []
        results = await self._batcher.submit(_Group(writes, acting()), patience)
        self.lives.note(results, self._now())
        return results

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

    async def due(self, by: Micros, limit: int) -> list[Due]:
        found = await self._prepared(_DUE, {"by": by, "limit": limit})
        return [Due(CommandId(id), State(state), at) for id, state, at in found]

    async def to_publish(self, now: Micros, limit: int) -> list[tuple[CommandId, int]]:
        found = await self._prepared(_TO_PUBLISH, {"now": now, "limit": limit})
        return [(CommandId(id), attempt) for id, attempt in found]

    async def waiting_by_device(self, cell: str) -> Mapping[DeviceId, list[tuple[CommandId, int]]]:
        waiting: dict[DeviceId, list[tuple[CommandId, int]]] = {}
        for row in await self._all(_QUEUED, {"cell": cell}):
            waiting.setdefault(DeviceId(row.device), []).append((CommandId(row.id), row.attempt))
        return waiting

    async def waiting(self, cell: str, *, accepted_by: Micros, after: Waiting | None, limit: int) -> list[Waiting]:
        now = self._now()
        return await self._database.read(
            lambda connection: waiting.page(connection, cell, accepted_by, now, after, limit)
        )

    async def waiting_of(self, issuers: Sequence[str], limit: int) -> list[CommandId]:
        return await self._database.read(lambda connection: waiting.of_issuers(connection, issuers, limit))

    async def mailboxes(self, devices: Sequence[DeviceId]) -> Mapping[DeviceId, Mailbox]:
        """What may be in these mailboxes: commands that wait, and withdrawn ones until their deadline."""
        return await self._database.read(lambda connection: mailboxes.read(connection, devices, self._now()))

    # ---- The event log ---------------------------------------------------------------------------------

    async def sequence(self, owner: str, lease: Micros, limit: int) -> int | None:
        now = self._now()
        idle = await self._database.read(lambda connection: event_log.is_idle(connection, owner, now, lease))
        if idle is not None:
            return 0 if idle else None
        return await self._database.write(lambda connection: event_log.sequence(connection, owner, now, lease, limit))

    async def leave_sequence(self, owner: str) -> None:
        await self._database.write(lambda connection: event_log.leave(connection, owner), durable=False)

    async def unpublished(self, owner: str, limit: int) -> list[LogRow]:
        return await self._database.read(lambda connection: event_log.unpublished(connection, owner, limit))

    async def sequenced(self, owner: str, first: int, last: int) -> None:
        # Forgotten in a crash, it is published again: at least once is what is promised.
        await self._database.write(
            lambda connection: event_log.mark_published(connection, owner, first, last), durable=False
        )

    async def publish_again(self, limit: int) -> None:
        await self._database.write(lambda connection: event_log.publish_again(connection, limit))

    async def events(self, after: int, limit: int) -> list[LogRow]:
        """The event log from the position after `after`, in order, without what was pruned; empty only at its end."""
        return await self._database.read(lambda connection: event_log.read(connection, after, limit))

    async def last_position(self) -> int:
        """The last position given to an event; 0 when there is none."""
        return await self._database.read(event_log.last_position)

    async def pruned_through(self) -> int:
        """The largest position of an event that was pruned; 0 when none was. Smaller ones may be kept."""
        found = await self._prepared(_PRUNED_THROUGH, {})
        return int(found[0][0]) if found else 0

    # ---- The database ----------------------------------------------------------------------------------

    async def time_offset(self) -> Micros:
        return await self._database.time_offset()

    async def incarnation(self) -> str:
        return await self._database.read(incarnation)

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
                    durable=any(_must_last(write) for group in groups for write in group.writes),
                    refused=_stale if fold == self._fold_new else refused,
                    pipelined=True,
                )
            except Stale:
                continue
            return results
        raise LedgerUnavailable("The commands kept changing under the write; try again.")

    def _fold_new(self, groups: Sequence[_Group], connection: sa.Connection) -> _Folded:
        """The usual case, with a statement or two less: plain new commands of one device at most.

        Raises:
            Stale: it is not the usual case; nothing was done.
        """
        fold = Fold(connection, self._now, self._jitter)
        ids, new = _split(groups)
        if new and not (_are_plain(new) and fold.count(new)):
            raise Stale
        fold.load((), ids)
        results: list[list[Result] | Exception] = []
        for group in groups:
            result = fold.apply(group.writes, group.by)
            if not isinstance(result, list):
                raise Stale
            results.append(result)
        return _saved(fold, results)

    def _fold(self, groups: Sequence[_Group], connection: sa.Connection) -> _Folded:
        fold = Fold(connection, self._now, self._jitter)
        ids, new = _split(groups)
        fold.load(new, ids)
        return _saved(fold, [fold.apply(group.writes, group.by) for group in groups])


def _saved(fold: Fold, results: Sequence[list[Result] | Exception]) -> _Folded:
    """`Fold.save` for the results of all groups at once."""
    told, written = fold.save([result for group in results if isinstance(group, list) for result in group])
    each = iter(told)
    return [[next(each) for _ in group] if isinstance(group, list) else group for group in results], written


def _stale(error: DBAPIError) -> Exception:
    """An `Accept` for the second time is no usual case."""
    return Stale() if isinstance(error, IntegrityError) else refused(error)


def _must_last(write: Write) -> bool:
    """Must it survive a crash of the database's machine? A confirm need not: the attempt then counts as of
    unknown fate, as after a crash just before, and is made again."""
    return not (isinstance(write, Change) and isinstance(write.event, Confirmed))


def _split(groups: Sequence[_Group]) -> tuple[list[CommandId], list[Accept]]:
    """The ids of changed commands, and what is to be accepted."""
    changed: list[CommandId] = []
    new: list[Accept] = []
    for group in groups:
        for write in group.writes:
            if isinstance(write, Accept):
                new.append(write)
            else:
                changed.append(write.command)
    return changed, new


def _are_plain(new: Sequence[Accept]) -> bool:
    """Are these of one device, and does nothing have to be looked up for them but its row and its mailbox?"""
    first = new[0].command
    return all(
        (accept.command.device, accept.command.generation) == (first.device, first.generation)
        and accept.idempotency is None
        and accept.command.supersedes is None
        for accept in new
    )


_commands = schema.commands.c
_waiting = sa.text("state IN ({})".format(", ".join(sorted(f"'{state}'" for state in WAITING))))

_COMMAND = Prepared(sa.select(*rows.COMMAND_COLUMNS).where(_commands.id == sa.bindparam("of")))
_TIMELINE = Prepared(
    sa.select(*rows.TIMELINE_COLUMNS)
    .where(schema.events.c.command == sa.bindparam("of"), schema.events.c.version <= sa.bindparam("version"))
    .order_by(schema.events.c.id)
)
_DUE = Prepared(
    sa.select(_commands.id, _commands.state, _commands.due)
    .where(_commands.due <= sa.bindparam("by"))
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
        mailboxes.IN_MAILBOX,
        _commands.publish_due.is_(None),
    )
    .order_by(_commands.device, _commands.seq)
)
_PRUNED_THROUGH = Prepared(sa.select(schema.meta.c.value).where(schema.meta.c.name == PRUNED_THROUGH))
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
