"""The sequencer's part of the ledger: positions for events, under one lease.

The lease's row is locked whenever positions are given, so that they are gapless and strictly increasing even
if two processes believe to hold the lease. An event becomes visible with its transaction, perhaps after one
of a higher id; it then simply gets the next position. The events of one command keep their order: its row's
lock makes the next one's id both later and higher.
"""

from typing import Final

import sqlalchemy as sa

from fabric.command import Micros
from fabric.model import LogRow
from fabric.sql import rows, schema

SEQUENCER: Final = "sequencer"

_events = schema.events.c
_leases = schema.leases.c


def is_idle(connection: sa.Connection, owner: str, now: Micros, lease: Micros) -> bool | None:
    """A look without a lock: False when another owner holds the lease; True when this one holds it well, and
    has nothing to do; None when `sequence` must be called."""
    row = connection.execute(_LOOK).one()
    if row.owner != owner:
        return False if row.until > now else None
    held_well = row.until - now > lease // 2
    return True if held_well and not row.unsequenced and row.published == row.position else None


def sequence(connection: sa.Connection, owner: str, now: Micros, lease: Micros, limit: int) -> list[LogRow] | None:
    """Take or renew the lease, number what is new, and return what is unpublished; None without the lease."""
    held = connection.execute(_TAKE, {"by": owner, "now": now, "ends": now + lease}).first()
    if held is None:
        return None
    unpublished = held.position - held.published
    if unpublished < limit:
        given = connection.execute(_NUMBER, {"last": held.position, "limit": limit - unpublished}).rowcount
        if given:
            connection.execute(_GIVEN, {"to": held.position + given})
    return read(connection, held.published, limit)


def mark_published(connection: sa.Connection, owner: str, position: int) -> None:
    """Everything up to `position` is published; without effect when the lease is another's."""
    connection.execute(_PUBLISHED, {"by": owner, "to": position})


def read(connection: sa.Connection, after: int, limit: int) -> list[LogRow]:
    return [rows.log_row(row) for row in connection.execute(_READ, {"after": after, "limit": limit})]


def last_position(connection: sa.Connection) -> int:
    return int(connection.execute(_LAST).scalar_one())


_LOOK = sa.select(
    _leases.owner,
    _leases.until,
    _leases.position,
    _leases.published,
    sa.exists(sa.select(_events.id).where(sa.text("events.position IS NULL"))).label("unsequenced"),
).where(_leases.name == SEQUENCER)
_TAKE = (
    sa.update(schema.leases)
    .where(_leases.name == SEQUENCER, sa.or_(_leases.owner == sa.bindparam("by"), _leases.until <= sa.bindparam("now")))
    .values(owner=sa.bindparam("by"), until=sa.bindparam("ends"))
    .returning(_leases.position, _leases.published)
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
_NUMBER = sa.update(schema.events).where(_events.id == _fresh.c.id).values(position=_fresh.c.next)
_GIVEN = sa.update(schema.leases).where(_leases.name == SEQUENCER).values(position=sa.bindparam("to"))
_PUBLISHED = (
    sa.update(schema.leases)
    .where(
        _leases.name == SEQUENCER,
        _leases.owner == sa.bindparam("by"),
        _leases.published < sa.bindparam("to"),
        _leases.position >= sa.bindparam("to"),
    )
    .values(published=sa.bindparam("to"))
)
_READ = (
    sa.select(schema.events)
    .where(_events.position > sa.bindparam("after"))
    .order_by(_events.position)
    .limit(sa.bindparam("limit"))
)
_LAST = sa.select(_leases.position).where(_leases.name == SEQUENCER)
