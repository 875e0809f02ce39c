"""The sequencer's part of the ledger: positions for events, under one lease.

The lease's row is locked whenever positions are given, so that they are gapless and strictly increasing even
if two processes believe to hold the lease. An event becomes visible with its transaction, perhaps after one
of a higher id; it then simply gets the next position. The events of one command keep their order: its row's
lock makes the next one's id both later and higher.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from fabric import presenting
from fabric.command import Command, Micros
from fabric.model import LogRow, TimelineRow
from fabric.sql import rows, schema
from fabric.sql.prepared import Among, Prepared, Row

SEQUENCER: Final = "sequencer"

_events = schema.events.c
_leases = schema.leases.c
_commands = schema.commands.c
_DEVICE, _COMMAND = rows.LOG_COLUMNS.index(_events.device), rows.LOG_COLUMNS.index(_events.command)


def is_idle(connection: sa.Connection, owner: str, now: Micros, lease: Micros) -> bool | None:
    """A look without a lock: False when another owner holds the lease; True when this one holds it well, and
    has nothing to do; None when `sequence` must be called."""
    ((holder, until, unsequenced),) = _LOOK.all(connection, {})
    if holder != owner:
        return False if until > now else None
    held_well = until - now > lease // 2
    return True if held_well and not unsequenced else None


def sequence(connection: sa.Connection, owner: str, now: Micros, lease: Micros, limit: int) -> int | None:
    """Take or renew the lease, and number what is new; returns how many, or None without the lease."""
    held = _TAKE.first(connection, {"by": owner, "now": now, "ends": now + lease})
    if held is None:
        return None
    (position,) = held
    given = _NUMBER.run(connection, [{"last": position, "limit": limit}])
    if given:
        _GIVEN.run(connection, [{"to": position + given}])
    return given


def leave(connection: sa.Connection, owner: str) -> None:
    """Give up the lease, if it is this owner's."""
    _LEAVE.run(connection, [{"by": owner}])


def unpublished(connection: sa.Connection, owner: str, limit: int) -> list[LogRow]:
    """The numbered events behind the last one marked published; none when another owner took the lease last."""
    found = _UNPUBLISHED.first(connection, {"by": owner})
    return [] if found is None else read(connection, found[0], limit)


def mark_published(connection: sa.Connection, owner: str, first: int, last: int) -> None:
    """Everything from `first` to `last` is published; without effect when the lease is another's, or when something
    before has to be published first."""
    _PUBLISHED.run(connection, [{"by": owner, "first": first, "to": last}])


def publish_again(connection: sa.Connection, limit: int) -> None:
    """Take the newest events, so many at most, for unpublished."""
    _AGAIN.run(connection, [{"many": limit}])


def read(connection: sa.Connection, after: int, limit: int) -> list[LogRow]:
    """The log from the position after `after`; empty only when there is nothing behind it. Costs the same few
    statements however many events there are."""
    while True:
        events = _READ.all(connection, {"after": after, "limit": limit})
        found = _with_commands(connection, events)
        if found or not events:
            return found
        # All were pruned while they were read.


def _with_commands(connection: sa.Connection, events: Sequence[Row]) -> list[LogRow]:
    """Left out are events that were pruned meanwhile: their commands are gone too, by one transaction. So the
    commands are read last."""
    if not events:
        return []
    groups = _groups(connection, sorted({row[_DEVICE] for row in events}))
    timelines: dict[str, list[TimelineRow]] = {row[_COMMAND]: [] for row in events if row[_COMMAND] is not None}
    commands: dict[str, Command] = {}
    if timelines:
        for id, *entry in _TIMELINES(connection, sorted(timelines)):
            timelines[id].append(rows.timeline_row(entry))
        commands = {row[0]: rows.command(row) for row in _BRIEF(connection, sorted(timelines))}
    return [
        rows.log_row(row, groups.get(row[_DEVICE], ()), commands.get(row[_COMMAND]), timelines.get(row[_COMMAND], ()))
        for row in events
        if row[_COMMAND] is None or row[_COMMAND] in commands
    ]


def _groups(connection: sa.Connection, devices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The groups of devices, of deleted ones those at their end."""
    known = {id: tuple(json.loads(groups)) for id, groups in _GROUPS(connection, devices)}
    if gone := [id for id in devices if id not in known]:
        for id, document in _DELETIONS(connection, gone):
            known[id] = tuple(json.loads(document).get("groups", ()))
    return known


def last_position(connection: sa.Connection) -> int:
    return int(connection.execute(_LAST).scalar_one())


def _cut(column: "sa.Column[Any]") -> "sa.ColumnElement[Any]":
    """Of a body, as much as tells that it is too large to be shown in brief form."""
    if column.name not in ("body", "outcome_body"):
        return column
    place = (sa.literal_column(str(number), sa.Integer()) for number in (1, presenting.LARGE + 1))
    start = sa.func.substr(column, *place, type_=column.type)
    # Of an empty blob SQLite's `substr` makes NULL.
    return sa.case((sa.func.length(column) > sa.literal_column("0"), start), else_=column).label(column.name)


_the_lease = _leases.name == SEQUENCER
_LOOK = Prepared(
    sa.select(
        _leases.owner,
        _leases.until,
        sa.exists(sa.select(_events.id).where(sa.text("events.position IS NULL"))).label("unsequenced"),
    ).where(_the_lease)
)
_TAKE = Prepared(
    sa.update(schema.leases)
    .where(_the_lease, sa.or_(_leases.owner == sa.bindparam("by"), _leases.until <= sa.bindparam("now")))
    .values(owner=sa.bindparam("by"), until=sa.bindparam("ends"))
    .returning(_leases.position)
)
_LEAVE = Prepared(
    sa.update(schema.leases).where(_the_lease, _leases.owner == sa.bindparam("by")).values(until=sa.literal_column("0"))
)
_UNPUBLISHED = Prepared(
    sa.select(_leases.published).where(
        _the_lease, _leases.owner == sa.bindparam("by"), _leases.published < _leases.position
    )
)
_fresh = (
    sa.select(
        _events.id,
        (sa.cast(sa.bindparam("last"), sa.BigInteger) + sa.func.row_number().over(order_by=_events.id)).label("next"),
    )
    .where(_events.position.is_(None))
    .order_by(_events.id)
    .limit(sa.bindparam("limit"))
    .subquery("fresh")  # not a CTE: Python's sqlite3 counts rows only of statements that start with UPDATE
)
_NUMBER = Prepared(sa.update(schema.events).where(_events.id == _fresh.c.id).values(position=_fresh.c.next))
_GIVEN = Prepared(sa.update(schema.leases).where(_the_lease).values(position=sa.bindparam("to")))
_PUBLISHED = Prepared(
    sa.update(schema.leases)
    .where(
        _the_lease,
        _leases.owner == sa.bindparam("by"),
        _leases.published < sa.bindparam("to"),
        _leases.position >= sa.bindparam("to"),
        ~sa.exists(
            sa.select(_events.id).where(_events.position > _leases.published, _events.position < sa.bindparam("first"))
        ),
    )
    .values(published=sa.bindparam("to"))
)
_start = _leases.position - sa.bindparam("many")
_AGAIN = Prepared(
    sa.update(schema.leases)
    .where(_the_lease, _leases.published > _start)
    .values(published=sa.case((_start > 0, _start), else_=0))
)
_READ = Prepared(
    sa.select(*rows.LOG_COLUMNS)
    .where(_events.position > sa.bindparam("after"))
    .order_by(_events.position)
    .limit(sa.bindparam("limit"))
)
# By the ids of a page: joined to it, a plan made for any page reads the whole table.
_TIMELINES = Among(sa.select(_events.command, *rows.TIMELINE_COLUMNS).order_by(_events.id), _events.command)
_BRIEF = Among(sa.select(*map(_cut, rows.COMMAND_COLUMNS)), _commands.id)
_GROUPS = Among(sa.select(schema.devices.c.id, schema.devices.c.groups), schema.devices.c.id)
_DELETIONS = Among(
    # The index's condition in its own words, so that prepared statements use it too.
    sa.select(_events.device, _events.document).where(sa.text("kind = 'device.deleted'")).order_by(_events.id),
    _events.device,
)
_LAST = sa.select(_leases.position).where(_leases.name == SEQUENCER)
