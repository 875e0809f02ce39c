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
from fabric.sql.prepared import Prepared

SEQUENCER: Final = "sequencer"

_events = schema.events.c
_leases = schema.leases.c


def is_idle(connection: sa.Connection, owner: str, now: Micros, lease: Micros) -> bool | None:
    """A look without a lock: False when another owner holds the lease; True when this one holds it well, and
    has nothing to do; None when `sequence` must be called."""
    ((holder, until, position, published, unsequenced),) = _LOOK.all(connection, {})
    if holder != owner:
        return False if until > now else None
    held_well = until - now > lease // 2
    return True if held_well and not unsequenced and published == position else None


def sequence(connection: sa.Connection, owner: str, now: Micros, lease: Micros, limit: int) -> list[LogRow] | None:
    """Take or renew the lease, number what is new, and return what is unpublished; None without the lease."""
    held = _TAKE.first(connection, {"by": owner, "now": now, "ends": now + lease})
    if held is None:
        return None
    position, published = held
    unpublished = position - published
    if unpublished < limit:
        given = _NUMBER.run(connection, [{"last": position, "limit": limit - unpublished}])
        if given:
            _GIVEN.run(connection, [{"to": position + given}])
    return read(connection, published, limit)


def mark_published(connection: sa.Connection, owner: str, position: int) -> None:
    """Everything up to `position` is published; without effect when the lease is another's."""
    _PUBLISHED.run(connection, [{"by": owner, "to": position}])


def read(connection: sa.Connection, after: int, limit: int) -> list[LogRow]:
    return [rows.log_row(row) for row in _READ.all(connection, {"after": after, "limit": limit})]


def last_position(connection: sa.Connection) -> int:
    return int(connection.execute(_LAST).scalar_one())


_the_lease = _leases.name == SEQUENCER
_LOOK = Prepared(
    sa.select(
        _leases.owner,
        _leases.until,
        _leases.position,
        _leases.published,
        sa.exists(sa.select(_events.id).where(sa.text("events.position IS NULL"))).label("unsequenced"),
    ).where(_the_lease)
)
_TAKE = Prepared(
    sa.update(schema.leases)
    .where(_the_lease, sa.or_(_leases.owner == sa.bindparam("by"), _leases.until <= sa.bindparam("now")))
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
_NUMBER = Prepared(sa.update(schema.events).where(_events.id == _fresh.c.id).values(position=_fresh.c.next))
_GIVEN = Prepared(sa.update(schema.leases).where(_the_lease).values(position=sa.bindparam("to")))
_PUBLISHED = Prepared(
    sa.update(schema.leases)
    .where(
        _the_lease,
        _leases.owner == sa.bindparam("by"),
        _leases.published < sa.bindparam("to"),
        _leases.position >= sa.bindparam("to"),
    )
    .values(published=sa.bindparam("to"))
)
_READ = Prepared(
    sa.select(*rows.LOG_COLUMNS)
    .where(_events.position > sa.bindparam("after"))
    .order_by(_events.position)
    .limit(sa.bindparam("limit"))
)
_LAST = sa.select(_leases.position).where(_leases.name == SEQUENCER)
